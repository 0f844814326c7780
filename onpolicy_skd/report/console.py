"""Progress for people: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = {
    "step": lambda r: str(r["step"]),
    "loss": lambda r: f"{r['loss']:.4f}",
    "entropy": lambda r: f"{r['entropy']:.3f}",
    "selected": lambda r: f"{r['positions_selected']:.0f}/{r['positions']:.0f}",
    "kept": lambda r: f"{r['samples']:.0f}/{r['generated']}",
    "length": lambda r: f"{r['response_tokens']:.0f}",
    "gap": lambda r: f"{r['sampler_gap']:.1e}" if "sampler_gap" in r else "-",
    "grad": lambda r: f"{r['grad_norm']:.2f}",
    "rollout+filter+learn+sync s": lambda r: " + ".join(
        f"{r['seconds'][phase]:.1f}" for phase in ("rollout", "filter", "learn", "sync")
    ),
}
ROWS = 12


class Display:
    """``with Display(steps) as d: d.step(record); d.log(text)``."""

    def __init__(self, steps: int, first: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._records: deque[dict[str, Any]] = deque(maxlen=ROWS)
        self._progress = Progress(
            TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.console,
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

    def step(self, record: dict[str, Any]) -> None:
        """Shows the metrics of one optimizer step."""
        if not self._live:
            self.log("  ".join(f"{name} {show(record)}" for name, show in COLUMNS.items()))
            return
        self._records.append(record)
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for row in self._records:
            table.add_row(*(show(row) for show in COLUMNS.values()))
        self._progress.update(self._task, completed=record["step"] + 1)
        self._live.update(Group(table, self._progress))
