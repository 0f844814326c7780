"""Results of checks: printed as they arrive, as a table, and as JSON."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

OK, FAILED, SKIPPED, NOTE = "ok", "FAILED", "skipped", "note"


@dataclass(frozen=True, slots=True)
class Result:
    stage: str
    name: str
    status: str
    value: float | str | None = None
    criterion: str = ""  # empty for a note

    def line(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float | int) else self.value or ""
        return f"{self.status:<8}{self.name}: {value}" + (f" ({self.criterion})" if self.criterion else "")


@dataclass
class Report:
    """Results of one stage of the checks."""

    stage: str
    results: list[Result] = field(default_factory=list)
    show: Callable[[str], None] = print

    def at_most(self, name: str, value: float, bound: float) -> None:
        self._add(name, OK if value <= bound else FAILED, value, f"at most {bound:g}")

    def at_least(self, name: str, value: float, bound: float) -> None:
        self._add(name, OK if value >= bound else FAILED, value, f"at least {bound:g}")

    def true(self, name: str, holds: bool, value: str, criterion: str) -> None:
        self._add(name, OK if holds else FAILED, value, criterion)

    def note(self, name: str, value: float | str) -> None:
        """Add a figure without a criterion."""
        self._add(name, NOTE, value)

    def skip(self, name: str, reason: str) -> None:
        self._add(name, SKIPPED, reason)

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Turn an error in the block into a failed check ``name``; without one, note the block's seconds."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # the other checks are still informative
            text = str(error).strip().splitlines()
            self._add(name, FAILED, f"{type(error).__name__}: {text[0] if text else ''}", "no error")
        else:
            self.note(f"{name}, seconds", round(time.perf_counter() - start, 3))

    def _add(self, name: str, status: str, value: float | str | None, criterion: str = "") -> None:
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no such numbers
        self.results.append(Result(self.stage, name, status, value, criterion))
        self.show(self.results[-1].line())


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table, without notes."""
    rows = [r for r in results if r.status != NOTE]
    lines = ["| stage | check | result | measured | passes if |", "|---|---|---|---|---|"]
    for r in rows:
        value = f"{r.value:.4g}" if isinstance(r.value, float | int) else r.value or ""
        lines.append(f"| {r.stage} | {r.name} | {r.status} | {value} | {r.criterion} |")
    return "\n".join(lines)


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(r) for r in results]
