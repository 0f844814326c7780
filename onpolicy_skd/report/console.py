"""Progress on the console: a live table on a terminal, one line per step elsewhere."""

from __future__ import annotations

import textwrap
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from onpolicy_skd.report.progress import shared_console

Record = dict[str, Any]
ROWS = 12  # steps in the live table
INTERVALS = 20  # last steps from which the remaining time is estimated


class Column(NamedTuple):
    name: str
    text: Callable[[Record], str]
    legend: str = ""


def columns(steps: int, divergence: str) -> list[Column]:
    """Return the columns of a run of ``steps`` steps that minimizes ``divergence``, the most important ones first."""
    return [
        Column("step", lambda r: f"{r['step'] + 1}/{steps}"),
        Column("loss", lambda r: f"{r['loss']:.4f}", "objective, nats per selected token, mean over samples"),
        Column(divergence, lambda r: f"{r['divergence_selected']:.4f}", "nats, mean over selected tokens"),
        Column("entropy", lambda r: f"{r['entropy']:.3f}", "of the student, nats per token"),
        Column("grad_norm", lambda r: f"{r['grad_norm']:.2f}", "before clipping"),
        Column("length", lambda r: f"{r['response_tokens']:.0f}", "tokens per response"),
        Column("clipped", lambda r: _percent(r.get("truncated")), "rollouts that reach rollout.max_tokens"),
        Column("tok/s", lambda r: f"{r['tokens_per_second']:.0f}", "tokens trained on per second of the step"),
        Column("time", lambda r: f"{r['seconds']['step']:.1f}s", "wall time of the step"),
        Column("lr", lambda r: f"{r['lr']:.1e}"),
        Column("kept", lambda r: f"{r['samples']:.0f}/{r['generated']}", "samples trained on, of those generated"),
        Column("selected", lambda r: _percent(r["positions_selected"] / r["positions"]), "tokens that are supervised"),
        Column(
            "gap",
            lambda r: f"{r['sampler_gap']:.1e}" if "sampler_gap" in r else "-",
            "log-probabilities of sampler and learner, mean absolute difference, nats",
        ),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def _phases(record: Record) -> str:
    return " ".join(f"{phase} {seconds:.1f}" for phase, seconds in record["seconds"].items() if phase != "step")


class Display:
    """Display of a run: ``with Display(steps) as display: display.step(record); display.log(text)``."""

    def __init__(
        self, steps: int, first: int = 0, divergence: str = "divergence", console: Console | None = None
    ) -> None:
        self.console = console or shared_console()
        self._columns = columns(steps, divergence)
        self._steps = steps
        self._records: deque[Record] = deque(maxlen=ROWS)
        self._times: deque[float] = deque(maxlen=INTERVALS + 1)  # monotonic seconds at which the last steps ended
        self._has_legend = False
        self._progress = Progress(
            TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=steps, completed=first)
        self._live = Live(self._progress, console=self.console) if self.console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def log(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, record: Record) -> None:
        """Show the metrics of an optimizer step."""
        if not self._has_legend:
            self._has_legend = True
            legend = "columns: " + "; ".join(f"{c.name} = {c.legend}" for c in self._columns if c.legend)
            self.log(textwrap.fill(legend, 110, subsequent_indent="  "))
        if not self._live:
            cells = "  ".join(f"{c.name} {c.text(record)}" for c in self._columns)
            self.log(f"{cells}  ({_phases(record)})  eta {self._eta(record)}")
            return
        self._records.append(record)
        self._progress.update(self._task, completed=record["step"] + 1)
        self._live.update(Group(self._table(), self._progress))

    def _eta(self, record: Record) -> timedelta:
        """Return the time that the remaining steps will take, from the pace of the last ones."""
        self._times.append(time.monotonic())
        intervals = len(self._times) - 1
        seconds = (self._times[-1] - self._times[0]) / intervals if intervals else record["seconds"]["step"]
        return timedelta(seconds=round(seconds * (self._steps - record["step"] - 1)))

    def _table(self) -> Table:
        """Return the last steps as a table with as many columns as the terminal has room for."""
        cells = [[c.name, *(c.text(r) for r in self._records)] for c in self._columns]
        table, width = Table(box=None, pad_edge=False), 0
        for place, texts in enumerate(cells):
            width += max(map(len, texts)) + 2  # with the padding
            if width > self.console.width:
                cells = cells[:place]
                break
            table.add_column(texts[0], justify="right", no_wrap=True)
        for row in list(zip(*cells, strict=True))[1:]:
            table.add_row(*row)
        return table
