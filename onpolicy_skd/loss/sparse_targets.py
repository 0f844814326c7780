"""The class axis: a teacher distribution reduced to a few classes (docs/method.md, section 6).

``rs_kd`` draws classes; the truncations are pure functions of the largest probabilities at b positions.  To add one,
write a function and add a line to ``TRUNCATIONS``.  Sources: RS-KD (arXiv 2503.16870), sections 3.1 to 3.4, appendix K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onpolicy_skd.config.schema import ClassSettings


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Teacher distributions over a few classes at each of N positions: C slots, unused ones with probability 0.

    ``ids_NC`` are unique within a row's used slots.  ``residual``: what happens to the mass that is missing from a
    row.  ``none`` ignores it, ``ghost`` gives it to one class that stands for all others, ``smooth`` spreads it evenly.
    """

    ids_NC: torch.Tensor  # int64
    probs_NC: torch.Tensor  # float32
    residual: Literal["none", "ghost", "smooth"] = "none"

    def __getitem__(self, rows: slice) -> SparseTargets:
        return SparseTargets(self.ids_NC[rows], self.probs_NC[rows], self.residual)

    def to(self, device: torch.device | str) -> SparseTargets:
        return SparseTargets(self.ids_NC.to(device), self.probs_NC.to(device), self.residual)


@dataclass(frozen=True, slots=True)
class Draws:
    """Inputs of a class sampler in addition to the teacher's log-probabilities of b positions."""

    options: ClassSettings
    targets_b: Tensor  # int64; y
    uniform_bU: Tensor  # float64 in [0, 1); the random numbers of rs_kd, a row per position


def rs_kd(log_p_bV: Tensor, draws: Draws) -> SparseTargets:
    """Draw U classes with replacement from p^tau, each weighted p / p^tau, summed per class and normalized per row.

    With tau = 1 a class's probability is its count / U, an unbiased estimate of p.
    """
    tau = draws.options.proposal
    cumulative = (log_p_bV.double() * tau).softmax(-1).cumsum_(-1)
    u_bU = draws.uniform_bU.to(log_p_bV.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, u_bU, right=True).clamp_(max=log_p_bV.shape[1] - 1)
    ids = ids.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = first.long().cumsum(-1) - 1
    log_ratio = (1.0 - tau) * log_p_bV.gather(1, ids).double()  # log of p / p^tau, up to a constant per row
    weight = (log_ratio - log_ratio.amax(-1, keepdim=True)).exp()
    probs = torch.zeros_like(weight).scatter_add_(1, slot, weight)
    used = int(slot.max()) + 1
    unique = ids[:, :1].expand_as(ids).clone().scatter_(1, slot, ids)  # unused slots repeat a used class
    return SparseTargets(unique[:, :used], (probs / probs.sum(-1, keepdim=True))[:, :used].float())


def largest(log_p_bV: Tensor, k: int) -> SparseTargets:
    """Return the k largest probabilities in descending order; a truncation reads nothing else."""
    top = log_p_bV.topk(min(k, log_p_bV.shape[1]))
    return SparseTargets(top.indices, top.values.exp())


def top_k(known: SparseTargets, targets_b: Tensor, options: ClassSettings) -> SparseTargets:
    """Keep the K largest probabilities unchanged: biased, because the student learns them scaled up."""
    return known


def top_k_normalised(known: SparseTargets, targets_b: Tensor, options: ClassSettings) -> SparseTargets:
    """Keep the K largest probabilities, scaled to sum to 1."""
    return SparseTargets(known.ids_NC, known.probs_NC / known.probs_NC.sum(-1, keepdim=True))


def top_p(known: SparseTargets, targets_b: Tensor, options: ClassSettings) -> SparseTargets:
    """Keep the fewest largest probabilities that reach the mass p, at most K, unchanged."""
    before = known.probs_NC.cumsum(-1) - known.probs_NC
    probs = known.probs_NC.masked_fill(before >= options.p, 0.0)
    used = int((probs > 0).sum(-1).max())
    return SparseTargets(known.ids_NC[:, :used], probs[:, :used])


def ghost_token(known: SparseTargets, targets_b: Tensor, options: ClassSettings) -> SparseTargets:
    """Keep the K largest and one class that stands for all others, in teacher and student."""
    return SparseTargets(known.ids_NC, known.probs_NC, "ghost")


def naive_fix(known: SparseTargets, targets_b: Tensor, options: ClassSettings) -> SparseTargets:
    """Keep the K largest and give the residual mass to the ground truth y."""
    residual = (1.0 - known.probs_NC.sum(-1, keepdim=True)).clamp(min=0.0)
    at_target = known.ids_NC == targets_b[:, None]
    present = at_target.any(-1, keepdim=True)
    probs = torch.cat([known.probs_NC + residual * at_target, residual * ~present], 1)
    return SparseTargets(torch.cat([known.ids_NC, targets_b[:, None]], 1), probs)


def label_smoothing(known: SparseTargets, targets_b: Tensor, options: ClassSettings) -> SparseTargets:
    """Keep the K largest and spread the residual mass evenly over all classes."""
    return SparseTargets(known.ids_NC, known.probs_NC, "smooth")


Truncation = Callable[[SparseTargets, Tensor, ClassSettings], SparseTargets]

TRUNCATIONS: dict[str, Truncation] = {
    "top_k": top_k,
    "top_k_normalised": top_k_normalised,
    "top_p": top_p,
    "ghost_token": ghost_token,
    "naive_fix": naive_fix,
    "label_smoothing": label_smoothing,
}


def sample(log_p_bV: Tensor, draws: Draws) -> SparseTargets:
    """Reduce the distributions by the class sampler ``draws.options.sampler``."""
    options = draws.options
    if options.sampler == "rs_kd":
        return rs_kd(log_p_bV, draws)
    return TRUNCATIONS[options.sampler](largest(log_p_bV, options.k), draws.targets_b, options)


def concatenate(targets: Sequence[SparseTargets]) -> SparseTargets:
    """Concatenate rows, padded with unused slots to the widest; an empty input gives no rows."""
    if not targets:
        return SparseTargets(torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1))
    width = max(t.ids_NC.shape[1] for t in targets)
    ids, probs = [], []
    for t in targets:
        missing = width - t.ids_NC.shape[1]
        ids.append(torch.cat([t.ids_NC, t.ids_NC[:, :1].expand(-1, missing)], 1))
        probs.append(torch.nn.functional.pad(t.probs_NC, (0, missing)))
    return SparseTargets(torch.cat(ids), torch.cat(probs), targets[0].residual)
