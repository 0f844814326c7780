"""Ending a run from outside: the first signal asks for a checkpoint and an orderly end, the second ends at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """``with StopSignal() as stop: while not stop.requested: ...``; handlers are put back on leaving.

    Enter it after Ray is connected: Ray sets handlers of its own.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        print(f"{name}: ending after this step, with a checkpoint; once more ends at once", file=sys.stderr, flush=True)
