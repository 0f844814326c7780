"""Whole on-policy steps by phase, without a peer: what ``end-to-end`` measures of this project."""

from __future__ import annotations

import statistics
from typing import Any

from eval.performance import end_to_end
from eval.performance.end_to_end import DEFAULT, MEANING, SHAPES
from eval.performance.measuring import in_turn

VARIANTS = tuple(v for v in end_to_end.VARIANTS if v.startswith("ours"))
measure = end_to_end.measure
__all__ = ["DEFAULT", "SHAPES", "compare", "measure", "show"]


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """All variants of one shape, ``rounds`` times in turn, each in a process of its own."""
    found = in_turn("step", VARIANTS, [shape, device], rounds)
    over = {v: statistics.median(r["seconds"] / r["unavoidable"] for r in found[v]) for v in VARIANTS}
    return {"shape": SHAPES[shape]._asdict(), "runs": found, "step_over_unavoidable": over}


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Prints medians by phase."""
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']}")
        for variant in VARIANTS:
            runs = figures["runs"][variant]
            phases = {p: statistics.median(r["phases"][p] for r in runs) for p in runs[0]["phases"]}
            print(
                f"  {variant:>11}  " + ", ".join(f"{p} {s:.2f} s" for p, s in phases.items()) + f"   {MEANING[variant]}"
            )
            print(f"               step over unavoidable {figures['step_over_unavoidable'][variant]:.2f}")
