"""Scores without training: the sample filter, divergences, and diagnostics of positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.diagnostics import PositionDiagnostics
from onpolicy_skd.learner.forward import Forward
from onpolicy_skd.learner.micro_batch import MicroBatch
from onpolicy_skd.learner.state import LearnerState
from onpolicy_skd.selection import samples
from onpolicy_skd.selection.metrics import LEAST_CE, Ranges
from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.types import FilterReport, Trajectory, seed_of


class Scorer:
    """Scorer of samples and positions with the student of ``state`` and the teacher."""

    def __init__(self, state: LearnerState, forward: Forward, teacher: TeacherRows, settings: Settings) -> None:
        self._state = state
        self._forward = forward
        self._teacher = teacher
        self._settings = settings
        self._vocabulary = state.student.vocabulary

    def filter(self, trajectories: Sequence[Trajectory]) -> tuple[FilterReport, list[Trajectory]]:
        """Drop invalid trajectories, then (``samples.when=rollout``) keep the top share by ``samples.metric``.

        Returns the report, with a count of drops per reason, and the kept trajectories with their weights.
        """
        samples_cfg, rollout_cfg = self._settings.samples, self._settings.rollout
        drop_truncated = samples_cfg.truncated == "drop"
        longest = 0 if rollout_cfg.max_tokens_start is None else rollout_cfg.max_tokens
        report = samples.validity(trajectories, self._vocabulary, drop_truncated, samples_cfg.correctness, longest)
        kept_keys = set(report.kept)
        kept = [t for t in trajectories if t.key in kept_keys]
        if samples_cfg.weight == "paced":
            weights = samples.paced(trajectories)
            paced = [dataclasses.replace(t, weight=weights[t.key]) for t in kept if weights[t.key]]
            report.count("no_pace", len(kept) - len(paced))
            kept = paced
        if samples_cfg.keep < 1.0 and samples_cfg.when == "rollout" and kept:
            top = [kept[i] for i in samples.top_share(self._scores(kept), samples_cfg.keep)]
            report.count("not_selected", len(kept) - len(top))
            if samples_cfg.metric in samples.TEACHER_METRICS:
                self._teacher.release(sorted({t.key for t in kept} - {t.key for t in top}))
            kept = top
        report.kept = [t.key for t in kept]
        return report, kept

    def score_samples(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return each sample's score under ``samples.metric``: a mean over its positions (nats), a ratio, or random.

        The score is -inf for samples that the models cannot read: empty ones, or ids outside the shared vocabulary.
        """
        usable = set(samples.validity(trajectories, self._vocabulary, drop_truncated=False).kept)
        valid = [t for t in trajectories if t.key in usable]
        scores = dict(zip((t.key for t in valid), self._scores(valid), strict=True))
        if self._settings.samples.metric in samples.TEACHER_METRICS:
            self._teacher.release(list(usable))
        return [scores.get(t.key, -math.inf) for t in trajectories]

    def _scores(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return the scores of valid samples; if the metric needs the teacher, they stay encoded there."""
        metric, version = self._settings.samples.metric, self._state.version
        if metric == "random":
            seed = self._settings.run.seed
            return [seed_of(seed, version, "sample", t.key) / 2**31 for t in trajectories]
        if metric in samples.TEACHER_METRICS:
            self._teacher.encode(self._forward.ranks.local(trajectories))
        recorded = [t.sampler_entropy for t in trajectories]
        if metric == "student_entropy" and all(e is not None for e in recorded):
            return [float(np.mean(e)) for e in recorded]  # type: ignore[arg-type]
        return self._forward.each(trajectories, version, SAMPLE_SCORES[metric])

    def sampler_gaps(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return each trajectory's mean absolute gap between sampler's and student's log-probabilities, nats."""

        def gaps(micro: MicroBatch) -> list[Tensor]:
            sampled_N = torch.from_numpy(np.concatenate([t.sampler_logprobs for t in micro.members]))
            return micro.means((sampled_N.to(micro.hidden_NH.device) - micro.statistics.raw_logprob_N).abs())

        return self._forward.each(trajectories, self._state.version, gaps)

    def divergence(self, trajectories: Sequence[Trajectory], rows: Mapping[str, Tensor] | None = None) -> float:
        """Return the mean divergence per eligible position, nats; nothing is selected or trained.

        The teacher must have encoded ``trajectories``, or ``rows`` must hold its hidden states ``[n, G]`` by key.
        """
        kind, device = self._settings.alignment.divergence, self._state.student.device

        def totals(micro: MicroBatch) -> list[Tensor]:
            rows_NG = torch.cat([rows[key] for key in micro.keys]).to(device) if rows else None
            return [values_n.sum() for values_n in micro.split(micro.divergence(kind, rows_NG))]

        total = sum(self._forward.each(trajectories, self._state.version, totals))
        return total / sum(len(t.target_ids) for t in trajectories)

    @torch.no_grad()
    def diagnose_positions(self, trajectories: Sequence[Trajectory]) -> list[PositionDiagnostics]:
        """Return entropy, divergence and selection at all eligible positions, in the order of ``trajectories``.

        The teacher must have encoded them.
        """
        kind, version = self._settings.alignment.divergence, self._state.version
        ranges, diagnostics = self.ranges(trajectories), {}
        for group, micro in self._forward.micro_batches(trajectories, version):
            entropy_N, divergence_N = micro.statistics.entropy_N, micro.divergence(kind)
            _, selection = micro.select_positions(self._state.selector, version, ranges)
            selected_N = torch.zeros(len(entropy_N), dtype=torch.bool)
            selected_N[selection.indices_K.cpu()] = True
            by_sequence = (micro.split(values.cpu()) for values in (entropy_N, divergence_N, selected_N))
            for index, *values in zip(group, *by_sequence, strict=True):
                diagnostics[index] = PositionDiagnostics(trajectories[index].key, *(v.numpy() for v in values))
            del micro
        return self._forward.ranks.gather_by_index(diagnostics)

    @torch.no_grad()
    def ranges(self, trajectories: Sequence[Trajectory]) -> Ranges | None:
        """Return (low, high) of each signal that the batch's scores scale, from a separate forward; None if none."""
        version = self._state.version
        names = self._state.selector.ranges(version)
        if not names:
            return None
        local = []
        for _, micro in self._forward.micro_batches(trajectories, version):
            signals = micro.signals()
            eligible_N = self._state.selector.eligible(signals)
            values_RN = torch.stack([getattr(signals, name) for name in names])
            masked_N = torch.zeros_like(values_RN[0], dtype=torch.bool) if eligible_N is None else ~eligible_N
            low_R = values_RN.masked_fill(masked_N, math.inf).amin(1)
            local.append(torch.stack([low_R, values_RN.masked_fill(masked_N, -math.inf).amax(1)], 1).cpu())
            del micro
        bounds_MR2 = torch.stack([bounds for share in self._forward.ranks.gather(local) for bounds in share])
        low_R, high_R = bounds_MR2[..., 0].amin(0).tolist(), bounds_MR2[..., 1].amax(0).tolist()
        return dict(zip(names, zip(low_R, high_R, strict=True), strict=True))


def _ce_ratio(micro: MicroBatch) -> list[Tensor]:
    signals = micro.signals()
    student, teacher = micro.means(signals.ce_N), micro.means(signals.teacher_ce_N)
    return [s / t.clamp(min=LEAST_CE) for s, t in zip(student, teacher, strict=True)]


SAMPLE_SCORES: dict[str, Callable[[MicroBatch], Sequence[Tensor]]] = {  # one value per sequence
    "student_entropy": lambda micro: micro.means(micro.statistics.entropy_N),
    "kl": lambda micro: micro.means(micro.signals().kl_N),
    "ce_ratio": _ce_ratio,  # ratio of the sequence means, not mean of the ratios (DA-KD)
}
