"""The learner as an actor."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from actors.cluster import Refusal
from actors.faults import Place, place
from actors.teacher import RemoteTeacher, build_teacher, split_for
from actors.transport import Packed, pack_named
from onpolicy_skd import checkpoint
from onpolicy_skd.cached_teacher import open_teacher
from onpolicy_skd.config import AlignmentSettings, Settings
from onpolicy_skd.exact_match import judged
from onpolicy_skd.inspection import Inspection
from onpolicy_skd.learner import Learner, learner_threads
from onpolicy_skd.models import load_model, load_tokenizer, pick_device, pick_dtype
from onpolicy_skd.rollout import TransformersEngine
from onpolicy_skd.teacher import NoTeacher, TeacherRows
from onpolicy_skd.timeline import Span
from onpolicy_skd.trajectory import (
    FilterReport,
    RolloutRequest,
    Sampling,
    Trajectory,
    packed_trajectories,
    unpacked_trajectories,
)


@ray.remote
class LearnerActor:
    """Owns the student, and the teacher too with ``teacher.placement=learner`` or a cache of its outputs."""

    def __init__(
        self,
        settings: Settings,
        vocabulary: int,
        steps: int,
        teacher: ActorHandle | None = None,
        ranks_only: bool = False,
    ) -> None:
        """``ranks_only``: only ``rank`` will be called, which may need no teacher."""
        with Refusal() as self._refusal:
            self._start(settings, vocabulary, steps, teacher, ranks_only)

    def _start(
        self, settings: Settings, vocabulary: int, steps: int, teacher: ActorHandle | None, ranks_only: bool
    ) -> None:
        own = settings.student
        device = pick_device(settings.run.device)
        if device == "cpu":  # one core is left to the teacher, which works at the same time
            torch.set_num_threads(learner_threads(settings.learner))
        self._settings = settings
        self._tokenizer = load_tokenizer(own.model, own.trust_remote_code)
        pad_id = self._tokenizer.pad_token_id
        model = load_model(own.model, torch.float32, device, own.trust_remote_code)
        student = split_for(settings, model, vocabulary, pad_id)
        if ranks_only:  # no variant of the loss, which may ask for the teacher's head at once
            settings = settings.model_copy(update={"alignment": AlignmentSettings()})
        self._teacher: TeacherRows
        if teacher is not None:
            self._teacher = RemoteTeacher(teacher, device)
        elif ranks_only:
            self._teacher = NoTeacher()
        elif settings.cache.path is not None:
            self._teacher = open_teacher(settings, device)
        else:
            self._teacher = build_teacher(settings, vocabulary, pad_id)
        self._learner = Learner(student, self._teacher, settings, pad_id, steps)
        self._engine: TransformersEngine | None = None
        if settings.rollout.placement == "learner":
            self._engine = TransformersEngine(own.model, settings, own.trust_remote_code, student)

    def ready(self) -> Place:
        self._refusal.repeat()
        return place()

    def use_teacher(self, teacher: ActorHandle) -> None:
        """Another actor of the same teacher from now on."""
        if isinstance(self._teacher, RemoteTeacher):
            self._teacher.replace(teacher)

    def drain(self) -> list[Span]:
        return self._learner.spans.drain()

    def version(self) -> int:
        return self._learner.version

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
        """As a rollout actor, with ``rollout.placement=learner``."""
        if self._engine is None:
            raise RuntimeError("rollout.placement=actor: this learner has no engine")
        self._engine.load_weights((), self._learner.version)
        with self._learner.spans("generate"):
            return judged(self._engine.generate(requests, sampling), requests, self._tokenizer)

    def filter(self, *parts: Sequence[Trajectory]) -> tuple[FilterReport, list[Trajectory]]:
        """The report for the driver and the kept trajectories, which stay in the object store."""
        with self._learner.spans("filter"):
            return self._learner.filter([t for part in parts for t in part])

    def step(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> dict[str, float]:
        self._expect(trajectories, encoded)
        try:
            found = self._learner.step(trajectories)
            return found | {"learner_memory_mib": peak_memory_mib(), "version": self._learner.version}
        finally:
            self._release(trajectories)

    def inspect(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> list[Inspection]:
        self._expect(trajectories, encoded)
        try:
            return self._learner.inspect(trajectories)
        finally:
            self._release(trajectories)

    def rank(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return self._learner.rank(trajectories)

    def weights(self) -> dict[str, Packed]:
        device = pick_device(self._settings.run.device)
        with self._learner.spans("pack weights"):
            return pack_named(self._learner.weights(pick_dtype(self._settings.rollout.dtype, device)))

    def save(
        self, folder: Path, step: int, version: int, state: dict[str, Any], keep: int, *ahead: Sequence[Trajectory]
    ) -> Path:
        """``ahead``: rollouts of ``step`` that were made before it, by weights that will be gone."""
        if self._learner.version != version:
            made = f"the learner is at policy version {self._learner.version}, not {version}"
            raise checkpoint.SaveError(f"no checkpoint of step {step}: {made}")
        records, tensors = packed_trajectories([t for part in ahead for t in part])
        state = state | {"version": self._learner.version, "ahead": records}
        return checkpoint.save(folder, step, state, self._learner.tensors() | tensors, keep)

    def restore(self, path: Path) -> tuple[int, list[Trajectory]]:
        """The policy version, and the rollouts of the next step that were made ahead."""
        loaded = checkpoint.load(path)
        ahead = unpacked_trajectories(loaded.state.get("ahead", []), loaded.tensors)
        self._learner.restore(loaded.tensors, loaded.state["version"])
        return self._learner.version, ahead

    def save_pretrained(self, folder: Path) -> None:
        self._learner.save_pretrained(folder, self._tokenizer)

    def _expect(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> None:
        if isinstance(self._teacher, RemoteTeacher):
            self._teacher.expect(encoded[0])
        else:
            self._teacher.encode(trajectories)

    def _release(self, trajectories: Sequence[Trajectory]) -> None:
        if not isinstance(self._teacher, RemoteTeacher):
            self._teacher.release([t.key for t in trajectories])


def peak_memory_mib() -> float:
    """Most memory that this process ever had: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
