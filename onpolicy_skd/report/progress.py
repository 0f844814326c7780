"""Progress of long work: a bar with an estimate on a terminal, a line every 20 seconds elsewhere."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL_S = 20.0


@functools.cache
def shared_console() -> Console:
    """Return the console of this process: rich nests live displays only within the same console."""
    return Console(highlight=False, soft_wrap=True)


class ProgressReporter:
    """Report how much of ``total`` is done: ``with ProgressReporter("evaluation", 64) as p: p.advance()``.

    On a terminal the reporter shows a bar.  Elsewhere it passes a line to ``log`` (default: print) every ``interval_s``
    seconds, even while nothing advances; work that takes less time prints nothing.
    """

    def __init__(
        self,
        label: str,
        total: int,
        log: Callable[[str], None] | None = None,
        completed: int = 0,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Start at ``completed`` units, which an earlier process did; they do not count for the rate."""
        self._label, self._total, self._completed, self._before = label, total, completed, completed
        self._interval_s = interval_s
        self._log = log or functools.partial(print, flush=True)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._log_lines, daemon=True)
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressReporter:
        self._start = time.monotonic()
        console = shared_console()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip
            self._bar.add_task(self._label, total=self._total, completed=self._completed)
            self._bar.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._thread.join()
            if time.monotonic() - self._start >= self._interval_s:
                self._log(self.line())

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self._completed += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)

    def line(self) -> str:
        """Return label, done/total, rate, and the time passed or remaining."""
        seconds = time.monotonic() - self._start
        rate = (self._completed - self._before) / seconds if seconds else 0.0
        text = f"{self._label}: {self._completed}/{self._total}"
        if not rate:
            return f"{text} after {_clock(seconds)}"
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        left = self._total - self._completed
        return f"{text}, {pace}, {_clock(left / rate)} remaining" if left else f"{text}, {pace}, {_clock(seconds)}"

    def _log_lines(self) -> None:
        while not self._closed.wait(self._interval_s):
            self._log(self.line())


def _clock(seconds: float) -> str:
    """Format ``seconds`` as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
