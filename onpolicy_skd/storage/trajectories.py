"""Trajectories as JSON records and named tensors, for checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onpolicy_skd.types import Trajectory

ARRAYS = (
    *("prompt_ids", "response_ids", "sampler_logprobs", "sampler_entropy", "documents", "supervised"),
    "teacher_prompt_ids",
)


def trajectories_to_tensors(
    trajectories: Sequence[Trajectory],
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the plain fields as JSON records and the arrays as named tensors."""
    records, tensors = [], {}
    for number, t in enumerate(trajectories):
        fields = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
        for name in ARRAYS:
            if (array := fields.pop(name)) is not None:
                tensors[_key(number, name)] = torch.from_numpy(np.array(array))
        records.append(fields)
    return records, tensors


def trajectories_from_tensors(
    records: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> list[Trajectory]:
    """Invert ``trajectories_to_tensors``."""
    trajectories = []
    for number, fields in enumerate(records):
        saved = {name: tensors.get(_key(number, name)) for name in ARRAYS}
        arrays: dict[str, Any] = {name: None if t is None else np.array(t) for name, t in saved.items()}
        trajectories.append(Trajectory(**fields, **arrays))
    return trajectories


def _key(number: int, name: str) -> str:
    return f"rollouts/{number}/{name}"
