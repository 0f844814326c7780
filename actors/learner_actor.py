"""The learner as a Ray actor."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle

from actors.cluster import DeferredInitError
from actors.faults import Place, place, reports_faults
from actors.learner_weights import SendsWeights
from actors.placement import free_gpu_memory
from actors.rollout_actor import judged_batches
from actors.teacher_actor import RemoteTeacher, RemoteTeachers, build_teacher, split_for
from onpolicy_skd.config.schema import AlignmentSettings, Settings
from onpolicy_skd.data.chat import special_ids
from onpolicy_skd.distributed.ranks import Ranks
from onpolicy_skd.distributed.rendezvous import Rendezvous, init_process_group
from onpolicy_skd.distributed.weight_transfer import Address
from onpolicy_skd.evaluation.diagnostics import PositionDiagnostics
from onpolicy_skd.learner.learner import Learner, NonFiniteLossError, SamplerGapError
from onpolicy_skd.learner.metrics import StepRecord
from onpolicy_skd.learner.optimizer import learner_threads
from onpolicy_skd.models.heap import trim_heap
from onpolicy_skd.models.loading import load_student, load_tokenizer, pick_device, saved_dtype
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.rollout.engine import sort_by_request
from onpolicy_skd.rollout.transformers_engine import TransformersEngine
from onpolicy_skd.storage import checkpoint, files
from onpolicy_skd.storage.trajectories import trajectories_from_tensors, trajectories_to_tensors
from onpolicy_skd.teacher.cached_teacher import open_teacher
from onpolicy_skd.teacher.teacher import NoTeacher, TeacherRows
from onpolicy_skd.tracing import Span
from onpolicy_skd.types import FilterReport, RolloutRequest, SamplingParams, Trajectory

TeacherActors = Sequence[ActorHandle] | Mapping[str, Sequence[ActorHandle]]  # of one teacher, or by teacher name


@ray.remote
@reports_faults
class LearnerActor(SendsWeights):
    """One rank of the learner, with its shard of the student.

    With ``teacher.placement=learner`` or a cache it also holds the teacher.  The driver makes every call that does not
    concern a single process on all ranks, and uses rank 0's answer.
    """

    def __init__(
        self,
        settings: Settings,
        vocabulary: int,
        steps: int,
        teachers: TeacherActors = (),
        rank: int = 0,
        scoring_only: bool = False,
    ) -> None:
        """Load the student, and the teacher unless ``teachers`` holds it.

        ``scoring_only``: the driver will only call ``score_samples``, which may need no teacher.
        """
        self._rank, count = rank, 1 if scoring_only else settings.learner.ranks
        self._out_of_step = False  # this rank failed in a step in which other ranks may still wait
        self._writer = checkpoint.BackgroundWriter()
        self._step_keys: list[str] = []  # keys of the trajectories in the open step
        self._settings = settings
        self._engine: TransformersEngine | None = None
        self._init_error = DeferredInitError()
        with self._init_error.keep():
            student = self._load(vocabulary, teachers, scoring_only, count)
            pad_id = self._tokenizer.pad_token_id
            if scoring_only:  # the default loss: other variants may ask for the teacher's head at construction
                settings = settings.model_copy(update={"alignment": AlignmentSettings()})
            self._build = lambda ranks: Learner(
                student, self._teacher, settings, pad_id, steps, ranks, sorted(special_ids(self._tokenizer))
            )
            if count == 1:
                self._learner = self._build(Ranks())
                if settings.rollout.placement == "learner":
                    student_cfg = settings.student
                    self._engine = TransformersEngine(
                        student_cfg.model, settings, student_cfg.trust_remote_code, student
                    )
            elif rank == 0:
                self._rendezvous = Rendezvous(ray.util.get_node_ip_address())

    def _load(self, vocabulary: int, teachers: TeacherActors, scoring_only: bool, count: int) -> SplitModel:
        settings, device = self._settings, pick_device(self._settings.run.device)
        if device == "cpu":
            torch.set_num_threads(learner_threads(settings))
        self._saved_dtype = saved_dtype(settings)
        self._tokenizer = load_tokenizer(settings.student.model, settings.student.trust_remote_code)
        pad_id = self._tokenizer.pad_token_id
        # A model that will be sharded need not fit one device.
        model = load_student(settings, device if count == 1 else "cpu", device)
        student = split_for(settings, model, vocabulary, pad_id, settings.max_sequence)
        self._teacher: TeacherRows
        if teachers:
            remote = RemoteTeachers if isinstance(teachers, Mapping) else RemoteTeacher
            self._teacher = remote(teachers, device)  # type: ignore[arg-type]
        elif scoring_only:
            self._teacher = NoTeacher()
        elif settings.cache.path is not None:
            self._teacher = open_teacher(settings, device)
        else:
            self._teacher = build_teacher(settings, vocabulary, pad_id)
        return student

    def ready(self) -> Place:
        """Return the place of this actor once it is up.  Raises what its constructor raised."""
        self._init_error.raise_if_failed()
        return place()

    def rendezvous_address(self) -> Address:
        """Return the address at which the ranks meet; only rank 0 of several has it."""
        return self._rendezvous.address

    def join_ranks(self, address: Address) -> None:
        """Join the process group of all ranks and build this rank's learner."""
        device, count = pick_device(self._settings.run.device), self._settings.learner.ranks
        timeout_s = self._settings.faults.timeout_s()
        self._learner = self._build(init_process_group(address, self._rank, count, device, timeout_s))

    def use_teachers(self, teachers: TeacherActors) -> None:
        """Use other actors of the same teacher, or teachers, from now on."""
        if isinstance(self._teacher, RemoteTeacher | RemoteTeachers):
            self._teacher.replace(teachers)  # type: ignore[arg-type]

    def drain(self) -> list[Span]:
        """Return the tracing spans recorded since the last call."""
        return self._learner.spans.drain()

    def precision_warning(self) -> str | None:
        """Return a warning if an update of size ``learner.lr`` leaves most weights unchanged in the compute dtype."""
        return self._learner.precision_warning()

    def version(self) -> int:
        """Return the policy version: optimizer steps done."""
        return self._learner.version

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        """Generate as a rollout actor does.  Raises RuntimeError unless ``rollout.placement=learner``."""
        batches = self.stream(requests, sampling, len(requests))
        return sort_by_request(requests, (t for batch in batches for t in batch))

    def stream(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, size: int
    ) -> Iterator[list[Trajectory]]:
        """Yield trajectories as they complete, ``size`` at a time; raises as ``generate`` does."""
        if self._engine is None:
            raise RuntimeError("rollout.placement=actor: this learner has no engine")
        self._engine.load_weights((), self._learner.version)
        with self._learner.spans("generate"):
            yield from judged_batches(
                self._engine, requests, sampling, self._tokenizer, self._settings.eval.judge, size
            )

    # -- steps -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Note an error that only this rank raises: the other ranks may still wait for it in a collective call."""
        try:
            yield
        except (NonFiniteLossError, SamplerGapError):  # every rank raises these
            raise
        except Exception:
            self._out_of_step = self._settings.learner.ranks > 1
            raise

    def filter(self, *rollouts: Sequence[Trajectory]) -> tuple[FilterReport, list[Trajectory]]:
        """Apply the sample filter; return its report, for the driver, and the kept trajectories, for other actors."""
        with self._learner.spans("filter"), self._in_step():
            return self._learner.scorer.filter([t for trajectories in rollouts for t in trajectories])

    def step(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> StepRecord:
        """Make one optimizer step and return its metrics."""
        self.begin_step(sum(t.weight for t in trajectories))
        self.add_to_step(trajectories, encoded)
        return self.finish_step()

    def begin_step(self, weight: float) -> None:
        """Begin a step that ``add_to_step`` fills; ``weight``: sum of its trajectories' weights if none is dropped."""
        self._forget(self._step_keys)  # of an earlier step that was not finished
        self._step_keys = []
        self._learner.begin_step(weight)

    def add_to_step(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> None:
        """Accumulate the gradient of ``trajectories``."""
        self._step_keys += [t.key for t in trajectories]
        try:
            with self._in_step():
                self._expect(trajectories, encoded)
                self._learner.add_trajectories(trajectories)
        except Exception:
            self._forget(self._step_keys)
            raise

    def finish_step(self) -> StepRecord:
        """Update the weights with the gradient of the open step and return its metrics."""
        try:
            with self._in_step():
                record = self._learner.end_step()
            self._out_of_step = False  # all ranks took part
            record.learner_memory_mib = peak_memory_mib()
            return record
        finally:
            self._forget(self._step_keys)
            trim_heap()  # the engines and the teacher use the memory next

    def diagnose_positions(
        self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]
    ) -> list[PositionDiagnostics]:
        """Return diagnostics of every eligible position; makes no update."""
        try:
            with self._in_step():
                self._expect(trajectories, encoded)
                return self._learner.scorer.diagnose_positions(trajectories)
        finally:
            self._forget([t.key for t in trajectories])

    def score_samples(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return the score of each sample under ``samples.metric``."""
        with self._in_step():
            return self._learner.scorer.score_samples(trajectories)

    # -- state -----------------------------------------------------------------------------------------------------

    def save(
        self, folder: Path, step: int, version: int, state: dict[str, Any], keep: int, *prefetched: Sequence[Trajectory]
    ) -> Path:
        """Write a checkpoint on rank 0, with the prefetched rollouts of ``step``.

        The checkpoint includes them because the older weights that generated them cannot be restored.  A learner on a
        GPU copies its state and writes the copy while training continues; ``finish_saving`` waits for the write.
        Raises SaveError if the checkpoint cannot be written or the learner is not at policy ``version``.
        """
        if self._learner.version != version:
            actual = f"the learner is at policy version {self._learner.version}, not {version}"
            raise files.SaveError(f"no checkpoint of step {step}: {actual}")
        if self._out_of_step:
            raise files.SaveError(f"no checkpoint of step {step}: rank {self._rank} stopped where others did not")
        records, tensors = trajectories_to_tensors([t for trajectories in prefetched for t in trajectories])
        state = state | {"version": version, "prefetched_rollouts": records}
        tensors = self._learner.state.tensors() | tensors
        if self._rank:
            return folder
        on_gpu = torch.cuda.is_initialized()
        return (self._writer.save if on_gpu else checkpoint.save)(folder, step, state, tensors, keep)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on disk.  Raises SaveError."""
        self._writer.wait()

    def restore(self, path: Path) -> tuple[int, list[Trajectory]]:
        """Load a checkpoint; return the policy version and the prefetched rollouts of the next step."""
        loaded = checkpoint.load(path, verify=False)  # the driver has verified it, once for all ranks
        prefetched = trajectories_from_tensors(loaded.state.get("prefetched_rollouts", []), loaded.tensors)
        self._learner.state.restore(loaded.tensors, loaded.state["version"])
        return self._learner.version, prefetched

    def save_pretrained(self, folder: Path) -> None:
        """Write the student as a transformers checkpoint."""
        self._learner.state.save_pretrained(folder, self._tokenizer, self._saved_dtype)

    def free_memory(self) -> None:
        """Free the unused memory that the CUDA caching allocator holds."""
        free_gpu_memory()

    # -- the teacher -----------------------------------------------------------------------------------------------

    def _expect(self, trajectories: Sequence[Trajectory], encoded: list[ray.ObjectRef]) -> None:
        if isinstance(self._teacher, RemoteTeacher | RemoteTeachers):
            self._teacher.expect(encoded, trajectories)
        else:
            with self._learner.spans("encode"):
                self._teacher.encode(self._learner.local_trajectories(trajectories))

    def _forget(self, keys: Sequence[str]) -> None:
        """Drop the trajectories ``keys`` in this process; for teacher actors, the driver calls ``release``."""
        if isinstance(self._teacher, RemoteTeacher | RemoteTeachers):
            self._teacher.forget(keys)
        else:
            self._teacher.release(keys)


def peak_memory_mib() -> float:
    """Return this process's peak memory, MiB: allocated by torch on the GPU if it uses one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
