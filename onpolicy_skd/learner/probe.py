"""A small fixed batch for measuring progress: the same trajectories and teacher rows during a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.types import Trajectory

PROBE_SAMPLES = 8  # samples of the first batch that measure the bandit's progress
ARRAYS = {  # fields of a trajectory: their names in a state dict
    "prompt_ids": "prompt", "response_ids": "response", "documents": "documents", "supervised": "supervised",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Probe:
    """Trajectories with the teacher's hidden states."""

    trajectories: list[Trajectory]
    rows: dict[str, Tensor]  # the teacher's hidden states [n, G] by trajectory key

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], teacher: TeacherRows) -> Probe:
        """Make a probe of ``trajectories``, which the teacher must have encoded."""
        rows = {f"probe/{i}": teacher.rows([(t.key, range(len(t.target_ids)))]) for i, t in enumerate(trajectories)}
        return cls([_trajectory(i, {n: getattr(t, n) for n in ARRAYS}) for i, t in enumerate(trajectories)], rows)

    def state_dict(self) -> dict[str, Tensor]:
        state = {}
        for i, t in enumerate(self.trajectories):
            arrays = {name: getattr(t, field) for field, name in ARRAYS.items()}
            state |= {f"{i}/{name}": torch.as_tensor(a) for name, a in arrays.items() if a is not None}
            state[f"{i}/rows"] = self.rows[t.key]
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Probe:
        numbers = range(sum(name.endswith("/rows") for name in state))
        trajectories = []
        for i in numbers:
            saved = {field: state.get(f"{i}/{name}") for field, name in ARRAYS.items()}
            trajectories.append(_trajectory(i, {f: None if a is None else a.numpy() for f, a in saved.items()}))
        return cls(trajectories, {f"probe/{i}": state[f"{i}/rows"] for i in numbers})


def _trajectory(number: int, arrays: Mapping[str, Any]) -> Trajectory:
    t = Trajectory(f"probe/{number}", **arrays, sampler_logprobs=np.empty(0), finish_reason="stop", policy_version=None)
    return dataclasses.replace(t, sampler_logprobs=np.zeros(len(t.target_ids), np.float32))
