"""The teacher as an actor, and the learner's view of it from another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from actors.cluster import DeferredInitError
from actors.faults import Place, place
from actors.serialization import Packed, pack, unpack
from onpolicy_skd.config.schema import ClassSettings, Settings
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.batch import balance_by_tokens
from onpolicy_skd.models.loading import load_model, pick_device, pick_dtype
from onpolicy_skd.models.split_model import SplitModel, check_documents, split
from onpolicy_skd.teacher.cache_format import Shard, write_shard
from onpolicy_skd.teacher.teacher import RowRequest, Teacher
from onpolicy_skd.tracing import Span, Spans
from onpolicy_skd.types import Trajectory


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
    def __init__(self, settings: Settings, vocabulary: int, pad_id: int, number: int = 0, count: int = 1) -> None:
        """Number ``number`` of ``count`` that share each batch."""
        self._settings = settings
        self._vocabulary = vocabulary
        self._number, self._count = number, count
        with DeferredInitError() as self._init_error:
            self._teacher = build_teacher(settings, vocabulary, pad_id)
        self._spans = Spans()

    def drain(self) -> list[Span]:
        return self._spans.drain()

    def ready(self) -> Place:
        self._init_error.raise_if_failed()
        return place()

    def head(self) -> Packed:
        return pack(self._teacher.head())

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        """Its share of ``trajectories``."""
        mine = balance_by_tokens([t.length for t in trajectories], self._count)[self._number]
        with self._spans("encode"):
            self._teacher.encode([trajectories[i] for i in mine])

    def rows(self, wanted: RowRequest) -> Packed:
        with self._spans("rows"):
            return pack(self._teacher.rows(wanted))

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Packed, Packed]:
        entropy, logprob = self._teacher.entropy_and_logprob(keys)
        return pack(entropy), pack(logprob)

    def classes(self, wanted: RowRequest, seeds: Sequence[int], options: ClassSettings) -> tuple[Packed, Packed, str]:
        found = self._teacher.classes(wanted, seeds, options)
        return pack(found.ids_NC.int()), pack(found.probs_NC), found.residual

    def release(self, keys: Sequence[str]) -> None:
        self._teacher.release(keys)

    def write_shard(self, folder: Path, number: int, trajectories: Sequence[Trajectory]) -> Shard:
        return write_shard(folder, number, trajectories, self._teacher, self._settings, self._vocabulary)


class RemoteTeacher:
    """TeacherRows over teacher actors: fetches the LM head once, and rows as they are wanted from whoever has them."""

    def __init__(self, actors: Sequence[Any], device: str) -> None:
        self._actors = list(actors)
        self._device = device
        self._head: Tensor | None = None
        self._encoded: list[ray.ObjectRef] = []
        self._places: dict[str, tuple[int, int]] = {}  # of each trajectory: which actor has it, and its positions

    def replace(self, actors: Sequence[Any]) -> None:
        self._actors, self._encoded, self._places = list(actors), [], {}

    def expect(self, encoded: Sequence[ray.ObjectRef], trajectories: Sequence[Trajectory]) -> None:
        """The rows of ``trajectories`` exist once ``encoded`` does, which every actor was asked for; calls of two
        processes have no order of their own."""
        self._encoded += encoded
        dealt = balance_by_tokens([t.length for t in trajectories], len(self._actors))
        every = {i: number for number, share in enumerate(dealt) for i in share}
        self._places |= {t.key: (every[i], len(t.response_ids)) for i, t in enumerate(trajectories)}

    def head(self) -> Tensor:
        if self._head is None:
            packed: Any = ray.get(self._actors[0].head.remote())
            self._head = unpack(packed).to(self._device)
        return self._head

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        whole = ray.put(list(trajectories))
        self.expect([actor.encode.remote(whole) for actor in self._actors], trajectories)

    def rows(self, wanted: RowRequest) -> Tensor:
        def ask(actor: Any, part: list[int]) -> ray.ObjectRef:
            return actor.rows.remote([wanted[i] for i in part])

        found = self._gathered([key for key, _ in wanted], ask)
        counts = [len(positions) for _, positions in wanted]
        return self._in_order([(part, unpack(rows)) for part, rows in found], counts)

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        def ask(actor: Any, part: list[int]) -> ray.ObjectRef:
            return actor.entropy_and_logprob.remote([keys[i] for i in part])

        found = self._gathered(keys, ask)
        counts = [self._place(key)[1] for key in keys]
        entropy, logprob = ([(part, unpack(values[i])) for part, values in found] for i in (0, 1))
        return self._in_order(entropy, counts), self._in_order(logprob, counts)

    def classes(self, wanted: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        def ask(actor: Any, part: list[int]) -> ray.ObjectRef:
            return actor.classes.remote([wanted[i] for i in part], [seeds[i] for i in part], options)

        found = self._gathered([key for key, _ in wanted], ask)
        counts = [len(positions) for _, positions in wanted]
        width = max(ids[0].shape[1] for _, (ids, _, _) in found)  # slots; each actor has as many as its rows fill
        ids, probs = ([(part, _padded(unpack(v[i]), width)) for part, v in found] for i in (0, 1))
        return SparseTargets(self._in_order(ids, counts).long(), self._in_order(probs, counts), found[0][1][2])

    def release(self, keys: Sequence[str]) -> None:
        ray.get([actor.release.remote(keys) for actor in self._actors])
        self.forget(keys)

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._places.pop(key, None)

    def _gathered(self, keys: Sequence[str], ask: Callable[[Any, list[int]], ray.ObjectRef]) -> list[tuple]:
        """What each actor answers on those of ``keys`` that it has, with their places in ``keys``."""
        pending, self._encoded = self._encoded, []
        ray.get(pending)
        parts: dict[int, list[int]] = {}
        for i, key in enumerate(keys):
            parts.setdefault(self._place(key)[0], []).append(i)
        answers: Any = ray.get([ask(self._actors[number], part) for number, part in parts.items()])
        return list(zip(parts.values(), answers, strict=True))

    def _place(self, key: str) -> tuple[int, int]:
        if key not in self._places:
            raise KeyError(f"trajectory {key} has not been encoded by the teacher, or was released")
        return self._places[key]

    def _in_order(self, found: Sequence[tuple[list[int], Tensor]], counts: Sequence[int]) -> Tensor:
        """Rows in the order asked, ``counts`` of each trajectory, from those of several actors."""
        if len(found) == 1:
            return found[0][1].to(self._device)
        split = {i: rows for part, own in found
                 for i, rows in zip(part, own.split([counts[i] for i in part]), strict=True)}  # fmt: skip
        return torch.cat([split[i] for i in range(len(counts))]).to(self._device)


def _padded(slots_NC: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(slots_NC, (0, width - slots_NC.shape[1]))
