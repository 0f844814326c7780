"""What the loss costs along one axis at a time: rows (batch times length), share of positions, vocabulary."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.performance.loss import loss_step, make_inputs
from eval.performance.measuring import clock, in_turn, memory, reset_peak


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
    """Seconds of a warm step and peak extra MiB at ``axis=value``, all else as in the base."""
    torch.set_num_threads(1)
    axis, _, value = variant.partition("=")
    at = SHAPES[shape].base | {axis: float(value)}
    sizes = [int(at[name]) for name in ("vocabulary", "student_hidden", "teacher_hidden", "rows")]
    step = loss_step("ours", make_inputs(sizes, device), at["k"])
    step()
    reset_peak(device)
    resident = memory(device, "now")
    started = clock(device)
    step()
    seconds = clock(device) - started
    return {
        "seconds": seconds,
        "extra_mib": memory(device, "peak") - resident,
        "logits_mib": 2 * at["rows"] * at["vocabulary"] * 4 / 2**20,  # of both models, had they been kept
    }


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """All points of all axes, ``rounds`` times in turn, each in a process of its own."""
    own = SHAPES[shape]
    variants = [f"{axis}={value:g}" for axis, values in own.axes.items() for value in values]
    found = in_turn("curves", variants, [shape, device], rounds)
    points = {
        axis: [
            {axis: value}
            | {
                key: statistics.median(r[key] for r in found[f"{axis}={value:g}"])
                for key in ("seconds", "extra_mib", "logits_mib")
            }
            for value in values
        ]
        for axis, values in own.axes.items()
    }
    return {"shape": {"base": own.base}, "points": points, "runs": found}


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Prints the points."""
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']['base']}")
        for axis, points in figures["points"].items():
            for p in points:
                kept = f"{p['logits_mib']:8.0f} MiB of logits, had they been kept"
                print(f"  {axis:>10} {p[axis]:>9g}  {p['seconds']:8.3f} s  {p['extra_mib']:8.0f} MiB extra   {kept}")


def plot(path: Path, shapes: dict[str, dict[str, Any]]) -> None:
    """One column an axis, of the first shape: seconds above, memory below."""
    from matplotlib.figure import Figure

    points = next(iter(shapes.values()))["points"]
    figure = Figure(figsize=(3.6 * len(points), 5.2), layout="constrained")
    grid = figure.subplots(2, len(points), squeeze=False)
    for column, (axis, own) in enumerate(points.items()):
        x = [p[axis] for p in own]
        above, below = grid[0, column], grid[1, column]
        above.plot(x, [p["seconds"] for p in own], marker="o")
        below.plot(x, [p["extra_mib"] for p in own], marker="o", label="measured")
        below.plot(x, [p["logits_mib"] for p in own], linestyle="--", color="gray", label="logits of both, if kept")
        above.set_ylabel("CPU seconds" if not column else "")
        below.set_ylabel("extra MiB" if not column else "")
        below.set_xlabel(axis)
        for one in (above, below):
            one.set_ylim(0, None)
            one.grid(alpha=0.3)
    grid[1, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")
