"""The timeline of one step: a Chrome trace and a figure of what each process did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from onpolicy_skd.storage.files import RunPaths, replacing, write_text
from onpolicy_skd.tracing import Span


def write_timeline(folder: Path, spans: Mapping[str, Sequence[Span]], step: int) -> None:
    """Write ``timeline.json`` for chrome://tracing or Perfetto, and ``timeline.png``."""
    first = min((s.start for process_spans in spans.values() for s in process_spans), default=0.0)
    events: list[dict] = []
    for pid, (process, process_spans) in enumerate(spans.items()):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": process}})
        for s in process_spans:
            microseconds = {"ts": round(1e6 * (s.start - first)), "dur": round(1e6 * (s.end - s.start))}
            events.append({"name": s.name, "ph": "X", "pid": pid, "tid": 0, **microseconds})
    write_text(RunPaths(folder).timeline, json.dumps({"traceEvents": events, "otherData": {"step": step}}) + "\n")
    with replacing(RunPaths(folder).timeline_image) as temporary:
        _plot(temporary, spans, first, step)


def _plot(path: Path, spans: Mapping[str, Sequence[Span]], first: float, step: int) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(s.name for process_spans in spans.values() for s in process_spans))
    color = dict(zip(names, colormaps["tab20"].colors * (1 + len(names) // 20), strict=False))  # type: ignore[attr-defined]
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(spans)), layout="constrained")
    axis = figure.subplots()
    for row, process_spans in enumerate(spans.values()):
        for s in process_spans:
            axis.barh(row, s.end - s.start, left=s.start - first, color=color[s.name], edgecolor="white", linewidth=0.3)
    axis.set_yticks(range(len(spans)), list(spans))
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds of step {step + 1}")
    handles = [axis.barh(0, 0, color=color[name], label=name) for name in names]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110, format="png")
