"""The frozen teacher: encode trajectories once, then answer requests for hidden rows, statistics or sparse targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from onpolicy_skd.config.schema import ClassSettings
from onpolicy_skd.loss.sparse_targets import Draws, SparseTargets, concatenate, sample
from onpolicy_skd.models.batch import collate, micro_batches
from onpolicy_skd.models.lm_head import Projector, chunk_size, chunks, log_softmax_, row_statistics
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.types import Trajectory

RowRequest = Sequence[tuple[str, Sequence[int]]]  # trajectory key, indices into its n eligible positions


class TeacherRows(Protocol):
    """What the learner needs of a teacher, in its own process or elsewhere.

    All but ``head`` and ``encode`` raise KeyError for a trajectory that was not encoded, or was released.
    """

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        """Makes the hidden states of ``trajectories`` ready; those that are ready stay as they are."""
        ...

    def head(self) -> Tensor:
        """The LM head ``[V, G]``."""
        ...

    def rows(self, wanted: RowRequest) -> Tensor:
        """``[K, G]``: last hidden states (after the final norm) at the wanted positions, in the order asked."""
        ...

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """H(p_t) and log p_t(y_t) at every eligible position of ``keys``, float32 ``[N]`` each, nats."""
        ...

    def classes(self, wanted: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        """A few classes of the teacher's distribution at each wanted position; ``seeds``: one per trajectory."""
        ...

    def release(self, keys: Sequence[str]) -> None:
        """Forgets the hidden states of ``keys``, if it has them."""
        ...


class HiddenRowsTeacher(ABC):
    """Whatever follows from the hidden states of encoded trajectories; where these come from is a subclass's matter.

    Keeps those of the eligible positions of each encoded trajectory until ``release``.
    Memory: 2 * G bytes per response token in bfloat16 (G: hidden size), 4 * G in float32.
    """

    def __init__(self, head_VG: Tensor, temperature: float, chunk_rows: int | None) -> None:
        self._head = head_VG
        self._temperature = temperature
        self._chunk_rows = chunk_rows
        self._hidden: dict[str, Tensor] = {}  # key -> [n, G]
        self._targets: dict[str, Tensor] = {}  # key -> [n]
        self._encoded: dict[str, Trajectory] = {}

    @abstractmethod
    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        """Each trajectory, in any order, with its hidden states ``[n, G]``: a tensor of its own."""

    def head(self) -> Tensor:
        return self._head

    @torch.inference_mode()
    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        for t, hidden_nG in self._hidden_of([t for t in trajectories if not self._has(t)]):
            self._hidden[t.key], self._encoded[t.key] = hidden_nG, t
            self._targets[t.key] = torch.as_tensor(t.response_ids, device=hidden_nG.device)

    def rows(self, wanted: RowRequest) -> Tensor:
        return torch.cat(self._picked(wanted)).clone()  # a copy outside inference mode, which autograd accepts

    def entropy_and_logprob(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden = torch.cat([self._known(key) for key in keys])
        targets = torch.cat([self._targets[key] for key in keys])
        found = row_statistics(hidden, self._head, targets, self._temperature, self._chunk_rows)
        return found.entropy_N, found.logprob_N

    @torch.no_grad()
    def classes(self, wanted: RowRequest, seeds: Sequence[int], options: ClassSettings) -> SparseTargets:
        hidden = torch.cat(self._picked(wanted))
        targets = torch.cat([self._targets[key][self._index(at)] for key, at in wanted])
        uniform = torch.cat([_uniform(seed, at, options.draws) for seed, (_, at) in zip(seeds, wanted, strict=True)])
        size = max(1, chunk_size(len(hidden), self._head, self._chunk_rows) // 4)  # rs_kd holds float64 copies
        project = Projector(self._head.to(hidden.dtype), size)
        parts = []
        for part in chunks(len(hidden), size):
            log_p = log_softmax_(project(hidden[part]).div_(self._temperature))
            parts.append(sample(log_p, Draws(options, targets[part], uniform[part])))
        return concatenate(parts)

    def release(self, keys: Sequence[str]) -> None:
        for key in keys:
            for kept in (self._hidden, self._targets, self._encoded):
                kept.pop(key, None)

    @property
    def stored(self) -> int:
        """Trajectories whose hidden states are kept."""
        return len(self._hidden)

    def _has(self, t: Trajectory) -> bool:
        """Whether these very tokens are encoded, not others under the same key."""
        known = self._encoded.get(t.key)
        return known is not None and known.digest == t.digest

    def _picked(self, wanted: RowRequest) -> list[Tensor]:
        return [self._known(key)[self._index(positions)] for key, positions in wanted]

    def _index(self, positions: Sequence[int]) -> Tensor:
        return torch.as_tensor(positions, dtype=torch.long, device=self._head.device)

    def _known(self, key: str) -> Tensor:
        if key not in self._hidden:
            raise KeyError(f"trajectory {key} has not been encoded by the teacher, or was released")
        return self._hidden[key]


class NoTeacher(HiddenRowsTeacher):
    """Stands where a teacher will be asked nothing."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0, 0), 1.0, None)

    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        raise RuntimeError("there is no teacher here to encode anything")


class Teacher(HiddenRowsTeacher):
    """A frozen model, run over trajectories in batches by token budget."""

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
        super().__init__(model.head_VH, temperature, chunk_rows)
        self._model = model
        self._tokens_per_batch = tokens_per_batch
        self._pad_id = pad_id
        self._packed = packed

    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        for group in micro_batches([t.length for t in trajectories], self._tokens_per_batch, self._packed):
            members = [trajectories[i] for i in group]
            batch = collate(members, self._pad_id, self._model.device, packed=self._packed)
            parts = self._model.hidden(batch).split(batch.counts)
            for t, rows in zip(members, parts, strict=True):
                yield t, rows.clone()  # a part of the group's tensor would keep all of it alive


def _uniform(seed: int, positions: Sequence[int], draws: int) -> Tensor:
    """float64 ``[len(positions), draws]``: what a position draws does not depend on which others are asked for."""
    last = max(positions, default=-1) + 1
    every = torch.rand(last, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return every[torch.as_tensor(positions, dtype=torch.long)]
