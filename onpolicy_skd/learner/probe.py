"""A small fixed batch for measuring progress: the same trajectories and teacher rows during a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.types import Trajectory


@dataclass(frozen=True, slots=True)
class Probe:
    """Trajectories with the teacher's hidden states."""

    trajectories: list[Trajectory]
    rows: dict[str, Tensor]  # the teacher's hidden states [n, G] by trajectory key

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], teacher: TeacherRows) -> Probe:
        """Make a probe of ``trajectories``, which the teacher must have encoded."""
        rows = {f"probe/{i}": teacher.rows([(t.key, range(len(t.response_ids)))]) for i, t in enumerate(trajectories)}
        return cls(
            [_trajectory(i, t.prompt_ids, t.response_ids, t.documents) for i, t in enumerate(trajectories)], rows
        )

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for i, t in enumerate(self.trajectories):
            state |= {f"{i}/prompt": torch.as_tensor(t.prompt_ids), f"{i}/response": torch.as_tensor(t.response_ids)}
            state[f"{i}/rows"] = self.rows[t.key]
            if t.documents is not None:
                state[f"{i}/documents"] = torch.as_tensor(t.documents)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Probe:
        numbers = range(sum(name.endswith("/rows") for name in state))
        trajectories = []
        for i in numbers:
            documents = state.get(f"{i}/documents")
            prompt, response = state[f"{i}/prompt"].numpy(), state[f"{i}/response"].numpy()
            trajectories.append(_trajectory(i, prompt, response, None if documents is None else documents.numpy()))
        return cls(trajectories, {f"probe/{i}": state[f"{i}/rows"] for i in numbers})


def _trajectory(number: int, prompt: np.ndarray, response: np.ndarray, documents: np.ndarray | None) -> Trajectory:
    zeros = np.zeros(len(response), np.float32)
    return Trajectory(f"probe/{number}", prompt, response, zeros, "stop", None, documents=documents)
