"""Figures of a comparison, as SVG that takes the page's colours, and as PNG."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from onpolicy_skd.checkpoint import replacing
from onpolicy_skd.comparison import Comparison, Mode, PlannedRun, Row
from onpolicy_skd.report import metrics
from onpolicy_skd.report.comparison import MODES, RowResult

INK = "#010203"  # stands for the page's text colour
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.alpha": 0.2, "grid.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4, "legend.frameon": False,
}  # fmt: skip
# Colours that can be told apart by most people (Okabe and Ito, 2008), then the same again with other lines.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A7A7A")
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "D")
Curve = tuple[list[float], list[float]]


def figures(comparison: Comparison, rows: Sequence[RowResult]) -> dict[str, Figure]:
    """By name; those for which nothing was recorded are left out."""
    with rc_context(STYLE):
        made = {
            "learning_curves": _curves(comparison, "exact match on held-out problems, %", _exact_match),
            "accuracy_and_cost": _costs(rows),
            "entropy_of_positions": _two_kinds(comparison, "entropy", "student entropy, nats"),
            "divergence_of_positions": _two_kinds(comparison, "divergence", "divergence, nats per token"),
            "response_length": _curves(comparison, "response length, tokens", _series("response_tokens")),
            "truncation": _curves(comparison, "truncated rollouts, %", _truncation),
        }
    return {name: figure for name, figure in made.items() if figure is not None}


def svg(figure: Figure) -> str:
    """The figure as an SVG element whose text and axes have the page's colour."""
    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def png(figure: Figure, path: Path) -> None:
    with rc_context(STYLE), replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=110, facecolor="white")


def _exact_match(run: PlannedRun) -> Curve:
    found = [r for r in metrics.read(run.folder / metrics.FILE) if r.get("event") == "evaluation" and "match" in r]
    return [r["step"] for r in found], [100 * r["match"]["share"] for r in found]


def _series(key: str) -> Any:
    def read(run: PlannedRun) -> Curve:
        steps = [r for r in metrics.read(run.folder / metrics.FILE) if "loss" in r]
        return _smoothed([r["step"] for r in steps], [r[key] for r in steps])

    return read


def _truncation(run: PlannedRun) -> Curve:
    steps = [r for r in metrics.read(run.folder / metrics.FILE) if "generated" in r]
    shares = [100 * r["dropped"].get("truncated", 0) / r["generated"] for r in steps]
    return _smoothed([r["step"] for r in steps], shares)


def _smoothed(x: list[float], y: list[float], points: int = 40) -> Curve:
    """Means over equal stretches: at most ``points`` of them."""
    width = max(1, -(-len(x) // points))
    parts = [slice(i, i + width) for i in range(0, len(x), width)]
    return [sum(x[p]) / len(x[p]) for p in parts], [sum(y[p]) / len(y[p]) for p in parts]


def _mean_curve(runs: Sequence[PlannedRun], read: Any) -> Curve:
    """The mean over runs at every x that all of them have."""
    values: defaultdict[float, list[float]] = defaultdict(list)
    for run in runs:
        for x, y in zip(*read(run), strict=True):
            values[x].append(y)
    shared = sorted(x for x, several in values.items() if len(several) == len(runs))
    return shared, [sum(values[x]) / len(runs) for x in shared]


def _finished(comparison: Comparison, mode: Mode) -> list[tuple[int, Row, list[PlannedRun]]]:
    """Each row with its place in the grid, by which it looks the same in every panel."""
    found = [
        (place, row, [r for r in comparison.of(row, mode) if r.status == "finished"])
        for place, row in enumerate(comparison.grid.rows)
        if mode in row.modes
    ]
    return [one for one in found if one[2]]


def _look(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place // len(COLOURS) % len(LINES)]}


def _curves(comparison: Comparison, title: str, read: Any) -> Figure | None:
    """One panel a mode, one line a row: the mean over seeds."""
    figure, drawn = Figure(figsize=(9.5, 3.8), layout="constrained"), False
    axes = figure.subplots(1, len(MODES), sharey=True)
    for axis, (mode, name) in zip(axes, MODES.items(), strict=True):
        for place, row, runs in _finished(comparison, mode):
            x, y = _mean_curve(runs, read)
            if any(y):
                axis.plot(x, y, label=row.name, **_look(place), marker="." if len(x) < 12 else None)
                drawn = True
        axis.set(title=f"{name}: {title}", xlabel="step", ylim=(0, None))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, ncols=2)
    return figure if drawn else None


def _costs(rows: Sequence[RowResult]) -> Figure | None:
    """Exact match over four kinds of cost, a point for each row and mode."""
    kinds = {
        "teacher_tokens": "teacher tokens", "positions_supervised": "positions supervised",
        "train_seconds": "seconds of training", "learner_memory_mib": "learner's peak memory, MiB",
    }  # fmt: skip
    if not rows:
        return None
    figure = Figure(figsize=(9.5, 6.4), layout="constrained")
    names = list(dict.fromkeys(r.row for r in rows))
    for axis, (key, title) in zip(figure.subplots(2, 2).flat, kinds.items(), strict=True):
        for r in rows:
            place, filled = names.index(r.row), r.mode == "on_policy"
            colour = COLOURS[place % len(COLOURS)]
            face = colour if filled else "none"
            label = r.row if filled or all(other.row != r.row for other in rows if other.mode == "on_policy") else None
            marker = MARKERS[place // len(COLOURS) % len(MARKERS)]
            axis.scatter(
                r.cost[key], r.exact_match.mean, s=36, edgecolors=colour, facecolors=face, marker=marker, label=label
            )
        axis.set(xlabel=title, ylabel="exact match, %")
    figure.suptitle("Accuracy and cost (filled: on-policy, hollow: off-policy)", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure


def _two_kinds(comparison: Comparison, quantity: str, title: str) -> Figure | None:
    """Of the positions that training would select and of the others, on held-out rollouts: one panel a mode."""
    figure, drawn = Figure(figsize=(9.5, 3.8), layout="constrained"), False
    axes = figure.subplots(1, len(MODES), sharey=True)
    for axis, (mode, name) in zip(axes, MODES.items(), strict=True):
        for place, row, runs in _finished(comparison, mode):
            for kind, line in (("selected", "-"), ("unselected", ":")):
                x, y = _mean_curve(runs, _evaluated(f"{quantity}_{kind}"))
                if y and row.settings.get("positions", {}).get("policy") != "full":
                    label = row.name if kind == "selected" else None
                    marker = MARKERS[place // len(COLOURS) % len(MARKERS)]
                    axis.plot(x, y, line, color=COLOURS[place % len(COLOURS)], label=label, marker=marker, markersize=4)
                    drawn = True
        axis.set(title=f"{name}: {title}\n(solid: selected, dotted: not)", xlabel="step", ylim=(0, None))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, ncols=2)
    return figure if drawn else None


def _evaluated(key: str) -> Any:
    def read(run: PlannedRun) -> Curve:
        found = [r for r in metrics.read(run.folder / metrics.FILE) if r.get(key) is not None]
        return [r["step"] for r in found], [r[key] for r in found]

    return read
