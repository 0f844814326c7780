"""One forward of the student, and what the teacher knows of the same positions, fetched when it is first asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
from onpolicy_skd.models.batch import Batch
from onpolicy_skd.models.lm_head import RowStatistics
from onpolicy_skd.selection.metrics import LEAST_CE, Ranges, Signals
from onpolicy_skd.selection.positions import Selection
from onpolicy_skd.teacher.teacher import RowRequest, TeacherRows
from onpolicy_skd.tracing import Spans
from onpolicy_skd.types import Trajectory

T = TypeVar("T")


class MicroBatch:
    """N eligible positions of the sequences ``members``; ``seeds``: one per sequence, for what is drawn."""

    def __init__(
        self,
        members: Sequence[Trajectory],
        batch: Batch,
        embedded_BLH: Tensor | None,
        hidden_NH: Tensor,
        head_VH: Tensor,
        measure: Callable[[], RowStatistics],
        teacher: TeacherRows,
        alignment: Alignment,
        seeds: Sequence[int],
        spans: Spans,
    ) -> None:
        self.members = members
        self.batch = batch
        self.embedded_BLH = embedded_BLH  # a leaf of the graph, where the backbone started from one
        self.hidden_NH = hidden_NH
        self.head_VH = head_VH
        self.observed: tuple[Tensor, RowStatistics] | None = None  # rows [K] the loss has passed over, and theirs
        self.teacher = teacher
        self.seeds = seeds
        self.waited = 0.0  # seconds spent on the teacher
        self._measure = measure
        self._spans = spans
        self._alignment = alignment
        self._all_rows_NG: Tensor | None = None  # once the teacher's rows at all positions were fetched

    @property
    def keys(self) -> list[str]:
        return [t.key for t in self.members]

    @cached_property
    def statistics(self) -> RowStatistics:
        """Of all N positions: a pass over the LM head."""
        return self._measure()

    @property
    def measured(self) -> bool:
        """Whether that pass was made."""
        return "statistics" in self.__dict__

    @cached_property
    def sampled(self) -> tuple[Tensor, Tensor] | None:
        """Entropy and log-probability of the target at all N positions as the engines recorded them, if they did."""
        entropies = [t.sampler_entropy for t in self.members]
        if any(e is None for e in entropies):
            return None
        device = self.hidden_NH.device
        logprobs = np.concatenate([t.sampler_logprobs for t in self.members])
        return torch.from_numpy(np.concatenate(entropies)).to(device), torch.from_numpy(logprobs).to(device)  # type: ignore[arg-type]

    def _student(self) -> tuple[Tensor, Tensor]:
        if self.sampled:
            return self.sampled[0], -self.sampled[1]
        return self.statistics.entropy_N, -self.statistics.logprob_N

    def signals(self, ranges: Ranges | None = None) -> Signals:
        """What position scores are made of."""
        return Signals(
            self._student,
            self.batch.counts,
            self.seeds,
            lambda: self.entropy_and_logprob,
            self.divergence,
            ranges,
            self.hidden_NH.device,
        )

    @cached_property
    def entropy_and_logprob(self) -> tuple[Tensor, Tensor]:
        """The teacher's entropy and log-probability of the target at all N positions, nats."""
        entropy_N, logprob_N = self._timed(lambda: self.teacher.entropy_and_logprob(self.keys))
        return entropy_N.to(self.hidden_NH.device), logprob_N.to(self.hidden_NH.device)

    def rows(self, chosen: Selection) -> HiddenRows:
        """The teacher at the chosen positions; only these cross the wire, unless all have done so already."""
        if self._all_rows_NG is not None:
            return HiddenRows(self._all_rows_NG[chosen.indices_K], self.teacher.head())
        return HiddenRows(self._fetch(self.wanted(chosen)), self.teacher.head())

    def wanted(self, chosen: Selection) -> RowRequest:
        """The chosen positions by trajectory, counted from each response's start."""
        counts = torch.tensor(self.batch.counts)
        starts = counts.cumsum(0) - counts
        parts = chosen.indices_K.cpu().split(chosen.counts)
        return [(key, (part - start).tolist()) for key, part, start in zip(self.keys, parts, starts, strict=True)]

    @torch.no_grad()
    def divergence(self, kind: str, rows_NG: Tensor | None = None) -> Tensor:
        """``kind`` between student and teacher at all N positions, float32, nats; ``rows_NG`` if they are known."""
        if rows_NG is None:
            if self._all_rows_NG is None:
                self._all_rows_NG = self._fetch([(t.key, range(len(t.response_ids))) for t in self.members])
            rows_NG = self._all_rows_NG
        targets = self.batch.targets
        rows = Rows(torch.ones(len(targets), device=targets.device), targets)
        teacher = HiddenRows(rows_NG, self.teacher.head())
        alignment = dataclasses.replace(self._alignment, divergence=kind, kd_weight=1.0, estimator="exact")
        return distillation_loss(self.hidden_NH.detach(), self.head_VH.detach(), teacher, rows, alignment)[1]

    def split(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """By sequence."""
        return values_N.split(self.batch.counts)

    def means(self, values_N: Tensor) -> list[Tensor]:
        return [part.mean() for part in self.split(values_N)]

    def _fetch(self, wanted: RowRequest) -> Tensor:
        return self._timed(lambda: self.teacher.rows(wanted)).to(self.hidden_NH.device)

    def _timed(self, ask: Callable[[], T]) -> T:
        started = time.perf_counter()
        with self._spans("wait for teacher"):
            answer = ask()
        self.waited += time.perf_counter() - started
        return answer


def _ce_ratio(micro: MicroBatch) -> list[Tensor]:
    signals = micro.signals()
    student, teacher = micro.means(signals.ce_N), micro.means(signals.teacher_ce_N)
    return [s / t.clamp(min=LEAST_CE) for s, t in zip(student, teacher, strict=True)]


SampleScore = Callable[[MicroBatch], Sequence[Tensor]]  # one value per sequence

SAMPLE_SCORES: dict[str, SampleScore] = {
    "student_entropy": lambda micro: micro.means(micro.statistics.entropy_N),
    "kl": lambda micro: micro.means(micro.signals().kl_N),
    "ce_ratio": _ce_ratio,  # of the two sequence means, not the mean of ratios (DA-KD)
}
