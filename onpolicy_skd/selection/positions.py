"""Position policies: scores become a selection and its weights.

Quotas depend on lengths alone, so a sample's weight per position, 1/quota, is known before any forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def quota(k: float, n: int) -> int:
    """ceil(k * n): positions selected of n eligible ones; at least one for n >= 1.

    k * n is rounded at the 9th decimal first, so that 0.2 * 15 is 3 and not 3.0000000000000004.
    """
    return math.ceil(round(k * n, 9))


def top_k(scores_N: Tensor, counts: Sequence[int], k: float) -> Tensor:
    """Indices into N of the quota(k, n) highest scores of **each** sequence, in order of position.

    Ties go to the earlier position.  Sequences are the consecutive runs of ``counts`` along N.
    Raises ValueError if a score is NaN.
    """
    if torch.isnan(scores_N).any():
        raise ValueError("a position score is NaN, so no selection can be made of it")
    picked, start = [], 0
    for n in counts:
        order = torch.argsort(scores_N[start : start + n], descending=True, stable=True)
        picked.append(start + order[: quota(k, n)].sort().values)
        start += n
    return torch.cat(picked)


@dataclass(frozen=True, slots=True)
class Selection:
    """K selected positions of B sequences: indices into the N eligible ones, and weights that sum to 1 per sequence."""

    indices_K: Tensor  # int64, ascending
    weights_K: Tensor  # float32
    counts: list[int]  # selected positions of each sequence; sums to K


def select(scores_N: Tensor, counts: Sequence[int], policy: str, k: float) -> Selection:
    """Applies ``policy`` to each sequence by itself; the result does not depend on what else is in the batch."""
    if policy == "full":
        indices, taken = torch.arange(len(scores_N), device=scores_N.device), list(counts)
    elif policy == "top_k":
        indices, taken = top_k(scores_N, counts, k), [quota(k, n) for n in counts]
    else:
        raise ValueError(f"unknown position policy {policy!r}; accepted: top_k, full")
    weights = torch.cat([torch.full((m,), 1.0 / m) for m in taken])
    return Selection(indices, weights.to(scores_N.device), taken)
