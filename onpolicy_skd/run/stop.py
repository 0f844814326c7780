"""Stopping of a run by a signal or by the clock.

During the steps, the first signal requests a stop with a checkpoint, as the deadline does; the second signal exits at
once.  Before and after the steps (engines starting, evaluation) there is nothing to save, so the first signal ends the
run by raising ``Stopped``.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2  # file descriptor


class Stopped(BaseException):
    """A signal outside the steps; like KeyboardInterrupt, it passes through ``except Exception``."""


def as_stopped(error: BaseException | None) -> Stopped | None:
    """Return the Stopped that ``error`` is or that caused it.

    Ray's C code reports the exception of a signal handler as the cause of a SystemError.
    """
    cause = error.__cause__ if isinstance(error, SystemError) else error
    return cause if isinstance(cause, Stopped) else None


class StopSignal:
    """Handler of stop signals: ``with StopSignal() as stop: ... with stop.orderly(): while not stop.requested: ...``

    Enter it after connecting to Ray, which sets handlers too; the previous handlers are restored on exit.  After
    ``hours``, ``requested`` becomes true without a signal.
    """

    def __init__(self, hours: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._requested = self._signalled = False
        self._orderly = False
        self._hours = hours
        self._clock = clock
        self._deadline = math.inf if hours is None else clock() + 3600 * hours
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if isinstance(error, SystemError) and (stopped := as_stopped(error)):
            raise stopped from None

    @property
    def requested(self) -> bool:
        if not self._requested and self._clock() >= self._deadline:
            self.request(f"run.max_hours={self._hours:g}")
        return self._requested

    def request(self, reason: str, hint: str = "") -> None:
        """Request a stop with a checkpoint.

        The message is written to the file descriptor, because a print in a signal handler may interrupt another print,
        which raises RuntimeError.
        """
        self._requested = True
        os.write(STDERR, f"{reason}: ending after this step, with a checkpoint{hint}\n".encode())

    @contextmanager
    def orderly(self) -> Iterator[None]:
        """Make the first signal within this context set ``requested`` only."""
        self._orderly = True
        try:
            yield
        finally:
            self._orderly = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
        if not self._orderly:
            self._requested = True
            raise Stopped(name)
        self.request(name, "; a second signal exits at once")
