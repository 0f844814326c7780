"""Stop texts: a response ends at the first token after which its decoded text contains one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def stop_length(
    ids: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str], known: int = 0
) -> int | None:
    """Return the number of tokens after which a stop text is complete, or None.

    ``known``: the number of first tokens whose text is known to contain no stop text.
    """
    if not contains(decode(ids), stop):
        return None
    return next(n for n in range(known + 1, len(ids) + 1) if contains(decode(ids[:n]), stop))


def contains(text: str, stop: Sequence[str]) -> bool:
    """Return True if ``text`` contains a stop text."""
    return any(s in text for s in stop)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return ``text`` up to the first stop text, which is not part of the answer."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]
