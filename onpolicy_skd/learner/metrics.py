"""What a step's micro-batches add up to, and the metrics that are formed of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.learner.micro_batch import MicroBatch
from onpolicy_skd.selection.positions import Selection
from onpolicy_skd.types import Trajectory


@dataclass
class Totals:
    """Sums over the micro-batches of a step, from which its metrics are formed."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    gap_max: float = 0.0
    scores: dict[str, Tensor] = field(default_factory=dict)  # of each trajectory's positions
    unsound: list[str] = field(default_factory=list)  # trajectories with a value that is not finite

    @classmethod
    def of(cls, parts: Sequence[Totals]) -> Totals:
        found = cls(gap_max=max(part.gap_max for part in parts))
        for part in parts:
            found.add(**part.sums)
            found.scores |= part.scores
            found.unsound += part.unsound
        return found

    def add(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.sums[name] += float(value)

    @torch.no_grad()
    def compare(self, micro: MicroBatch, chosen: Selection, version: int) -> None:
        """Student statistics of the micro-batch, and how far the sampler's own are from them.

        Of all positions where a pass was made over all of them; else of those that the loss has passed over, and of
        the others what the engine recorded.
        """
        selected_K, count = chosen.indices_K, len(micro.batch.targets)
        if micro.observed and not micro.measured and (micro.sampled or len(selected_K) == count):
            at, found = micro.observed
            entropy_K = found.entropy_N
        else:
            at, found = torch.arange(count, device=selected_K.device), micro.statistics
            entropy_K = found.entropy_N[selected_K]
        entropy_N, logprob_N = found.entropy_N, found.raw_logprob_N
        if micro.sampled and len(at) < count:
            entropy_N, logprob_N = micro.sampled
        age_N = torch.cat([torch.full((len(t.response_ids),), _age(t, version)) for t in micro.members]).to(at.device)
        sampled_N = torch.from_numpy(np.concatenate([t.sampler_logprobs for t in micro.members]))
        difference, age = (sampled_N.to(at.device)[at] - found.raw_logprob_N).abs(), age_N[at]
        gap, policy_gap = difference[age == 0], difference[age > 0]
        self.gap_max = max(self.gap_max, gap.max().item() if len(gap) else 0.0)
        self.add(
            gap=gap.sum(),
            gap_positions=len(gap),
            policy_gap=policy_gap.sum(),
            policy_gap_positions=len(policy_gap),
            staleness=age_N.clamp(min=0).sum(),
            entropy=entropy_N.sum(),
            entropy_selected=entropy_K.sum(),
            student_logprob=logprob_N.sum(),
        )
        if micro.sampled:
            self.add(entropy_gap=(micro.sampled[0][at] - found.entropy_N).abs().sum())

    def summary(self, k: float) -> dict[str, float]:
        """Metrics of the step; ``k``: the share in force."""
        s = self.sums
        selected = max(1.0, s["selected"])
        sampled = s["gap_positions"]
        gap = {"sampler_gap": s["gap"] / sampled, "sampler_gap_max": self.gap_max} if sampled else {}
        if stale := s["policy_gap_positions"]:
            gap["policy_gap"] = s["policy_gap"] / stale  # what one update changed, not an error of the engine's
        if "entropy_gap" in s:
            gap["entropy_gap"] = s["entropy_gap"] / (sampled + stale)
        return {
            "loss": s["loss"],
            "divergence_selected": s["divergence"] / selected,
            "entropy": s["entropy"] / s["positions"],
            "entropy_selected": s["entropy_selected"] / selected,
            "student_logprob": s["student_logprob"] / s["positions"],
            **gap,
            "k": k,
            "samples": s["samples"],
            "positions": s["positions"],
            "positions_selected": s["selected"],
            "staleness": s["staleness"] / s["positions"],
            "response_tokens": s["positions"] / s["samples"],
            "train_tokens": s["tokens"],
            "padding_share": 1.0 - s["tokens"] / s["padded_tokens"],
            "teacher_wait_seconds": s["teacher_wait_seconds"],
        }


def _age(t: Trajectory, version: int) -> int:
    """Optimizer steps since the weights that sampled it; -1 if the student did not."""
    return -1 if t.policy_version is None else version - t.policy_version
