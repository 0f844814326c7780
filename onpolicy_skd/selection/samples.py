"""Sample filters, validity before ranking: pure functions that return the kept samples and drops per reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from onpolicy_skd.selection.positions import num_selected
from onpolicy_skd.types import FilterReport, Trajectory

TEACHER_METRICS = frozenset({"kl", "ce_ratio"})  # sample scores that need a teacher forward of all candidates


def validity(
    trajectories: Sequence[Trajectory],
    vocabulary: int,
    drop_truncated: bool = True,
    correctness: str = "any",
    max_tokens: int = 0,
) -> FilterReport:
    """Drop responses that are empty, truncated, hold ids outside the shared vocabulary, or have the wrong correctness.

    ``correctness`` is "any", "right" or "wrong".  Responses that a growing limit cut before ``max_tokens`` tokens do
    not count as truncated.  Raises ValueError if ``correctness`` is not "any" and an answer was not scored.
    """
    kept, reasons = [], Counter[str]()
    for t in trajectories:
        if correctness != "any" and t.correct is None:
            raise ValueError(f"trajectory {t.key} has no correctness, which samples.correctness={correctness} needs")
        if len(t.target_ids) == 0:
            reasons["empty"] += 1
        elif drop_truncated and _truncated(t, max_tokens):
            reasons["truncated"] += 1
        elif t.response_ids.max() >= vocabulary:
            reasons["outside_vocabulary"] += 1
        elif correctness != "any" and t.correct != (correctness == "right"):
            reasons["right" if t.correct else "wrong"] += 1
        else:
            kept.append(t.key)
    truncated = [_truncated(t, max_tokens) for t in trajectories if t.policy_version is not None]
    return FilterReport(kept, len(trajectories), dict(reasons), len(truncated), sum(truncated))


def _truncated(t: Trajectory, max_tokens: int) -> bool:
    return t.finish_reason == "length" and len(t.response_ids) >= max_tokens


def top_share(scores: Sequence[float], share: float) -> list[int]:
    """Return the ascending indices of the ceil(share * N) highest scores; ties go to the earlier one."""
    highest = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: num_selected(share, len(scores))]
    return sorted(highest)


def paced(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return each trajectory's weight by key: p(1 - p), with p the pass rate of its prompt's rollouts (PACED).

    The weight is 0 if all answers of a prompt are right, or all wrong.  Raises ValueError if one was not scored.
    """
    correct: defaultdict[str, list[bool]] = defaultdict(list)
    for t in trajectories:
        if t.correct is None:
            raise ValueError(f"trajectory {t.key} has no correctness, which samples.weight=paced needs")
        correct[t.prompt_key].append(t.correct)
    rates = {prompt: sum(values) / len(values) for prompt, values in correct.items()}
    return {t.key: rates[t.prompt_key] * (1.0 - rates[t.prompt_key]) for t in trajectories}
