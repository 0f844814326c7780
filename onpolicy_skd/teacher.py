"""The frozen teacher: encodes trajectories once, then hands out hidden rows or scalars for what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from onpolicy_skd.lm_head import row_statistics
from onpolicy_skd.models import SplitModel
from onpolicy_skd.trajectory import Trajectory, collate, micro_batches

Wanted = Sequence[tuple[str, Sequence[int]]]  # trajectory key, indices into its n eligible positions


class TeacherRows(Protocol):
    """What the learner needs of a teacher, in its own process or elsewhere."""

    def head(self) -> Tensor:
        """The LM head ``[V, G]``."""
        ...

    def rows(self, wanted: Wanted) -> Tensor:
        """``[K, G]``: last hidden states (after the final norm) at the wanted positions, in the order asked."""
        ...


class Teacher:
    """Keeps the hidden states of the eligible positions of each encoded trajectory until ``release``.

    Memory: 2 * G bytes per response token in bfloat16 (G: hidden size), 4 * G in float32.
    """

    def __init__(self, model: SplitModel, tokens_per_batch: int, pad_id: int, temperature: float = 1.0) -> None:
        self._model = model
        self._model.model.eval().requires_grad_(False)
        self._tokens_per_batch = tokens_per_batch
        self._pad_id = pad_id
        self._temperature = temperature
        self._hidden: dict[str, Tensor] = {}  # key -> [n, G]
        self._targets: dict[str, Tensor] = {}  # key -> [n]

    def head(self) -> Tensor:
        return self._model.head_VH

    @torch.inference_mode()
    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        """Runs the trunk over ``trajectories`` in batches by token budget."""
        for group in micro_batches([t.length for t in trajectories], self._tokens_per_batch):
            members = [trajectories[i] for i in group]
            batch = collate(members, self._pad_id, self._model.device)
            hidden = self._model.hidden(batch)
            for t, rows, targets in zip(
                members, hidden.split(batch.counts), batch.targets.split(batch.counts), strict=True
            ):
                self._hidden[t.key], self._targets[t.key] = rows, targets

    def rows(self, wanted: Wanted) -> Tensor:
        """See ``TeacherRows.rows``.  Raises KeyError for a trajectory that was not encoded."""
        parts = [self._known(key)[torch.as_tensor(positions, dtype=torch.long)] for key, positions in wanted]
        return torch.cat(parts).clone()  # a copy outside inference mode, which autograd accepts

    def scalars(self, key: str) -> tuple[Tensor, Tensor]:
        """Entropy H(p_t) and log p_t(y_t), float32 ``[n]`` each, nats: per position without shipping rows."""
        return row_statistics(self._known(key), self.head(), self._targets[key], self._temperature)

    def release(self, keys: Sequence[str]) -> None:
        """Forgets the hidden states of ``keys``."""
        for key in keys:
            self._hidden.pop(key, None)
            self._targets.pop(key, None)

    @property
    def stored(self) -> int:
        """Trajectories whose hidden states are kept."""
        return len(self._hidden)

    def _known(self, key: str) -> Tensor:
        if key not in self._hidden:
            raise KeyError(f"trajectory {key} has not been encoded by the teacher, or was released")
        return self._hidden[key]
