"""Sample filters: pure functions that return what was kept and a count per reason.  Order: validity, then ranking."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from onpolicy_skd.selection.positions import num_selected
from onpolicy_skd.types import FilterReport, Trajectory

TEACHER_METRICS = frozenset({"kl", "ce_ratio"})  # sample scores that cost a teacher forward of every candidate


def validity(
    trajectories: Sequence[Trajectory], vocabulary: int, drop_truncated: bool = True, correctness: str = "any"
) -> FilterReport:
    """Drops responses that are empty, truncated (if asked), hold ids outside the shared vocabulary, or are not as
    ``correctness`` ("right" or "wrong") wants them.  Raises ValueError if that is asked of answers nobody judged.
    """
    kept, reasons = [], Counter[str]()
    for t in trajectories:
        if correctness != "any" and t.correct is None:
            raise ValueError(f"trajectory {t.key} was not judged, so samples.correctness={correctness} cannot apply")
        if len(t.response_ids) == 0:
            reasons["empty"] += 1
        elif t.finish_reason == "length" and drop_truncated:
            reasons["truncated"] += 1
        elif t.response_ids.max() >= vocabulary:
            reasons["outside_vocabulary"] += 1
        elif correctness != "any" and t.correct != (correctness == "right"):
            reasons["right" if t.correct else "wrong"] += 1
        else:
            kept.append(t.key)
    finish_reasons = [t.finish_reason for t in trajectories if t.policy_version is not None]
    return FilterReport(kept, len(trajectories), dict(reasons), len(finish_reasons), finish_reasons.count("length"))


def top_share(scores: Sequence[float], share: float) -> list[int]:
    """Indices, in their own order, of the ceil(share * N) highest scores; ties go to the earlier one."""
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: num_selected(share, len(scores))]
    return sorted(best)


def paced(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Weight of each trajectory by key: p(1 - p), with p the pass rate of its prompt's rollouts (PACED).

    0 where all of a prompt's answers are right, or all wrong.  Raises ValueError for answers nobody judged.
    """
    verdicts: defaultdict[str, list[bool]] = defaultdict(list)
    for t in trajectories:
        if t.correct is None:
            raise ValueError(f"trajectory {t.key} was not judged, so samples.weight=paced cannot apply")
        verdicts[t.prompt_key].append(t.correct)
    rates = {prompt: sum(judged) / len(judged) for prompt, judged in verdicts.items()}
    return {t.key: rates[t.prompt_key] * (1.0 - rates[t.prompt_key]) for t in trajectories}
