"""Position policies: scores become a selection and its weights (docs/method.md, section 4).

A policy is a pure function of the scores of B sequences and a ``Context``.  To add one, write a function and add a line
to ``POLICIES``, or name a function of your code, ``module:function``, in ``positions.policy``.  A policy looks at one
sequence at a time, so a selection does not depend on the rest of the batch; only ``gls`` compares with earlier batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onpolicy_skd.config.schema import PositionSettings
from onpolicy_skd.types import seed_of


def num_selected(k: float, n: int) -> int:
    """Return ceil(k * n), the number of positions to select from n eligible ones; at least one for n >= 1.

    k * n is rounded at the 9th decimal first, so that 0.2 * 15 is 3 and not 3.0000000000000004.
    """
    return math.ceil(round(k * n, 9))


@dataclass(frozen=True, slots=True)
class Selection:
    """K selected positions of B sequences: indices into the N eligible ones, and the weight of each.

    Weights from a policy sum to 1 per sequence, except under ``sampled_unbiased`` (at most 1, in expectation) and in
    sequences without selected positions (0).  ``positions.weighting`` scales them afterwards.
    """

    indices_K: Tensor  # int64, ascending
    weights_K: Tensor  # float32
    counts: list[int]  # selected positions of each sequence; sums to K


@dataclass(frozen=True, slots=True)
class Context:
    """Inputs of a policy in addition to the scores."""

    k: float  # share of positions to select at this step
    step: int = 0  # optimizer steps done
    seeds: Sequence[int] = ()  # one per sequence
    threshold: float | None = None  # of gls; None before the first batch
    options: PositionSettings = field(default_factory=PositionSettings)


def top_k(scores_N: Tensor, counts: Sequence[int], context: Context) -> Selection:
    """Select the num_selected(k, n) highest scores of **each** sequence, weighted equally; ties go to the earlier."""
    return each_sequence(scores_N, counts, lambda _, u_n: (_highest(u_n, num_selected(context.k, len(u_n))), None))


def full(scores_N: Tensor, counts: Sequence[int], context: Context) -> Selection:
    """Select all eligible positions, weighted equally."""
    return each_sequence(scores_N, counts, lambda _, u_n: (_all(u_n), None))


def weighted(scores_N: Tensor, counts: Sequence[int], context: Context) -> Selection:
    """Select all eligible positions, weighted in proportion to their scores (Guo et al., 2024)."""
    return each_sequence(scores_N, counts, lambda _, u_n: (_all(u_n), _shares(u_n)))


def gls(scores_N: Tensor, counts: Sequence[int], context: Context) -> Selection:
    """Select scores at or above a threshold from earlier batches (Wang et al., 2021); top_k before there is one.

    Long or hard sequences get more positions and easy ones fewer, down to none.
    """
    threshold = context.threshold
    if threshold is None:
        return top_k(scores_N, counts, context)
    return each_sequence(scores_N, counts, lambda _, u_n: ((u_n >= threshold).nonzero()[:, 0], None))


def curriculum(scores_N: Tensor, counts: Sequence[int], context: Context) -> Selection:
    """Select a window of num_selected(k, n) neighbors in the order of scores, which slides from lowest to highest.

    From ``curriculum_steps`` on it equals top_k.
    """
    done = min(1.0, context.step / context.options.curriculum_steps)

    def window(_: int, u_n: Tensor) -> tuple[Tensor, None]:
        width = num_selected(context.k, len(u_n))
        start = round(done * (len(u_n) - width))
        return _order(u_n).flip(0)[start : start + width], None

    return each_sequence(scores_N, counts, window)


def sampled(scores_N: Tensor, counts: Sequence[int], context: Context) -> Selection:
    """Draw num_selected(k, n) positions with probability w proportional to the score (Pos RS-KD).

    Weight = count / num_selected: unbiased for the score-weighted mean, the sum of w L.
    """
    return each_sequence(scores_N, counts, lambda i, u_n: _sample(u_n, context, context.seeds[i], unbiased=False))


def sampled_unbiased(scores_N: Tensor, counts: Sequence[int], context: Context) -> Selection:
    """Draw as ``sampled`` with each draw weighted 1 / (n w) (Pos RS-KD*): unbiased for the plain mean (1/n) sum of L.

    Positions that cannot be drawn (score 0, or before ``skip_first``) are missing from that sum.
    """
    return each_sequence(scores_N, counts, lambda i, u_n: _sample(u_n, context, context.seeds[i], unbiased=True))


Policy = Callable[[Tensor, Sequence[int], Context], Selection]

POLICIES: dict[str, Policy] = {
    "top_k": top_k,
    "gls": gls,
    "curriculum": curriculum,
    "sampled": sampled,
    "sampled_unbiased": sampled_unbiased,
    "weighted": weighted,
    "full": full,
    "bandit": top_k,  # the bandit chooses the metric
}


def scheduled_k(options: PositionSettings, step: int) -> float:
    """Return k at ``step``: from ``k_start`` linearly to ``k`` over ``schedule_steps`` (EKD)."""
    if options.k_start is None:
        return options.k
    return options.k_start + (options.k - options.k_start) * min(1.0, step / options.schedule_steps)


Pick = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]


def each_sequence(scores_N: Tensor, counts: Sequence[int], pick: Pick) -> Selection:
    """Apply ``pick`` to each sequence and concatenate the selections.

    ``pick`` takes a sequence's number and scores ``[n]`` and returns indices into them, and weights or None for equal
    ones.  Raises ValueError on NaN.
    """
    if torch.isnan(scores_N).any():
        raise ValueError("a position score is NaN, so no position can be selected")
    indices, weights, taken, start = [], [], [], 0
    for i, u_n in enumerate(scores_N.split(list(counts))):
        chosen, weight = pick(i, u_n) if len(u_n) else (_all(u_n), None)  # all tokens may be masked
        if weight is None:
            weight = torch.full((len(chosen),), 1.0 / max(1, len(chosen)), device=u_n.device)
        order = chosen.argsort()
        indices.append(start + chosen[order])
        weights.append(weight[order])
        taken.append(len(chosen))
        start += len(u_n)
    return Selection(torch.cat(indices), torch.cat(weights), taken)


def _order(u_n: Tensor) -> Tensor:
    """Return indices from the highest to the lowest score; ties in order of position."""
    return torch.argsort(u_n, descending=True, stable=True)


def _highest(u_n: Tensor, count: int) -> Tensor:
    return _order(u_n)[:count]


def _all(u_n: Tensor) -> Tensor:
    return torch.arange(len(u_n), device=u_n.device)


def _shares(u_n: Tensor) -> Tensor:
    """Return the scores over their sum; equal shares if all are 0.  Raises ValueError for a negative score."""
    if (u_n < 0).any():
        raise ValueError("a position score is negative, so the scores give neither probabilities nor weights")
    total = u_n.sum()
    return u_n / total if total > 0 else torch.full_like(u_n, 1.0 / len(u_n))


def _sample(u_n: Tensor, context: Context, seed: int, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Draw num_selected(k, n) times with replacement; return the unique positions and their weights.

    The options are those of appendix D of the SE-KD paper.  A share ``coverage`` of the budget goes to the highest
    scores with their exact weights, and the draws are made among the rest: both estimates stay unbiased.
    """
    options, n = context.options, len(u_n)
    skipped = options.skip_first if n > options.skip_first else 0  # shorter responses have no other positions
    scores = u_n[skipped:].to("cpu", torch.float64).clamp(max=math.inf if options.clip is None else options.clip)
    w = _shares(_shares(scores) ** (1.0 / options.smoothing))
    budget = num_selected(context.k, n)
    certain = _highest(w, math.floor(round(options.coverage * budget, 9)))  # at least one draw remains: coverage < 1
    weight = torch.zeros_like(w)
    weight[certain] = 1.0 / n if unbiased else w[certain]
    rest = w.clone()
    rest[certain] = 0.0
    draws, mass = budget - len(certain), rest.sum()
    if mass > 0:
        rng = torch.Generator().manual_seed(seed_of(seed, "draws"))  # independent of random scores
        drawn = torch.multinomial(rest, draws, replacement=True, generator=rng)
        each = mass / (draws * n * w) if unbiased else (mass / draws).expand_as(w)
        weight.index_add_(0, drawn, each[drawn])
    chosen = weight.nonzero()[:, 0]
    return (skipped + chosen).to(u_n.device), weight[chosen].to(u_n.device, torch.float32)
