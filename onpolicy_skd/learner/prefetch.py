"""Requests to a teacher in another process, sent before the micro-batch that needs the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.learner.micro_batch import (
    all_positions,
    class_seeds,
    position_seeds,
    recorded_by_engines,
    row_request,
)
from onpolicy_skd.selection.metrics import Signals
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.teacher.routing import teacher_of
from onpolicy_skd.teacher.teacher import PrefetchingTeacher, TeacherRows
from onpolicy_skd.types import Trajectory


class Prefetcher:
    """Sender of the requests of a step's micro-batches, one micro-batch ahead.

    The positions are selected here on the CPU, and again after the forward.  Only the second selection is used: if the
    two differ, the request has cost time, nothing else.  ``members``: the trajectories of each micro-batch, in order;
    ``all_rows``: each micro-batch reads the teacher's rows at all its positions.
    """

    def __init__(
        self,
        members: Sequence[Sequence[Trajectory]],
        teacher: TeacherRows,
        selector: Selector,
        settings: Settings,
        version: int,
        all_rows: bool,
    ) -> None:
        self._remaining = iter(members)
        self._teacher = teacher
        self._selector = selector
        self._seed = settings.run.seed
        self._classes = settings.classes
        self._version = version
        self._all_rows = all_rows

    def request_next(self) -> None:
        """Request the teacher's rows or classes for the next micro-batch, if its positions are known already."""
        members = next(self._remaining, None)
        teacher = teacher_of(self._teacher, members) if members else None
        if not members or not isinstance(teacher, PrefetchingTeacher):
            return
        if self._all_rows:
            teacher.prefetch_rows(all_positions(members))
            return
        recorded, seeds = recorded_by_engines(members), position_seeds(self._seed, self._version, members)
        signals = _signals(members, seeds, recorded)
        selection = self._selector.preselect(signals, self._version, recorded is not None)
        if selection is None:
            return
        request = row_request(members, selection)
        if self._classes.sampler == "none":
            teacher.prefetch_rows(request)
        else:
            teacher.prefetch_classes(request, class_seeds(seeds), self._classes)


def _signals(members: Sequence[Trajectory], seeds: Sequence[int], recorded: tuple[Tensor, Tensor] | None) -> Signals:
    """Return the inputs of position scores that need neither model."""

    def entropy_and_ce() -> tuple[Tensor, Tensor]:
        if recorded is None:
            raise RuntimeError("no engine has recorded the entropies, and the forward has not run")
        return recorded[0], -recorded[1]

    targets_N = torch.from_numpy(np.concatenate([t.target_ids for t in members]))
    return Signals(entropy_and_ce, [len(t.target_ids) for t in members], seeds, targets_N=targets_N)
