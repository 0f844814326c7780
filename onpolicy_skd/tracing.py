"""Spans of time: what each process of a run did, and when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

KEPT = 4_096  # spans that a process remembers


class Span(NamedTuple):
    name: str
    start: float  # seconds since the epoch: one clock for all processes of a machine
    end: float


class Spans:
    """``with spans("backbone"): ...`` remembers when that was."""

    def __init__(self) -> None:
        self._found: deque[Span] = deque(maxlen=KEPT)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self._found.append(Span(name, start, time.time()))

    def drain(self) -> list[Span]:
        """What was remembered since the last call."""
        found = list(self._found)
        self._found.clear()
        return found


def within(spans: Mapping[str, Sequence[Span]], start: float, end: float) -> dict[str, list[Span]]:
    """Of each process what it did between ``start`` and ``end``."""
    return {
        who: [Span(s.name, max(s.start, start), min(s.end, end)) for s in own if s.end > start and s.start < end]
        for who, own in spans.items()
    }
