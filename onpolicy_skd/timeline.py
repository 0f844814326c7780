"""Who was busy when: spans of time from every process of a run, as a Chrome trace and as a picture."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from onpolicy_skd.checkpoint import replacing, write_text

KEPT = 4_096  # spans that a process remembers


class Span(NamedTuple):
    name: str
    start: float  # seconds since the epoch: one clock for all processes of a machine
    end: float


class Spans:
    """``with spans("trunk"): ...`` remembers when that was."""

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


def write(folder: Path, spans: Mapping[str, Sequence[Span]], step: int) -> None:
    """``timeline.json`` for chrome://tracing or Perfetto, and ``timeline.png``."""
    first = min((s.start for own in spans.values() for s in own), default=0.0)
    events: list[dict] = []
    for number, (who, own) in enumerate(spans.items()):
        events.append({"name": "process_name", "ph": "M", "pid": number, "args": {"name": who}})
        for s in own:
            micro = {"ts": round(1e6 * (s.start - first)), "dur": round(1e6 * (s.end - s.start))}
            events.append({"name": s.name, "ph": "X", "pid": number, "tid": 0, **micro})
    write_text(folder / "timeline.json", json.dumps({"traceEvents": events, "otherData": {"step": step}}) + "\n")
    with replacing(folder / "timeline.png") as beside:
        _plot(beside, spans, first, step)


def _plot(path: Path, spans: Mapping[str, Sequence[Span]], first: float, step: int) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(s.name for own in spans.values() for s in own))
    color = dict(zip(names, colormaps["tab20"].colors * (1 + len(names) // 20), strict=False))  # type: ignore[attr-defined]
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(spans)), layout="constrained")
    axis = figure.subplots()
    for row, own in enumerate(spans.values()):
        for s in own:
            axis.barh(row, s.end - s.start, left=s.start - first, color=color[s.name], edgecolor="white", linewidth=0.3)
    axis.set_yticks(range(len(spans)), list(spans))
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds of step {step}")
    handles = [axis.barh(0, 0, color=color[name], label=name) for name in names]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110, format="png")
