"""Several teachers as one: each trajectory is scored by the teacher that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from onpolicy_skd.config.schema import ClassSettings
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.teacher.teacher import RowRequest, TeacherRows
from onpolicy_skd.types import Trajectory

TeacherT = TypeVar("TeacherT", bound=TeacherRows)


class RoutedTeachers(Generic[TeacherT]):
    """TeacherRows over teachers by name, whose hidden states may differ in size.

    ``rows`` and ``classes`` raise ValueError unless all trajectories have the same teacher.  ``head`` always raises it:
    ask the teacher that ``teacher_of`` returns.
    """

    def __init__(self, teachers: Mapping[str, TeacherT]) -> None:
        self.teachers = dict(teachers)
        self._names: dict[str, str] = {}  # teacher by key of the encoded trajectory
        self._counts: dict[str, int] = {}  # eligible positions by key

    def members(self, name: str, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Return the trajectories of teacher ``name`` and record them as encoded."""
        members = [t for t in trajectories if t.teacher == name]
        self._names |= {t.key: name for t in members}
        self._counts |= {t.key: len(t.target_ids) for t in members}
        return members

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        for name, teacher in self.teachers.items():
            if members := self.members(name, trajectories):
                teacher.encode(members)

    def head(self) -> LMHead:
        raise ValueError("several teachers have no common LM head; ask the teacher of a trajectory for its head")

    def rows(self, request: RowRequest) -> Tensor:
        return self._only([key for key, _ in request]).rows(request)

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        values: dict[str, tuple[Tensor, Tensor]] = {}
        for name, teacher in self.teachers.items():
            asked = [key for key in keys if self._name(key) == name]
            if asked:
                counts = [self._counts[key] for key in asked]
                entropy, logprob = (v.split(counts) for v in teacher.entropy_and_logprob(asked))
                values |= zip(asked, zip(entropy, logprob, strict=True), strict=True)
        return torch.cat([values[key][0] for key in keys]), torch.cat([values[key][1] for key in keys])

    def classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        return self._only([key for key, _ in request]).classes(request, seeds, options)

    def release(self, keys: Sequence[str]) -> None:
        for name, teacher in self.teachers.items():
            if members := [key for key in keys if self._names.get(key) == name]:
                teacher.release(members)
        self.drop(keys)

    def drop(self, keys: Sequence[str]) -> None:
        """Remove the records of ``keys`` here, without releasing them at the teachers."""
        for key in keys:
            self._names.pop(key, None)
            self._counts.pop(key, None)

    def _name(self, key: str) -> str:
        if key not in self._names:
            raise KeyError(f"trajectory {key} has not been encoded by a teacher, or was released")
        return self._names[key]

    def _only(self, keys: Sequence[str]) -> TeacherT:
        names = {self._name(key) for key in keys}
        if len(names) != 1:
            raise ValueError(f"rows of {len(names)} teachers asked for at once; accepted: those of one teacher")
        return self.teachers[names.pop()]


def teacher_of(teacher: TeacherRows, members: Sequence[Trajectory]) -> TeacherRows:
    """Return the teacher of ``members``, which must all name the same one."""
    return teacher.teachers[str(members[0].teacher)] if isinstance(teacher, RoutedTeachers) else teacher


def by_teacher(indices: Sequence[int], trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Group ``indices`` by the teacher that their trajectories name, in the order of the names."""
    names = sorted({trajectories[i].teacher or "" for i in indices})
    return [[i for i in indices if (trajectories[i].teacher or "") == name] for name in names]
