"""A forward of the student on a few trajectories, from hidden states to selected positions.

Entropies pass through ``statistics`` (one pass over the LM head) -> ``entropy_and_ce`` -> ``signals`` ->
``select_positions``.  The teacher's values at the same positions are fetched when they are first read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config.schema import ClassSettings
from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.loss.teacher_signals import TeacherSignals, teacher_signals
from onpolicy_skd.models.batch import Batch
from onpolicy_skd.models.lm_head import LMHead, RowStatistics, row_statistics
from onpolicy_skd.selection.metrics import Ranges, Signals
from onpolicy_skd.selection.positions import Selection
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.teacher.teacher import RowRequest, TeacherRows
from onpolicy_skd.tracing import Spans
from onpolicy_skd.types import Trajectory, seed_of

T = TypeVar("T")


class MicroBatch:
    """The N eligible positions of the sequences ``members``; ``seeds``: one per sequence, for random selection."""

    def __init__(
        self,
        members: Sequence[Trajectory],
        batch: Batch,
        embedded_BLH: Tensor | None,
        hidden_NH: Tensor,
        head: LMHead,
        teacher: TeacherRows,
        alignment: Alignment,
        seeds: Sequence[int],
        spans: Spans,
        top_classes: int,
    ) -> None:
        self.members = members
        self.batch = batch
        self.embedded_BLH = embedded_BLH  # a leaf of the graph; None if the backbone started from token ids
        self.hidden_NH = hidden_NH
        self.head = head
        self.teacher = teacher
        self.alignment = alignment
        self.seeds = seeds
        self.loss_statistics: tuple[Tensor, RowStatistics] | None = None  # indices [K] and statistics, set by the loss
        self.reference_kl_K: Tensor | None = None  # reverse KL to the initial student, set by the loss
        self.teacher_wait_seconds = 0.0
        self._spans = spans
        self._top_classes = top_classes  # K of the signals over the student's most likely classes
        self._all_rows_NG: Tensor | None = None  # the teacher's rows at all positions, once fetched

    @property
    def keys(self) -> list[str]:
        return [t.key for t in self.members]

    # -- the entropies and the selection ---------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> RowStatistics:
        """The student's statistics at all N positions, by a pass over the LM head without gradient."""
        hidden_NH, head = self.hidden_NH.detach(), self.head.detach()
        temperature, chunk_rows = self.alignment.temperature, self.alignment.chunk_rows
        with self._spans("entropy"):
            return row_statistics(hidden_NH, head, self.batch.targets, temperature, chunk_rows)

    @property
    def has_statistics(self) -> bool:
        """True once ``statistics`` has been computed."""
        return "statistics" in self.__dict__

    @cached_property
    def recorded(self) -> tuple[Tensor, Tensor] | None:
        """Entropies and target log-probabilities at all N positions as the engines recorded them, or None."""
        values, device = recorded_by_engines(self.members), self.hidden_NH.device
        return values and (values[0].to(device), values[1].to(device))

    def entropy_and_ce(self) -> tuple[Tensor, Tensor]:
        """Return H(q_t) and -log q_t(y_t) ``[N]``, nats: recorded by the engines, else from ``statistics``."""
        if self.recorded:
            return self.recorded[0], -self.recorded[1]
        return self.statistics.entropy_N, -self.statistics.logprob_N

    def signals(self, ranges: Ranges | None = None) -> Signals:
        """Return the inputs of position scores, computed when they are first read."""
        return Signals(
            self.entropy_and_ce,
            self.batch.counts,
            self.seeds,
            lambda: self.entropy_and_logprob,
            lambda: self.teacher_signals,
            ranges,
            self.hidden_NH.device,
            self.batch.targets,
        )

    def select_positions(self, selector: Selector, step: int, ranges: Ranges | None) -> tuple[Tensor, Selection]:
        """Return the scores ``[N]`` at ``step`` and the positions that they select."""
        return selector.select(self.signals(ranges), step)

    # -- the teacher -----------------------------------------------------------------------------------------------

    @cached_property
    def entropy_and_logprob(self) -> tuple[Tensor, Tensor]:
        """The teacher's entropy and log-probability of the target at all N positions, nats."""
        entropy_N, logprob_N = self._timed(lambda: self.teacher.entropy_and_logprob(self.keys))
        return entropy_N.to(self.hidden_NH.device), logprob_N.to(self.hidden_NH.device)

    @cached_property
    def teacher_signals(self) -> TeacherSignals:
        """Signals that compare both distributions at all N positions, by a pass over both heads without gradient."""
        cfg, teacher = self.alignment, HiddenRows(self._all_rows(), self.teacher.head())
        hidden_NH, head = self.hidden_NH.detach(), self.head.detach()
        with self._spans("teacher signals"):
            return teacher_signals(hidden_NH, head, teacher, self._top_classes, cfg.temperature, cfg.chunk_rows)

    def rows(self, selection: Selection) -> HiddenRows:
        """Return the teacher's rows at the selected positions; only these are transferred, unless all were before."""
        if self._all_rows_NG is not None:
            return HiddenRows(self._all_rows_NG[selection.indices_K], self.teacher.head())
        return HiddenRows(self._fetch(row_request(self.members, selection)), self.teacher.head())

    def classes(self, selection: Selection, cfg: ClassSettings) -> SparseTargets:
        """Return the teacher's sparse targets at the selected positions."""
        request, seeds = row_request(self.members, selection), class_seeds(self.seeds)
        return self._timed(lambda: self.teacher.classes(request, seeds, cfg)).to(self.hidden_NH.device)

    @torch.no_grad()
    def divergence(self, kind: str, rows_NG: Tensor | None = None) -> Tensor:
        """Return ``kind`` between student and teacher at all N positions, float32, nats.

        ``rows_NG``: the teacher's hidden states, if the caller has them already.
        """
        rows_NG = self._all_rows() if rows_NG is None else rows_NG
        targets = self.batch.targets
        rows = Rows(torch.ones(len(targets), device=targets.device), targets)
        teacher = HiddenRows(rows_NG, self.teacher.head())
        hidden_NH, head = self.hidden_NH.detach(), self.head.detach()
        return distillation_loss(hidden_NH, head, teacher, rows, self.alignment.exact(kind))[1]

    def split(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """Split values by sequence."""
        return values_N.split(self.batch.counts)

    def means(self, values_N: Tensor) -> list[Tensor]:
        """Return the mean of each sequence."""
        return [values_n.mean() for values_n in self.split(values_N)]

    def _all_rows(self) -> Tensor:
        """Return the teacher's hidden states at all N positions ``[N, G]``, fetched once."""
        if self._all_rows_NG is None:
            self._all_rows_NG = self._fetch(all_positions(self.members))
        return self._all_rows_NG

    def _fetch(self, request: RowRequest) -> Tensor:
        return self._timed(lambda: self.teacher.rows(request)).to(self.hidden_NH.device)

    def _timed(self, fetch: Callable[[], T]) -> T:
        start = time.perf_counter()
        with self._spans("wait for teacher"):
            answer = fetch()
        self.teacher_wait_seconds += time.perf_counter() - start
        return answer


# -- what is known of a micro-batch before its forward -------------------------------------------------------------


def recorded_by_engines(members: Sequence[Trajectory]) -> tuple[Tensor, Tensor] | None:
    """Return entropies and target log-probabilities ``[N]`` as the engines recorded them; None unless all did."""
    entropies = [t.sampler_entropy for t in members]
    if any(e is None for e in entropies):
        return None
    logprobs = np.concatenate([t.sampler_logprobs for t in members])
    return torch.from_numpy(np.concatenate(entropies)), torch.from_numpy(logprobs)  # type: ignore[arg-type]


def position_seeds(seed: int, version: int, members: Sequence[Trajectory]) -> list[int]:
    """Return the seed of each sequence's random selection at policy ``version``."""
    return [seed_of(seed, version, "positions", t.key) for t in members]


def class_seeds(seeds: Sequence[int]) -> list[int]:
    """Return the seed of each sequence's sampled classes; ``seeds``: those of its selection."""
    return [seed_of(seed, "classes") for seed in seeds]


def row_request(members: Sequence[Trajectory], selection: Selection) -> RowRequest:
    """Return the selected positions by trajectory, counted from each response's start."""
    counts = torch.tensor([len(t.target_ids) for t in members])
    starts = counts.cumsum(0) - counts
    indices = selection.indices_K.cpu().split(selection.counts)
    return [(t.key, (i - start).tolist()) for t, i, start in zip(members, indices, starts, strict=True)]


def all_positions(members: Sequence[Trajectory]) -> RowRequest:
    """Return all N positions by trajectory."""
    return [(t.key, range(len(t.target_ids))) for t in members]
