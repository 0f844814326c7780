"""The student's forward over trajectories, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.ranks import Ranks
from onpolicy_skd.learner.micro_batch import MicroBatch, position_seeds
from onpolicy_skd.loss.inputs import Alignment
from onpolicy_skd.models.batch import Batch, collate, micro_batches
from onpolicy_skd.models.loading import pick_dtype
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.teacher.routing import by_teacher, teacher_of
from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.tracing import Spans
from onpolicy_skd.types import Trajectory


class Forward:
    """Forward passes of the student, in ``learner.compute_dtype``, over this rank's share of the trajectories."""

    def __init__(
        self, student: SplitModel, teacher: TeacherRows, settings: Settings, pad_id: int, ranks: Ranks, spans: Spans
    ) -> None:
        self.dtype = pick_dtype(settings.learner.compute_dtype, student.device.type)
        self.ranks = ranks
        self._student = student
        self._teacher = teacher
        self._settings = settings
        self._pad_id = pad_id
        self._spans = spans
        self._alignment = Alignment.from_settings(settings.alignment)

    def micro_batches(self, trajectories: Sequence[Trajectory], version: int) -> Iterator[tuple[list[int], MicroBatch]]:
        """Yield this rank's micro-batches, each with the indices of its members in ``trajectories``.

        Micro-batches record a graph if gradients are enabled.  Delete each one before the next, to free its memory.
        """
        groups_by_rank = self._groups_by_rank(trajectories)
        local_groups = groups_by_rank[self.ranks.rank]
        for group in local_groups:
            yield group, self._micro_batch([trajectories[i] for i in group], version)
        for _ in range(max(map(len, groups_by_rank)) - len(local_groups)):
            self._empty_micro_batch()

    def members(self, trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
        """Return the members of each of this rank's micro-batches, in order."""
        return [[trajectories[i] for i in group] for group in self._groups_by_rank(trajectories)[self.ranks.rank]]

    def _groups_by_rank(self, trajectories: Sequence[Trajectory]) -> list[list[list[int]]]:
        lengths, packing = [t.length for t in trajectories], self._settings.pipeline.packing
        groups_by_rank = []
        for share in self.ranks.shares(lengths):
            groups_by_rank.append([])
            for indices in by_teacher(share, trajectories):  # a micro-batch has one teacher, because LM heads differ
                groups = micro_batches(
                    [lengths[i] for i in indices], self._settings.learner.tokens_per_micro_batch, packing
                )
                groups_by_rank[-1] += [[indices[i] for i in group] for group in groups]
        return groups_by_rank

    def each(
        self, trajectories: Sequence[Trajectory], version: int, score: Callable[[MicroBatch], Sequence[Tensor]]
    ) -> list[float]:
        """Return the scores of all trajectories in order; ``score`` returns one number per member of a micro-batch."""
        scores: dict[int, float] = {}
        with torch.no_grad():
            for group, micro in self.micro_batches(trajectories, version):
                scores |= zip(group, map(float, score(micro)), strict=True)
                del micro
        return self.ranks.gather_by_index(scores)

    def hidden(self, model: SplitModel, batch: Batch, embedded_BLH: Tensor | None = None) -> Tensor:
        """Return the last hidden states ``[N, H]`` of ``model`` in the compute dtype."""
        coarse = self.dtype != torch.float32
        # Autocast's cache would keep a low-precision copy of all weights during the forward.
        with torch.autocast(model.device.type, dtype=self.dtype, enabled=coarse, cache_enabled=False):
            return model.hidden(batch, embedded_BLH).to(self.dtype)

    def _micro_batch(self, members: Sequence[Trajectory], version: int) -> MicroBatch:
        batch = collate(members, self._pad_id, self._student.device, packed=self._settings.pipeline.packing)
        embedded_BLH = self._student.embedded(batch) if torch.is_grad_enabled() else None
        with self._spans("backbone"):
            hidden_NH, head = self.hidden(self._student, batch, embedded_BLH), self._student.head
        return MicroBatch(
            members,
            batch,
            embedded_BLH,
            hidden_NH,
            head,
            teacher_of(self._teacher, members),
            self._alignment.at(version),
            position_seeds(self._settings.run.seed, version, members),
            self._spans,
            self._settings.positions.top_classes,
        )

    def _empty_micro_batch(self) -> None:
        """Run a micro-batch that adds nothing, because ranks with one more need this rank to gather weights."""
        empty = Trajectory("none", np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32), "stop", None)
        hidden = self.hidden(self._student, collate([empty], self._pad_id, self._student.device))
        if torch.is_grad_enabled():
            (0.0 * (hidden.sum() + self._student.head_VH[:1].sum())).backward()
