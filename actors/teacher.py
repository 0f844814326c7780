"""The teacher as an actor, and the learner's view of it from another process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from actors.cluster import Refusal
from actors.faults import Place, place
from actors.transport import Packed, pack, unpack
from onpolicy_skd.config import ClassSettings, Settings
from onpolicy_skd.models import SplitModel, check_documents, load_model, pick_device, pick_dtype, split
from onpolicy_skd.teacher import Teacher, Wanted
from onpolicy_skd.teacher_cache import Shard, write_shard
from onpolicy_skd.timeline import Span, Spans
from onpolicy_skd.trajectory import SparseTargets, Trajectory


def build_teacher(settings: Settings, vocabulary: int, pad_id: int) -> Teacher:
    own = settings.teacher
    device = pick_device(settings.run.device)
    model = load_model(own.model, pick_dtype(own.dtype, device), device, own.trust_remote_code)
    return Teacher(
        split_for(settings, model, vocabulary, pad_id),
        own.tokens_per_batch,
        pad_id,
        settings.alignment.temperature,
        settings.alignment.chunk_rows,
        settings.pipeline.packing,
    )


def split_for(settings: Settings, model: Any, vocabulary: int, pad_id: int) -> SplitModel:
    """Trunk and head of ``model``, which was seen to keep documents apart if the run does.  Raises ModelError."""
    found = split(model, vocabulary)
    separate = settings.data.source == "text" and settings.data.documents == "separate"
    if separate or settings.pipeline.packing:
        check_documents(found, pad_id, settings.max_sequence)
    return found


@ray.remote
class TeacherActor:
    def __init__(self, settings: Settings, vocabulary: int, pad_id: int) -> None:
        self._settings = settings
        self._vocabulary = vocabulary
        with Refusal() as self._refusal:
            self._teacher = build_teacher(settings, vocabulary, pad_id)
        self._spans = Spans()

    def drain(self) -> list[Span]:
        return self._spans.drain()

    def ready(self) -> Place:
        self._refusal.repeat()
        return place()

    def head(self) -> Packed:
        return pack(self._teacher.head())

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        with self._spans("encode"):
            self._teacher.encode(trajectories)

    def rows(self, wanted: Wanted) -> Packed:
        with self._spans("rows"):
            return pack(self._teacher.rows(wanted))

    def scalars(self, keys: Sequence[str]) -> tuple[Packed, Packed]:
        entropy, logprob = self._teacher.scalars(keys)
        return pack(entropy), pack(logprob)

    def classes(self, wanted: Wanted, seeds: Sequence[int], options: ClassSettings) -> tuple[Packed, Packed, str]:
        found = self._teacher.classes(wanted, seeds, options)
        return pack(found.ids_NC.int()), pack(found.probs_NC), found.residual

    def release(self, keys: Sequence[str]) -> None:
        self._teacher.release(keys)

    def write_shard(self, folder: Path, number: int, trajectories: Sequence[Trajectory]) -> Shard:
        return write_shard(folder, number, trajectories, self._teacher, self._settings, self._vocabulary)


class RemoteTeacher:
    """TeacherRows over a TeacherActor: fetches the LM head once, and rows as they are wanted."""

    def __init__(self, actor: Any, device: str) -> None:
        self._actor = actor
        self._device = device
        self._head: Tensor | None = None
        self._encoded: ray.ObjectRef | None = None

    def replace(self, actor: Any) -> None:
        self._actor, self._encoded = actor, None

    def expect(self, encoded: ray.ObjectRef) -> None:
        """The rows wanted next exist once ``encoded`` does; calls of two processes have no order of their own."""
        self._encoded = encoded

    def head(self) -> Tensor:
        if self._head is None:
            packed: Any = ray.get(self._actor.head.remote())
            self._head = unpack(packed).to(self._device)
        return self._head

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        ray.get(self._actor.encode.remote(trajectories))

    def rows(self, wanted: Wanted) -> Tensor:
        return unpack(self._ask(self._actor.rows, wanted)).to(self._device)

    def scalars(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        entropy, logprob = self._ask(self._actor.scalars, keys)
        return unpack(entropy).to(self._device), unpack(logprob).to(self._device)

    def classes(self, wanted: Wanted, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        ids, probs, residual = self._ask(self._actor.classes, wanted, seeds, options)
        return SparseTargets(unpack(ids).long(), unpack(probs), residual).to(self._device)

    def release(self, keys: Sequence[str]) -> None:
        ray.get(self._actor.release.remote(keys))

    def _ask(self, method: Any, *arguments: Any) -> Any:
        if self._encoded is not None:
            ray.get(self._encoded)
            self._encoded = None
        return ray.get(method.remote(*arguments))
