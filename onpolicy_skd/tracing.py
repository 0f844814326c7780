"""Spans of time that show what each process of a run did, and when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

KEPT = 4_096  # newest spans that a process keeps


class Span(NamedTuple):
    name: str
    start: float  # seconds since the epoch: one clock for all processes of a machine
    end: float


class Spans:
    """Recorder of spans: ``with spans("backbone"): ...``.

    ``wait``, if set, is called at both ends of a span, because a GPU still computes after a kernel launch returns.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self.wait = wait
        self._spans: deque[Span] = deque(maxlen=KEPT)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.wait:
            self.wait()
        start = time.time()
        try:
            yield
        finally:
            if self.wait:
                self.wait()
            self._spans.append(Span(name, start, time.time()))

    def drain(self) -> list[Span]:
        """Return the spans recorded since the last call."""
        spans = list(self._spans)
        self._spans.clear()
        return spans


def within(spans: Mapping[str, Sequence[Span]], start: float, end: float) -> dict[str, list[Span]]:
    """Return the spans of each process that overlap ``start`` to ``end``, clipped to that interval."""
    return {
        name: [Span(s.name, max(s.start, start), min(s.end, end)) for s in recorded if s.end > start and s.start < end]
        for name, recorded in spans.items()
    }
