"""The frozen teacher: encode trajectories once, then answer requests for hidden rows, statistics or sparse targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from onpolicy_skd.config.schema import ClassSettings
from onpolicy_skd.loss.sparse_targets import Draws, SparseTargets, concatenate, sample
from onpolicy_skd.models.batch import collate, micro_batches
from onpolicy_skd.models.lm_head import LMHead, Projector, chunk_size, chunks, log_softmax_, row_statistics
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.types import Trajectory

RowRequest = Sequence[tuple[str, Sequence[int]]]  # (trajectory key, indices into its n eligible positions)


class TeacherRows(Protocol):
    """A teacher as the learner sees it, in the same process or another one.

    All methods but ``head`` and ``encode`` raise KeyError for a trajectory that was not encoded, or was released.
    """

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        """Compute the hidden states of those ``trajectories`` that are not encoded yet."""
        ...

    def head(self) -> LMHead:
        """Return the LM head ``[V, G]``."""
        ...

    def rows(self, request: RowRequest) -> Tensor:
        """Return ``[K, G]``: last hidden states (after the final norm) at the requested positions, in their order."""
        ...

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return H(p_t) and log p_t(y_t) at all eligible positions of ``keys``, float32 ``[N]`` each, nats."""
        ...

    def classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        """Return the teacher's sparse targets at each requested position; one seed per requested trajectory."""
        ...

    def release(self, keys: Sequence[str]) -> None:
        """Drop the hidden states of ``keys``, if there are any."""
        ...


@runtime_checkable
class PrefetchingTeacher(TeacherRows, Protocol):
    """A teacher in another process that sends answers before the learner waits for them.

    It keeps one prefetched answer, that of the last request.  ``rows`` or ``classes`` with the same arguments returns
    it; with other arguments they drop it and send a new request.
    """

    def prefetch_rows(self, request: RowRequest) -> None:
        """Request what ``rows`` with the same argument will return, without waiting."""
        ...

    def prefetch_classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> None:
        """Request what ``classes`` with the same arguments will return, without waiting."""
        ...


class HiddenRowsTeacher(ABC):
    """Base of teachers that answer from the hidden states of encoded trajectories, which a subclass provides.

    The hidden states at the eligible positions of each encoded trajectory stay in memory until ``release``: 2 * G bytes
    per response token in bfloat16 (G: hidden size), 4 * G in float32.
    """

    def __init__(self, head: LMHead, temperature: float, chunk_rows: int | None) -> None:
        self._head = head
        self._temperature = temperature
        self._chunk_rows = chunk_rows
        self._hidden: dict[str, Tensor] = {}  # key -> [n, G]
        self._targets: dict[str, Tensor] = {}  # key -> [n]
        self._encoded: dict[str, Trajectory] = {}

    @abstractmethod
    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        """Yield each trajectory, in any order, with its hidden states ``[n, G]``, which share no memory."""

    def head(self) -> LMHead:
        return self._head

    @torch.inference_mode()
    def encode(self, trajectories: Sequence[Trajectory], after_each: Callable[[], None] | None = None) -> None:
        """Encode ``trajectories``; call ``after_each`` after each one, when other threads may request it."""
        for t, hidden_nG in self._hidden_of([t for t in trajectories if not self._has(t)]):
            self._hidden[t.key] = hidden_nG
            self._targets[t.key] = torch.as_tensor(t.target_ids, device=hidden_nG.device)
            self._encoded[t.key] = t
            if after_each:
                after_each()

    def rows(self, request: RowRequest) -> Tensor:
        return torch.cat(self._picked(request)).clone()  # a copy outside inference mode, which autograd accepts

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden = torch.cat([self._known(key) for key in keys])
        targets = torch.cat([self._targets[key] for key in keys])
        statistics = row_statistics(hidden, self._head, targets, self._temperature, self._chunk_rows)
        return statistics.entropy_N, statistics.logprob_N

    @torch.no_grad()
    def classes(self, request: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        hidden = torch.cat(self._picked(request))
        targets = torch.cat([self._targets[key][self._index(at)] for key, at in request])
        uniform = torch.cat([_uniform(seed, at, options.draws) for seed, (_, at) in zip(seeds, request, strict=True)])
        size = max(1, chunk_size(len(hidden), self._head, self._chunk_rows) // 4)  # rs_kd holds float64 copies
        project = Projector(self._head.to(hidden.dtype), size)
        targets_by_chunk = []
        for chunk in chunks(len(hidden), size):
            log_p = log_softmax_(project(hidden[chunk]).div_(self._temperature))
            targets_by_chunk.append(sample(log_p, Draws(options, targets[chunk], uniform[chunk])))
        return concatenate(targets_by_chunk)

    def release(self, keys: Sequence[str]) -> None:
        for key in keys:
            for kept in (self._hidden, self._targets, self._encoded):
                kept.pop(key, None)

    @property
    def stored(self) -> int:
        """Number of trajectories whose hidden states are kept."""
        return len(self._hidden)

    def _has(self, t: Trajectory) -> bool:
        return self.holds(t.key, t.digest)

    def holds(self, key: str, digest: bytes) -> bool:
        """Return True if the trajectory with this key and ``digest`` is encoded, not another one under the same key."""
        known = self._encoded.get(key)
        return known is not None and known.digest == digest

    def _picked(self, request: RowRequest) -> list[Tensor]:
        return [self._known(key)[self._index(positions)] for key, positions in request]

    def _index(self, positions: Sequence[int]) -> Tensor:
        return torch.as_tensor(positions, dtype=torch.long, device=self._head.device)

    def _known(self, key: str) -> Tensor:
        if key not in self._hidden:
            raise KeyError(f"trajectory {key} has not been encoded by the teacher, or was released")
        return self._hidden[key]


class NoTeacher(HiddenRowsTeacher):
    """Placeholder for a process that never queries a teacher."""

    def __init__(self) -> None:
        super().__init__(LMHead(torch.empty(0, 0)), 1.0, None)

    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        raise RuntimeError("this process has no teacher to encode with")


class Teacher(HiddenRowsTeacher):
    """A model that encodes trajectories in batches of a token budget.

    It is frozen, unless the learner updates its weights (``teacher.ema_decay``).
    """

    def __init__(
        self,
        model: SplitModel,
        tokens_per_batch: int,
        pad_id: int,
        temperature: float = 1.0,
        chunk_rows: int | None = None,
        packed: bool = False,
    ) -> None:
        model.model.eval().requires_grad_(False)
        super().__init__(model.head, temperature, chunk_rows)
        self._model = model
        self._tokens_per_batch = tokens_per_batch
        self._pad_id = pad_id
        self._packed = packed

    @property
    def model(self) -> SplitModel:
        return self._model

    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        read = [t.as_teacher_reads() for t in trajectories]
        for group in micro_batches([t.length for t in read], self._tokens_per_batch, self._packed):
            batch = collate([read[i] for i in group], self._pad_id, self._model.device, packed=self._packed)
            hidden = self._model.hidden(batch).split(batch.counts)
            for i, rows in zip(group, hidden, strict=True):
                yield trajectories[i], rows.clone()  # a view would keep the batch's tensor alive


def _uniform(seed: int, positions: Sequence[int], draws: int) -> Tensor:
    """Return float64 ``[len(positions), draws]``; the draws of a position do not depend on the other positions."""
    last = max(positions, default=-1) + 1
    uniform = torch.rand(last, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return uniform[torch.as_tensor(positions, dtype=torch.long)]
