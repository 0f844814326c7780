"""The teacher as a Ray actor, and the learner's view of it from another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from actors.cluster import DeferredInitError
from actors.faults import Place, place, reports_faults, watch_workers
from actors.placement import free_gpu_memory, use_cores
from actors.serialization import Packed, pack, pack_head, unpack, unpack_head
from onpolicy_skd.config.schema import ClassSettings, Settings
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.batch import balance_by_tokens
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.models.loading import load_model, pick_device, pick_dtype
from onpolicy_skd.models.split_model import SplitModel, check_documents, split
from onpolicy_skd.teacher.cache_format import Shard, write_shard
from onpolicy_skd.teacher.encoding import Encoder
from onpolicy_skd.teacher.routing import RoutedTeachers
from onpolicy_skd.teacher.teacher import RowRequest, Teacher
from onpolicy_skd.teacher.vllm_teacher import VLLMTeacher
from onpolicy_skd.tracing import Span, Spans
from onpolicy_skd.types import Trajectory

NONE: Mapping[str, bytes] = {}
Calls = list[tuple[list[int], ray.ObjectRef]]  # one per actor: indices of the trajectories it is asked for, its answer


def build_teacher(settings: Settings, vocabulary: int, pad_id: int) -> Teacher | VLLMTeacher:
    """Load the teacher of ``settings`` into this process.  Raises ModelError."""
    if settings.teacher.engine == "vllm":
        return VLLMTeacher(settings, vocabulary)
    cfg, named = settings.teacher, settings.teacher_model
    device = pick_device(settings.run.device)
    dtype = pick_dtype(cfg.dtype, device) if cfg.ema_decay is None else torch.float32  # keeps small updates
    model = load_model(named.model, dtype, device, named.trust_remote_code)
    return Teacher(
        split_for(settings, model, vocabulary, pad_id, settings.max_teacher_sequence),
        cfg.tokens_per_batch,
        pad_id,
        settings.alignment.temperature,
        settings.alignment.chunk_rows,
        settings.pipeline.packing,
    )


def split_for(settings: Settings, model: Any, vocabulary: int, pad_id: int, longest: int) -> SplitModel:
    """Split ``model`` into backbone and LM head; check that it keeps documents apart if the run packs sequences.

    ``longest``: number of tokens of the longest sequence that the model reads.  Raises ModelError.
    """
    split_model = split(model, vocabulary)
    separate = settings.data.source == "text" and settings.data.documents == "separate"
    if separate or settings.pipeline.packing:
        check_documents(split_model, pad_id, longest)
    return split_model


def remote_with_answers(actor_class: type) -> Any:
    """Make ``actor_class`` a Ray actor whose methods of the concurrency group "answers" run on a second thread."""
    return ray.remote(concurrency_groups={"answers": 1})(actor_class)  # type: ignore[call-overload]


@remote_with_answers
@reports_faults
class TeacherActor:
    """The teacher; a second thread answers requests for encoded trajectories while others are still being encoded."""

    def __init__(
        self,
        settings: Settings,
        vocabulary: int,
        pad_id: int,
        number: int = 0,
        count: int = 1,
        name: str | None = None,
        processes: int | None = None,
    ) -> None:
        """Load the teacher; this actor has index ``number`` among the ``count`` actors that share each batch.

        ``name``: name of this actor's teacher if the run has several; ``processes``: number of actors of all teachers,
        by default ``count``.
        """
        self._name = name
        self._settings = settings
        self._vocabulary = vocabulary
        self._number, self._count = number, count
        self._init_error = DeferredInitError()
        with self._init_error.keep():
            use_cores(settings.teacher.threads, processes or count, settings)
            self._teacher = build_teacher(settings, vocabulary, pad_id)
            watch_workers(self._teacher)
            self._encoder = Encoder(self._teacher)
        on_gpu = pick_device(settings.run.device) == "cuda"
        self._spans = Spans(torch.cuda.synchronize if on_gpu else None)  # for a few spans per batch

    def drain(self) -> list[Span]:
        return self._spans.drain()

    def ready(self) -> Place:
        self._init_error.raise_if_failed()
        return place()

    @ray.method(concurrency_group="answers")
    def head(self) -> Any:
        return pack_head(self._teacher.head())

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        """Encode this actor's share of ``trajectories``; a named teacher takes only the trajectories that name it."""
        if self._name is not None:
            trajectories = [t for t in trajectories if t.teacher == self._name]
        share = balance_by_tokens([t.length for t in trajectories], self._count)[self._number]
        with self._spans("encode"):
            self._encoder.encode([trajectories[i] for i in share])

    @ray.method(concurrency_group="answers")
    def rows(self, request: RowRequest, digests: Mapping[str, bytes] = NONE) -> Packed:
        """Return the requested rows, once the trajectories with ``digests`` are encoded."""
        self._encoder.wait_for(digests)
        with self._spans("rows"):
            return pack(self._teacher.rows(request))

    @ray.method(concurrency_group="answers")
    def entropy_and_logprob(self, keys: Sequence[str], digests: Mapping[str, bytes] = NONE) -> tuple[Packed, Packed]:
        self._encoder.wait_for(digests)
        entropy, logprob = self._teacher.entropy_and_logprob(keys)
        return pack(entropy), pack(logprob)

    @ray.method(concurrency_group="answers")
    def classes(
        self, request: RowRequest, seeds: Sequence[int], options: ClassSettings, digests: Mapping[str, bytes] = NONE
    ) -> tuple[Packed, Packed, str]:
        self._encoder.wait_for(digests)
        targets = self._teacher.classes(request, seeds, options)
        return pack(targets.ids_NC.int()), pack(targets.probs_NC), targets.residual

    def release(self, keys: Sequence[str]) -> None:
        self._teacher.release(keys)

    def free_memory(self) -> None:
        """Free the unused memory that the CUDA caching allocator holds."""
        free_gpu_memory()

    def write_shard(self, folder: Path, number: int, trajectories: Sequence[Trajectory]) -> Shard:
        return write_shard(folder, number, trajectories, self._teacher, self._settings, self._vocabulary)


class RemoteTeacher:
    """TeacherRows from teacher actors: fetches the LM head once, and each row from the actor that holds it."""

    def __init__(self, actors: Sequence[Any], device: str) -> None:
        self._actors = list(actors)
        self._device = device
        self._head: LMHead | None = None
        self._encoded: list[ray.ObjectRef] = []
        self._holders: dict[str, tuple[int, int, bytes]] = {}  # by key: index of its actor, number of positions, digest
        self._prefetched: tuple[tuple, Calls] | None = None  # arguments of the prefetched answer, and its calls

    def replace(self, actors: Sequence[Any]) -> None:
        """Use other actors of the same teacher, which have encoded nothing."""
        self._actors, self._encoded, self._holders, self._prefetched = list(actors), [], {}, None

    def expect(self, encoded: Sequence[ray.ObjectRef], trajectories: Sequence[Trajectory]) -> None:
        """Record ``trajectories`` that the driver has asked the actors to encode, and ``encoded``, the calls' refs.

        An actor answers for a trajectory as soon as it is encoded, even if the request arrives before the call to
        encode: Ray does not order calls from two processes.
        """
        self._encoded += encoded
        shares = balance_by_tokens([t.length for t in trajectories], len(self._actors))
        actor_of = {i: number for number, share in enumerate(shares) for i in share}
        self._holders |= {t.key: (actor_of[i], len(t.target_ids), t.digest) for i, t in enumerate(trajectories)}

    def head(self) -> LMHead:
        if self._head is None:
            packed: Any = ray.get(self._actors[0].head.remote())
            self._head = unpack_head(packed).to(self._device)
        return self._head

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        batch = ray.put(list(trajectories))
        self.expect([actor.encode.remote(batch) for actor in self._actors], trajectories)

    def prefetch_rows(self, request: RowRequest) -> None:
        self._prefetched = (request,), self._send_rows(request)

    def prefetch_classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> None:
        self._prefetched = (request, seeds, options), self._send_classes(request, seeds, options)

    def rows(self, request: RowRequest) -> Tensor:
        answers = self._answers(self._take_prefetched(request) or self._send_rows(request))
        counts = [len(positions) for _, positions in request]
        return self._in_order([(indices, unpack(rows)) for indices, rows in answers], counts)

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        def call(actor: Any, indices: list[int]) -> ray.ObjectRef:
            share = [keys[i] for i in indices]
            return actor.entropy_and_logprob.remote(share, self._digests(share))

        answers = self._answers(self._send(keys, call))
        counts = [self._holder(key)[1] for key in keys]
        entropy, logprob = ([(indices, unpack(values[i])) for indices, values in answers] for i in (0, 1))
        return self._in_order(entropy, counts), self._in_order(logprob, counts)

    def classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        calls = self._take_prefetched(request, seeds, options) or self._send_classes(request, seeds, options)
        answers = self._answers(calls)
        counts = [len(positions) for _, positions in request]
        width = max(ids[0].shape[1] for _, (ids, _, _) in answers)  # slots C, which differ between actors
        ids, probs = ([(indices, _padded(unpack(v[i]), width)) for indices, v in answers] for i in (0, 1))
        return SparseTargets(self._in_order(ids, counts).long(), self._in_order(probs, counts), answers[0][1][2])

    def release(self, keys: Sequence[str]) -> None:
        ray.get([actor.release.remote(keys) for actor in self._actors])
        self.forget(keys)

    def forget(self, keys: Sequence[str]) -> None:
        if self._prefetched:  # by a step that failed; an actor would wait forever for a trajectory that it has released
            refs = [ref for _, ref in self._prefetched[1]]
            ray.wait(refs, num_returns=len(refs), fetch_local=False)
            self._prefetched = None
        for key in keys:
            self._holders.pop(key, None)

    def _send_rows(self, request: RowRequest) -> Calls:
        def call(actor: Any, indices: list[int]) -> ray.ObjectRef:
            share = [request[i] for i in indices]
            return actor.rows.remote(share, self._digests(key for key, _ in share))

        return self._send([key for key, _ in request], call)

    def _send_classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> Calls:
        def call(actor: Any, indices: list[int]) -> ray.ObjectRef:
            share = [request[i] for i in indices]
            digests = self._digests(key for key, _ in share)
            return actor.classes.remote(share, [seeds[i] for i in indices], options, digests)

        return self._send([key for key, _ in request], call)

    def _send(self, keys: Sequence[str], call: Callable[[Any, list[int]], ray.ObjectRef]) -> Calls:
        """Call each actor for those of ``keys`` that it encodes; return pairs of (indices into ``keys``, ref)."""
        indices: dict[int, list[int]] = {}  # by actor
        for i, key in enumerate(keys):
            indices.setdefault(self._holder(key)[0], []).append(i)
        return [(share, call(self._actors[number], share)) for number, share in indices.items()]

    def _take_prefetched(self, *arguments: Any) -> Calls | None:
        """Return the prefetched calls if they were made for these ``arguments``, else None; forget them either way."""
        prefetched, self._prefetched = self._prefetched, None
        return prefetched[1] if prefetched and prefetched[0] == arguments else None

    def _answers(self, calls: Calls) -> list[tuple]:
        """Wait for ``calls``; return pairs of (indices, answer)."""
        if self._encoded:
            done, self._encoded = ray.wait(self._encoded, num_returns=len(self._encoded), timeout=0)
            ray.get(done)  # raises the error of a batch that could not be encoded
        answers: Any = ray.get([ref for _, ref in calls])
        return [(indices, answer) for (indices, _), answer in zip(calls, answers, strict=True)]

    def _digests(self, keys: Iterable[str]) -> dict[str, bytes]:
        return {key: self._holder(key)[2] for key in keys}

    def _holder(self, key: str) -> tuple[int, int, bytes]:
        if key not in self._holders:
            raise KeyError(f"trajectory {key} has not been encoded by the teacher, or was released")
        return self._holders[key]

    def _in_order(self, answers: Sequence[tuple[list[int], Tensor]], counts: Sequence[int]) -> Tensor:
        """Concatenate the actors' rows in the order of the request; ``counts``: rows of each trajectory."""
        if len(answers) == 1:
            return answers[0][1].to(self._device)
        rows_of = {i: rows for indices, values in answers
                   for i, rows in zip(indices, values.split([counts[i] for i in indices]), strict=True)}  # fmt: skip
        return torch.cat([rows_of[i] for i in range(len(counts))]).to(self._device)


class RemoteTeachers(RoutedTeachers[RemoteTeacher]):
    """RoutedTeachers over the actors of each teacher; the driver asks all actors to encode a batch."""

    def __init__(self, actors: Mapping[str, Sequence[Any]], device: str) -> None:
        super().__init__({name: RemoteTeacher(group, device) for name, group in actors.items()})
        self._sizes = {name: len(group) for name, group in actors.items()}

    def replace(self, actors: Mapping[str, Sequence[Any]]) -> None:
        """Use other actors of the same teachers, which have encoded nothing."""
        for name, group in actors.items():
            self.teachers[name].replace(group)

    def expect(self, encoded: Sequence[ray.ObjectRef], trajectories: Sequence[Trajectory]) -> None:
        """Do what ``RemoteTeacher.expect`` does; ``encoded``: one ref per actor, teacher by teacher."""
        start = 0
        for name, teacher in self.teachers.items():
            end = start + self._sizes[name]
            teacher.expect(encoded[start:end], self.members(name, trajectories))
            start = end

    def forget(self, keys: Sequence[str]) -> None:
        for teacher in self.teachers.values():
            teacher.forget(keys)
        self.drop(keys)


def _padded(slots_NC: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(slots_NC, (0, width - slots_NC.shape[1]))
