"""Cost of the loss along one axis at a time: rows (batch times length), share of positions, vocabulary."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.performance.loss import loss_step, make_inputs
from eval.performance.measuring import clock, memory, reset_peak, run_alternately


class Curves(NamedTuple):
    base: dict[str, float]
    axes: dict[str, tuple[float, ...]]


SHAPES = {
    "small": Curves(
        {"vocabulary": 151_936, "student_hidden": 256, "teacher_hidden": 512, "rows": 1024, "k": 0.2},
        {
            "rows": (256, 512, 1024, 2048, 4096),
            "k": (0.05, 0.1, 0.2, 0.5, 1.0),
            "vocabulary": (32_000, 64_000, 151_936, 256_000),
        },
    ),
    "tiny": Curves(  # for tests
        {"vocabulary": 600, "student_hidden": 16, "teacher_hidden": 24, "rows": 40, "k": 0.5},
        {"rows": (40, 80), "k": (0.5, 1.0)},
    ),
}
DEFAULT = ("small",)


def measure(variant: str, shape: str, device: str) -> dict[str, float]:
    """Measure seconds of a warm step, and its peak MiB above what the warm-up left, at the point ``variant``.

    ``variant`` is "AXIS=VALUE"; the other axes are as in the base.
    """
    torch.set_num_threads(1)
    axis, _, value = variant.partition("=")
    point = SHAPES[shape].base | {axis: float(value)}
    sizes = [int(point[name]) for name in ("vocabulary", "student_hidden", "teacher_hidden", "rows")]
    step = loss_step("ours", make_inputs(sizes, device), point["k"])
    step()
    reset_peak(device)
    resident = memory(device, "now")
    start = clock(device)
    step()
    seconds = clock(device) - start
    return {
        "seconds": seconds,
        "extra_mib": memory(device, "peak") - resident,
        "logits_mib": 2 * point["rows"] * point["vocabulary"] * 4 / 2**20,  # float32, of both models, if kept
    }


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure all points of all axes ``rounds`` times, each in a separate process."""
    curves = SHAPES[shape]
    variants = [f"{axis}={value:g}" for axis, values in curves.axes.items() for value in values]
    runs = run_alternately("curves", variants, [shape, device], rounds)
    points = {
        axis: [
            {axis: value}
            | {
                key: statistics.median(r[key] for r in runs[f"{axis}={value:g}"])
                for key in ("seconds", "extra_mib", "logits_mib")
            }
            for value in values
        ]
        for axis, values in curves.axes.items()
    }
    return {"shape": {"base": curves.base}, "points": points, "runs": runs}


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Print the points."""
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']['base']}")
        for axis, points in figures["points"].items():
            for p in points:
                kept = f"{p['logits_mib']:8.0f} MiB of logits, if kept"
                print(f"  {axis:>10} {p[axis]:>9g}  {p['seconds']:8.3f} s  {p['extra_mib']:8.0f} MiB extra   {kept}")


def plot(path: Path, shapes: dict[str, dict[str, Any]]) -> None:
    """Plot the first shape, one column per axis: seconds above, memory below."""
    from matplotlib.figure import Figure

    points = next(iter(shapes.values()))["points"]
    figure = Figure(figsize=(3.6 * len(points), 5.2), layout="constrained")
    grid = figure.subplots(2, len(points), squeeze=False)
    for column, (axis, along) in enumerate(points.items()):
        x = [p[axis] for p in along]
        above, below = grid[0, column], grid[1, column]
        above.plot(x, [p["seconds"] for p in along], marker="o")
        below.plot(x, [p["extra_mib"] for p in along], marker="o", label="measured")
        below.plot(x, [p["logits_mib"] for p in along], linestyle="--", color="gray", label="logits of both, if kept")
        above.set_ylabel("CPU seconds" if not column else "")
        below.set_ylabel("extra MiB" if not column else "")
        below.set_xlabel(axis)
        for axes in (above, below):
            axes.set_ylim(0, None)
            axes.grid(alpha=0.3)
    grid[1, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")
