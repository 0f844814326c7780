"""Ending a run from outside.

During its steps, the first signal asks for an orderly end with a checkpoint and the second ends at once.  Before and
after them (engines starting, evaluation) there is nothing to save: the first one ends the run by raising ``Stopped``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal outside the steps; like KeyboardInterrupt, no ``except Exception`` swallows it."""


class StopSignal:
    """``with StopSignal() as stop: ... with stop.orderly(): while not stop.requested: ...``

    Handlers are put back on leaving.  Enter it after Ray is connected: Ray sets handlers of its own.
    """

    def __init__(self) -> None:
        self.requested = False
        self._orderly = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Within it, the first signal only sets ``requested``."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        if not self._orderly:
            raise Stopped(name)
        print(f"{name}: ending after this step, with a checkpoint; once more ends at once", file=sys.stderr, flush=True)
