"""On-policy steps by phase: this project's variants of ``end-to-end``."""

from __future__ import annotations

import statistics
from typing import Any

from eval.performance import end_to_end
from eval.performance.end_to_end import DEFAULT, MEANING, SHAPES
from eval.performance.measuring import run_alternately

VARIANTS = tuple(v for v in end_to_end.VARIANTS if v.startswith("ours"))
measure = end_to_end.measure
__all__ = ["DEFAULT", "SHAPES", "compare", "measure", "show"]


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure all variants of a shape ``rounds`` times, each in a separate process."""
    runs = run_alternately("step", VARIANTS, [shape, device], rounds)
    over = {v: statistics.median(r["seconds"] / r["unavoidable"] for r in runs[v]) for v in VARIANTS}
    return {"shape": SHAPES[shape]._asdict(), "runs": runs, "step_over_unavoidable": over}


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Print medians by phase."""
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']}")
        for variant in VARIANTS:
            runs = figures["runs"][variant]
            phases = {p: statistics.median(r["phases"][p] for r in runs) for p in runs[0]["phases"]}
            print(
                f"  {variant:>11}  " + ", ".join(f"{p} {s:.2f} s" for p, s in phases.items()) + f"   {MEANING[variant]}"
            )
            print(f"               step over unavoidable {figures['step_over_unavoidable'][variant]:.2f}")
