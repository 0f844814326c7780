"""Figures of a comparison, as SVG in the colors of the page, and as PNG."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from onpolicy_skd.comparison.grid import Comparison, Mode, PlannedRun, Row
from onpolicy_skd.comparison.results import MODES, RowResult
from onpolicy_skd.report import metrics_log
from onpolicy_skd.report.metrics_log import Event, events_of, steps_of
from onpolicy_skd.storage.files import replacing

INK = "#010203"  # stands for the page's text color
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.alpha": 0.2, "grid.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4, "legend.frameon": False,
    "text.parse_math": False,
}  # fmt: skip
# Colors that most people can tell apart (Okabe and Ito, 2008); more rows repeat them with other line styles.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A7A7A")
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "D")
Curve = tuple[list[float], list[float]]


def figures(comparison: Comparison, rows: Sequence[RowResult]) -> dict[str, Figure]:
    """Return the figures by name, without those that have no data."""
    with rc_context(STYLE):
        figures = {
            "learning_curves": _curves(comparison, "exact match on held-out problems, %", _exact_match),
            "accuracy_and_cost": _costs(comparison, rows),
            "entropy_of_positions": _selected_and_not(comparison, "entropy", "student entropy, nats"),
            "divergence_of_positions": _selected_and_not(comparison, "divergence", "divergence, nats per token"),
            "response_length": _curves(comparison, "response length, tokens", _series("response_tokens")),
            "truncation": _curves(comparison, "truncated rollouts, %", _truncation),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def svg(figure: Figure) -> str:
    """Return the figure as an SVG element whose text and axes have the color of the page."""
    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def png(figure: Figure, path: Path) -> None:
    with rc_context(STYLE), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")


@lru_cache(maxsize=256)
def _read(file: Path, modified_ns: int) -> list[dict[str, Any]]:
    return metrics_log.read(file)


def _records(run: PlannedRun) -> list[dict[str, Any]]:
    """Return the metrics of the run, read once for all figures."""
    file = run.paths.metrics
    return _read(file, file.stat().st_mtime_ns) if file.exists() else []


def _exact_match(run: PlannedRun) -> Curve:
    return _evaluated("match", lambda match: 100 * match["share"])(run)


def _evaluated(key: str, value: Callable[[Any], float] = float) -> Callable[[PlannedRun], Curve]:
    def read(run: PlannedRun) -> Curve:
        records = [r for r in events_of(_records(run), Event.EVALUATION) if r.get(key) is not None]
        return [r["step"] for r in records], [value(r[key]) for r in records]

    return read


def _series(key: str) -> Callable[[PlannedRun], Curve]:
    def read(run: PlannedRun) -> Curve:
        steps = steps_of(_records(run))
        return _smoothed([r["step"] for r in steps], [r[key] for r in steps])

    return read


def _truncation(run: PlannedRun) -> Curve:
    """Return the percentage of student rollouts that reach the token limit, including steps with an empty batch."""
    steps = [r for r in _records(run) if "truncated" in r and r.get("event") in (None, Event.EMPTY_BATCH)]
    return _smoothed([r["step"] for r in steps], [100 * r["truncated"] for r in steps])


def _smoothed(x: list[float], y: list[float], points: int = 40) -> Curve:
    """Return the means over at most ``points`` bins of equal width, each at the middle of its bin."""
    if not x:
        return [], []
    width = max(1, math.ceil((max(x) + 1) / points))
    bins: defaultdict[int, list[float]] = defaultdict(list)
    for step, value in zip(x, y, strict=True):
        bins[int(step // width)].append(value)
    return [(i + 0.5) * width - 0.5 for i in sorted(bins)], [sum(v) / len(v) for _, v in sorted(bins.items())]


def _mean_curve(runs: Sequence[PlannedRun], read: Callable[[PlannedRun], Curve]) -> Curve:
    """Return the mean over runs at each x that all of them have."""
    values: defaultdict[float, list[float]] = defaultdict(list)
    for run in runs:
        for x, y in zip(*read(run), strict=True):
            values[x].append(y)
    shared = sorted(x for x, of_runs in values.items() if len(of_runs) == len(runs))
    return shared, [sum(values[x]) / len(runs) for x in shared]


def _finished(comparison: Comparison, mode: Mode) -> list[tuple[int, Row, list[PlannedRun]]]:
    """Return each row that has finished runs, with its place in the grid, which decides color and line style."""
    rows = [
        (place, row, [r for r in comparison.of(row, mode) if r.status == "finished"])
        for place, row in enumerate(comparison.grid.rows)
        if mode in row.modes
    ]
    return [(place, row, runs) for place, row, runs in rows if runs]


def _look(place: int) -> dict[str, Any]:
    return {"color": COLORS[place % len(COLORS)], "linestyle": LINES[place // len(COLORS) % len(LINES)]}


def _panels(
    comparison: Comparison,
    title: str,
    plot_row: Callable[[Axes, int, Row, list[PlannedRun]], None],
    shared: bool = True,
) -> Figure | None:
    """Return a figure with a panel per mode, to which ``plot_row`` adds each row; None if nothing was plotted."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(MODES), sharey=shared)
    legend: dict[str, Any] = {}
    for axis, (mode, name) in zip(axes, MODES.items(), strict=True):
        for place, row, runs in _finished(comparison, mode):
            plot_row(axis, place, row, runs)
        axis.set(title=f"{name}: {title}", xlabel="step")
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
        if not handles:
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center")
    for axis in axes:
        axis.set_ylim(bottom=0)
    names = [row.name for row in comparison.grid.rows if row.name in legend]
    figure.legend([legend[n] for n in names], names, loc="outside right upper", fontsize=8)
    return figure if legend else None


def _curves(comparison: Comparison, title: str, read: Callable[[PlannedRun], Curve]) -> Figure | None:
    """Return a figure with a line per row: the mean over seeds."""

    def plot_row(axis: Axes, place: int, row: Row, runs: list[PlannedRun]) -> None:
        x, y = _mean_curve(runs, read)
        if x:
            axis.plot(x, y, label=row.name, **_look(place), marker="." if len(x) < 12 else None)

    return _panels(comparison, title, plot_row)


def _costs(comparison: Comparison, rows: Sequence[RowResult]) -> Figure | None:
    """Plot exact match over four kinds of cost, a point for each row and mode."""
    kinds = {
        "teacher_tokens": "teacher tokens", "positions_supervised": "positions supervised",
        "train_seconds": "seconds of training", "learner_memory_mib": "learner's peak memory, MiB",
    }  # fmt: skip
    if not rows:
        return None
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    names = [row.name for row in comparison.grid.rows]
    for axis, (key, title) in zip(figure.subplots(2, 2).flat, kinds.items(), strict=True):
        for r in rows:
            place, filled = names.index(r.row), r.mode == "on_policy"
            color = COLORS[place % len(COLORS)]
            face = color if filled else "none"
            label = r.row if filled or all(other.row != r.row for other in rows if other.mode == "on_policy") else None
            marker = MARKERS[place // len(COLORS) % len(MARKERS)]
            axis.scatter(
                r.cost[key], r.exact_match.mean, s=36, edgecolors=color, facecolors=face, marker=marker, label=label
            )
        axis.set(xlabel=title, ylabel="exact match, %")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.suptitle("Accuracy and cost (filled: on-policy, hollow: off-policy)", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure


def _selected_and_not(comparison: Comparison, quantity: str, title: str) -> Figure | None:
    """Plot ``quantity`` at the positions of held-out rollouts that training would select, and at the others."""

    def plot_row(axis: Axes, place: int, row: Row, runs: list[PlannedRun]) -> None:
        if runs[0].settings.positions.policy == "full":
            return
        color, marker = COLORS[place % len(COLORS)], MARKERS[place // len(COLORS) % len(MARKERS)]
        for kind, line in (("selected", "-"), ("unselected", ":")):
            x, y = _mean_curve(runs, _evaluated(f"{quantity}_{kind}"))
            if y:
                label = row.name if kind == "selected" else None
                axis.plot(x, y, line, color=color, label=label, marker=marker, markersize=4)

    return _panels(comparison, f"{title}\n(solid: selected, dotted: not)", plot_row, shared=False)
