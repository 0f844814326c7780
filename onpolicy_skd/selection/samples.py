"""Sample filters: pure functions that return what was kept and a count per reason.  Order: validity, then ranking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from onpolicy_skd.selection.positions import quota
from onpolicy_skd.trajectory import FilterReport, Trajectory


def validity(trajectories: Sequence[Trajectory], vocabulary: int, drop_truncated: bool = True) -> FilterReport:
    """Drops responses that are empty, truncated (if asked), or hold ids outside the shared vocabulary."""
    kept, reasons = [], Counter[str]()
    for t in trajectories:
        if len(t.response_ids) == 0:
            reasons["empty"] += 1
        elif t.finish == "length" and drop_truncated:
            reasons["truncated"] += 1
        elif t.response_ids.max() >= vocabulary:
            reasons["outside_vocabulary"] += 1
        else:
            kept.append(t.key)
    return FilterReport(kept, len(trajectories), dict(reasons))


def top_share(scores: Sequence[float], share: float) -> list[int]:
    """Indices, in their own order, of the ceil(share * N) highest scores; ties go to the earlier one."""
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: quota(share, len(scores))]
    return sorted(best)
