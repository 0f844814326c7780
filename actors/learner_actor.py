"""The learner as an actor."""

from __future__ import annotations

import resource
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from actors.cluster import DeferredInitError
from actors.faults import Place, place
from actors.serialization import Packed, pack_named
from actors.teacher_actor import RemoteTeacher, build_teacher, split_for
from onpolicy_skd.config.schema import AlignmentSettings, Settings
from onpolicy_skd.distributed.ranks import Ranks
from onpolicy_skd.distributed.rendezvous import Rendezvous, init_process_group
from onpolicy_skd.distributed.weight_transfer import Address, Sender, WeightSpec, exported
from onpolicy_skd.evaluation.diagnostics import PositionDiagnostics
from onpolicy_skd.evaluation.exact_match import with_correctness
from onpolicy_skd.learner.learner import Learner, NonFiniteLossError, SamplerGapError
from onpolicy_skd.learner.metrics import StepRecord
from onpolicy_skd.learner.optimizer import learner_threads
from onpolicy_skd.models.loading import load_student, load_tokenizer, pick_device, pick_dtype, saved_dtype
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.rollout.transformers_engine import TransformersEngine
from onpolicy_skd.storage import checkpoint, files
from onpolicy_skd.storage.trajectories import trajectories_from_tensors, trajectories_to_tensors
from onpolicy_skd.teacher.cached_teacher import open_teacher
from onpolicy_skd.teacher.teacher import NoTeacher, TeacherRows
from onpolicy_skd.tracing import Span
from onpolicy_skd.types import FilterReport, RolloutRequest, SamplingParams, Trajectory


@ray.remote
class LearnerActor:
    """Owns the student, or one rank's part of it, and the teacher too with ``teacher.placement=learner`` or a cache.

    With several ranks every call that is not about one process goes to all of them; rank 0's answer counts.
    """

    def __init__(
        self,
        settings: Settings,
        vocabulary: int,
        steps: int,
        teachers: Sequence[ActorHandle] = (),
        rank: int = 0,
        ranks_only: bool = False,
    ) -> None:
        """``ranks_only``: only ``rank`` will be called, which may need no teacher."""
        self._rank, count = rank, 1 if ranks_only else settings.learner.ranks
        self._apart = False
        self._added: list[str] = []  # keys of the step that has begun
        self._sender: Sender | None = None
        self._settings = settings
        self._engine: TransformersEngine | None = None
        with DeferredInitError() as self._init_error:
            student = self._load(vocabulary, teachers, ranks_only, count)
            pad_id = self._tokenizer.pad_token_id
            if ranks_only:  # no variant of the loss, which may ask for the teacher's head at once
                settings = settings.model_copy(update={"alignment": AlignmentSettings()})
            self._build = lambda ranks: Learner(student, self._teacher, settings, pad_id, steps, ranks)
            if count == 1:
                self._learner = self._build(Ranks())
                if settings.rollout.placement == "learner":
                    own = settings.student
                    self._engine = TransformersEngine(own.model, settings, own.trust_remote_code, student)
            elif rank == 0:
                self._meeting = Rendezvous(ray.util.get_node_ip_address())

    def _load(self, vocabulary: int, teachers: Sequence[ActorHandle], ranks_only: bool, count: int) -> SplitModel:
        settings, own, device = self._settings, self._settings.student, pick_device(self._settings.run.device)
        if device == "cpu":  # one core is left to the teacher, which works at the same time
            torch.set_num_threads(learner_threads(settings.learner))
        self._saved_dtype = saved_dtype(settings)
        self._tokenizer = load_tokenizer(own.model, own.trust_remote_code)
        pad_id = self._tokenizer.pad_token_id
        # What is to be cut among ranks need not fit one device.
        model = load_student(settings, device if count == 1 else "cpu", device)
        student = split_for(settings, model, vocabulary, pad_id)
        self._teacher: TeacherRows
        if teachers:
            self._teacher = RemoteTeacher(teachers, device)
        elif ranks_only:
            self._teacher = NoTeacher()
        elif settings.cache.path is not None:
            self._teacher = open_teacher(settings, device)
        else:
            self._teacher = build_teacher(settings, vocabulary, pad_id)
        return student

    def ready(self) -> Place:
        self._init_error.raise_if_failed()
        return place()

    def meeting(self) -> Address:
        """Of rank 0 among several: where the others find it."""
        return self._meeting.address

    def join_ranks(self, address: Address) -> None:
        """Becomes one rank of several, all of which are being told so."""
        device, count = pick_device(self._settings.run.device), self._settings.learner.ranks
        self._learner = self._build(
            init_process_group(address, self._rank, count, device, self._settings.faults.timeout_s())
        )

    def use_teachers(self, teachers: Sequence[ActorHandle]) -> None:
        """Other actors of the same teacher from now on."""
        if isinstance(self._teacher, RemoteTeacher):
            self._teacher.replace(teachers)

    def drain(self) -> list[Span]:
        return self._learner.spans.drain()

    def version(self) -> int:
        return self._learner.version

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        """As a rollout actor, with ``rollout.placement=learner``."""
        if self._engine is None:
            raise RuntimeError("rollout.placement=actor: this learner has no engine")
        self._engine.load_weights((), self._learner.version)
        with self._learner.spans("generate"):
            return with_correctness(self._engine.generate(requests, sampling), requests, self._tokenizer)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """An error that other ranks have not seen leaves them waiting for this one, for good."""
        try:
            yield
        except (NonFiniteLossError, SamplerGapError):  # which every rank raises
            raise
        except Exception:
            self._apart = self._settings.learner.ranks > 1
            raise

    def filter(self, *parts: Sequence[Trajectory]) -> tuple[FilterReport, list[Trajectory]]:
        """The report for the driver and the kept trajectories, which stay in the object store."""
        with self._learner.spans("filter"), self._in_step():
            return self._learner.scorer.filter([t for part in parts for t in part])

    def step(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> StepRecord:
        self.begin(sum(t.weight for t in trajectories))
        self.add(trajectories, encoded)
        return self.finish()

    def begin(self, weight: float) -> None:
        """A step whose trajectories come in parts, of this ``weight`` if none is dropped."""
        self._forget(self._added)  # of a step that was not finished
        self._added = []
        self._learner.begin_step(weight)

    def add(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> None:
        self._added += [t.key for t in trajectories]
        try:
            with self._in_step():
                self._expect(trajectories, encoded)
                self._learner.add_trajectories(trajectories)
        except Exception:
            self._forget(self._added)
            raise

    def finish(self) -> StepRecord:
        try:
            with self._in_step():
                record = self._learner.end_step()
            self._apart = False  # all ranks were there
            record.learner_memory_mib = peak_memory_mib()
            return record
        finally:
            self._forget(self._added)

    def diagnose_positions(
        self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]
    ) -> list[PositionDiagnostics]:
        try:
            with self._in_step():
                self._expect(trajectories, encoded)
                return self._learner.scorer.diagnose_positions(trajectories)
        finally:
            self._forget([t.key for t in trajectories])

    def score_samples(self, trajectories: Sequence[Trajectory]) -> list[float]:
        with self._in_step():
            return self._learner.scorer.score_samples(trajectories)

    def weights(self) -> dict[str, Packed]:
        with self._learner.spans("pack weights"):
            return pack_named(self._learner.state.weights(self._sent_dtype))

    @property
    def _sent_dtype(self) -> torch.dtype:
        return pick_dtype(self._settings.rollout.dtype, pick_device(self._settings.run.device))

    def open_group(self) -> tuple[Address, WeightSpec]:
        """Where the engines' workers find rank 0, and what it will broadcast."""
        if self._sender is not None:
            self._sender.close()
        self._sender = Sender(ray.util.get_node_ip_address(), pick_device(self._settings.run.device))
        return self._sender.address, self._learner.state.weight_spec(self._sent_dtype)

    def join_group(self, count: int) -> None:
        """After ``open_group``: waits for the engines' workers."""
        assert self._sender is not None
        self._sender.join(count, self._settings.faults.timeout_s())

    def send(self) -> None:
        """Broadcasts the weights; other ranks than the first help it to gather them."""
        weights = self._learner.state.weights(self._sent_dtype)
        with self._learner.spans("send weights"):
            if self._sender is None:  # not rank 0
                deque(weights, maxlen=0)
            else:
                self._sender.send(weights)

    def export_weights(self) -> WeightSpec:
        """Of a copy of the weights in this GPU's memory, which stays until ``drop_export``."""
        self._copies = []
        weight_spec, self._copies = exported(self._learner.state.weights(self._sent_dtype, everywhere=True))
        torch.cuda.empty_cache()  # what an engine that wakes up may need
        return weight_spec

    def drop_export(self) -> None:
        self._copies = []
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()

    def save(
        self, folder: Path, step: int, version: int, state: dict[str, Any], keep: int, *ahead: Sequence[Trajectory]
    ) -> Path:
        """``ahead``: rollouts of ``step`` that were made before it, by weights that will be gone."""
        if self._learner.version != version:
            made = f"the learner is at policy version {self._learner.version}, not {version}"
            raise files.SaveError(f"no checkpoint of step {step}: {made}")
        if self._apart:
            raise files.SaveError(f"no checkpoint of step {step}: rank {self._rank} stopped where others did not")
        records, tensors = trajectories_to_tensors([t for part in ahead for t in part])
        state, tensors = state | {"version": version, "ahead": records}, self._learner.state.tensors() | tensors
        return folder if self._rank else checkpoint.save(folder, step, state, tensors, keep)

    def restore(self, path: Path) -> tuple[int, list[Trajectory]]:
        """The policy version, and the rollouts of the next step that were made ahead."""
        loaded = checkpoint.load(path, verify=False)  # by the driver, once for all ranks
        ahead = trajectories_from_tensors(loaded.state.get("ahead", []), loaded.tensors)
        self._learner.state.restore(loaded.tensors, loaded.state["version"])
        return self._learner.version, ahead

    def save_pretrained(self, folder: Path) -> None:
        self._learner.state.save_pretrained(folder, self._tokenizer, self._saved_dtype)

    def _expect(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> None:
        if isinstance(self._teacher, RemoteTeacher):
            self._teacher.expect(encoded, trajectories)
        else:
            with self._learner.spans("encode"):
                self._teacher.encode(self._learner.local_trajectories(trajectories))

    def _forget(self, keys: Sequence[str]) -> None:
        """The driver tells teachers in other processes itself."""
        if isinstance(self._teacher, RemoteTeacher):
            self._teacher.forget(keys)
        else:
            self._teacher.release(keys)


def peak_memory_mib() -> float:
    """Most memory that this process ever had: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
