"""Sums over the micro-batches of a step, and the metrics computed from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.learner.micro_batch import MicroBatch
from onpolicy_skd.selection.positions import Selection
from onpolicy_skd.types import Trajectory


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """Metrics of one optimizer step; None where a step has no such number.  Divergences and entropies in nats."""

    loss: float
    divergence_selected: float  # mean over the selected positions
    entropy: float  # the student's, mean over the eligible positions
    entropy_selected: float
    student_logprob: float  # of the sampled tokens
    sampler_gap: float | None = None  # mean |log-probability of the engine - of the learner|, same weights
    sampler_gap_max: float | None = None
    policy_gap: float | None = None  # the same for rollouts of older weights: the effect of the updates since
    entropy_gap: float | None = None  # mean |entropy recorded by the engine - of the learner|
    k: float  # share of positions to select at this step
    samples: int
    positions: int  # eligible
    positions_selected: int
    staleness: float  # optimizer steps since the weights that sampled the tokens, mean over positions
    response_tokens: float  # mean per sample
    train_tokens: int  # prompts and responses
    padding_share: float
    teacher_wait_seconds: float
    teacher_mass: float | None = None  # mean over the eligible positions of the teacher's mass on the student's top K
    overlap: float | None = None  # mean share of the student's top K classes among the teacher's
    reference_kl: float | None = None  # to the initial student, mean over the selected positions
    repetition: float | None = None  # mean share of repeated n-grams in the student's responses
    teacher_ending: float | None = None  # the teacher's mean probability of the student's end-of-sequence tokens
    arm: int | None = None  # index of the bandit's arm
    probe_divergence: float | None = None
    reward: float | None = None
    update_changed: float | None = None  # share of weights whose value in the compute dtype the update changed
    update_visible: float | None = None  # size of the update in the compute dtype over its size in float32
    loss_scale: float | None = None  # of this step; float16 only
    overflows: int | None = None  # steps skipped so far because a float16 gradient overflowed
    grad_norm: float = 0.0
    lr: float = 0.0
    learner_seconds: float = 0.0
    learner_memory_mib: float | None = None  # peak of the learner's process
    version: int = 0  # optimizer steps done, this one included
    divergence_by_teacher: dict[str, float] = field(default_factory=dict)  # with several teachers: mean per teacher

    def as_dict(self) -> dict[str, float]:
        """Return the metrics by name, without those that are None, and ``divergence_selected/NAME`` of each teacher."""
        fields = dataclasses.asdict(self)
        by_teacher = {f"divergence_selected/{t}": value for t, value in fields.pop("divergence_by_teacher").items()}
        return {name: value for name, value in fields.items() if value is not None} | by_teacher


@dataclass(slots=True)
class StepSums:
    """Sums over micro-batches, trajectories or positions of a step; ``StepSums.merge`` adds those of all ranks."""

    loss: float = 0.0
    divergence: float = 0.0  # over selected positions
    reference_kl: float = 0.0  # over selected positions
    tokens: int = 0
    padded_tokens: int = 0
    positions: int = 0
    selected: int = 0
    samples: int = 0
    teacher_wait_seconds: float = 0.0
    gap: float = 0.0
    gap_positions: int = 0
    policy_gap: float = 0.0
    policy_gap_positions: int = 0
    entropy_gap: float = 0.0
    entropy_gap_positions: int = 0
    staleness: float = 0.0
    entropy: float = 0.0
    entropy_selected: float = 0.0
    student_logprob: float = 0.0
    teacher_mass: float = 0.0
    overlap: float = 0.0
    signal_positions: int = 0  # where teacher_mass and overlap were measured
    gap_max: float = 0.0
    by_teacher: dict[str, tuple[float, int]] = field(default_factory=dict)  # of several teachers: divergence, positions
    scores: dict[str, Tensor] = field(default_factory=dict)  # position scores by trajectory
    non_finite: list[str] = field(default_factory=list)  # trajectories with a divergence that is not finite

    @classmethod
    def merge(cls, shares: Sequence[StepSums]) -> StepSums:
        """Return the sum of ``shares``, the sums of all ranks or of several batches."""
        merged = cls(gap_max=max(share.gap_max for share in shares))
        for share in shares:
            for name in SUMMED:
                setattr(merged, name, getattr(merged, name) + getattr(share, name))
            for teacher, (divergence, selected) in share.by_teacher.items():
                merged.add_to_teacher(teacher, divergence, selected)
            merged.scores |= share.scores
            merged.non_finite += share.non_finite
        return merged

    def add_to_teacher(self, teacher: str, divergence: float, selected: int) -> None:
        """Add the sum of the divergences from ``teacher`` at ``selected`` positions."""
        before = self.by_teacher.get(teacher, (0.0, 0))
        self.by_teacher[teacher] = (before[0] + divergence, before[1] + selected)

    @torch.no_grad()
    def add_student_statistics(self, micro: MicroBatch, selection: Selection, version: int) -> None:
        """Add the student's entropies and log-probabilities, and their distance from the sampler's.

        They come from the pass over all positions if there was one; otherwise from the loss at the selected positions
        and from the engine's records at the others.
        """
        selected_K, count = selection.indices_K, len(micro.batch.targets)
        only_loss = micro.recorded or len(selected_K) == count
        if micro.loss_statistics and not micro.has_statistics and only_loss:
            indices, stats = micro.loss_statistics
            entropy_K = stats.entropy_N
        else:
            indices, stats = torch.arange(count, device=selected_K.device), micro.statistics
            entropy_K = stats.entropy_N[selected_K]
        entropy_N, logprob_N = stats.entropy_N, stats.raw_logprob_N
        if micro.recorded and len(indices) < count:
            entropy_N, logprob_N = micro.recorded
        if micro.recorded:
            self.entropy_gap += float((micro.recorded[0][indices] - stats.entropy_N).abs().sum())
            self.entropy_gap_positions += len(indices)
        self._add_gaps(micro, indices, stats.raw_logprob_N, version)
        self.entropy += float(entropy_N.sum())
        self.entropy_selected += float(entropy_K.sum())
        self.student_logprob += float(logprob_N.sum())

    def add_teacher_signals(self, micro: MicroBatch) -> None:
        """Add the agreement of student and teacher at all positions."""
        self.teacher_mass += float(micro.teacher_signals.teacher_mass_N.sum())
        self.overlap += float(micro.teacher_signals.overlap_N.sum())
        self.signal_positions += len(micro.teacher_signals.overlap_N)

    def _add_gaps(self, micro: MicroBatch, indices: Tensor, logprob: Tensor, version: int) -> None:
        """Add the distance of the sampler's log-probabilities from ``logprob``, the learner's at ``indices``."""
        age_N = torch.cat([torch.full((len(t.target_ids),), _age(t, version)) for t in micro.members])
        age_N = age_N.to(indices.device)
        sampler_N = torch.from_numpy(np.concatenate([t.sampler_logprobs for t in micro.members])).to(indices.device)
        difference, age = (sampler_N[indices] - logprob).abs(), age_N[indices]
        gap, policy_gap = difference[age == 0], difference[age > 0]
        self.gap_max = max(self.gap_max, gap.max().item() if len(gap) else 0.0)
        self.gap += float(gap.sum())
        self.gap_positions += len(gap)
        self.policy_gap += float(policy_gap.sum())
        self.policy_gap_positions += len(policy_gap)
        self.staleness += float(age_N.clamp(min=0).sum())

    def record(self, k: float) -> StepRecord:
        """Return the metrics of the step; ``k``: the share of positions at this step."""
        selected = max(1.0, self.selected)
        return StepRecord(
            loss=self.loss,
            divergence_selected=self.divergence / selected,
            entropy=self.entropy / self.positions,
            entropy_selected=self.entropy_selected / selected,
            student_logprob=self.student_logprob / self.positions,
            sampler_gap=self.gap / self.gap_positions if self.gap_positions else None,
            sampler_gap_max=self.gap_max if self.gap_positions else None,
            policy_gap=self.policy_gap / self.policy_gap_positions if self.policy_gap_positions else None,
            entropy_gap=self.entropy_gap / self.entropy_gap_positions if self.entropy_gap_positions else None,
            teacher_mass=self.teacher_mass / self.signal_positions if self.signal_positions else None,
            overlap=self.overlap / self.signal_positions if self.signal_positions else None,
            k=k,
            samples=self.samples,
            positions=self.positions,
            positions_selected=self.selected,
            staleness=self.staleness / self.positions,
            response_tokens=self.positions / self.samples,
            train_tokens=self.tokens,
            padding_share=1.0 - self.tokens / self.padded_tokens,
            teacher_wait_seconds=self.teacher_wait_seconds,
            divergence_by_teacher={name: d / max(1, n) for name, (d, n) in sorted(self.by_teacher.items())},
        )


NOT_SUMMED = ("gap_max", "by_teacher", "scores", "non_finite")
SUMMED = [f.name for f in dataclasses.fields(StepSums) if f.name not in NOT_SUMMED]


def _age(t: Trajectory, version: int) -> int:
    """Return the optimizer steps since the weights that sampled ``t``; -1 if the student did not."""
    return -1 if t.policy_version is None else version - t.policy_version
