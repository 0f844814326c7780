"""Trajectories as JSON records and named tensors, for checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onpolicy_skd.types import Trajectory

ARRAYS = ("prompt_ids", "response_ids", "sampler_logprobs", "sampler_entropy", "documents")


def trajectories_to_tensors(
    trajectories: Sequence[Trajectory],
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """As JSON records and named tensors, for a checkpoint."""
    records, tensors = [], {}
    for number, t in enumerate(trajectories):
        fields = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
        for name in ARRAYS:
            if (array := fields.pop(name)) is not None:
                tensors[f"ahead/{number}/{name}"] = torch.from_numpy(np.array(array))
        records.append(fields)
    return records, tensors


def trajectories_from_tensors(
    records: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> list[Trajectory]:
    """Inverse of ``trajectories_to_tensors``."""
    found = []
    for number, fields in enumerate(records):
        known = {name: tensors.get(f"ahead/{number}/{name}") for name in ARRAYS}
        arrays: dict[str, Any] = {name: None if t is None else t.numpy() for name, t in known.items()}
        found.append(Trajectory(**fields, **arrays))
    return found
