"""What a few seeds and a test set can tell: means with intervals, and paired differences with their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

LEVEL = 0.95
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    std: float | None  # sample standard deviation; None of a single value
    low: float | None  # 95 % interval of the mean, Student's t: seeds are few
    high: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of one method minus the mean of another on the same problems."""

    mean: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided: how often noise alone would give a difference as large


def estimate(values: Sequence[float]) -> Estimate:
    """Raises ValueError of no values."""
    if not len(values):
        raise ValueError("an estimate needs at least one value")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * std / math.sqrt(count)
    return Estimate(mean, std, mean - half, mean + half, count)


def paired_difference(one_SP: np.ndarray, other_RP: np.ndarray, draws: int = 10_000, seed: int = 0) -> Difference:
    """Bootstrap of the difference of two methods, each with some seeds (rows), on the same P problems (columns).

    Each draw takes P problems with replacement, the same for both methods, which is what makes it paired, and seeds
    with replacement for each method, so that both sources of noise count.  A few seeds show too little of theirs: they
    are first moved away from their mean (``_widened``), so that differences are not called noise too seldom, at the
    price of calling them so too often where seeds agree.  One seed shows nothing of it: the interval is then of the
    problems alone.  Raises ValueError for different problems.
    """
    one_SP, other_RP = np.asarray(one_SP, np.float64), np.asarray(other_RP, np.float64)
    if one_SP.shape[1] != other_RP.shape[1] or 0 in (*one_SP.shape, *other_RP.shape):
        raise ValueError(f"not the same problems: {one_SP.shape[1]} and {other_RP.shape[1]}")
    draw = np.random.default_rng(seed)
    problems, mean = one_SP.shape[1], float(one_SP.mean() - other_RP.mean())
    freedom = len(one_SP) + len(other_RP) - 2
    one_SP, other_RP = _widened(one_SP, freedom), _widened(other_RP, freedom)
    found = np.empty(draws)
    for i in range(draws):
        weights_P = np.bincount(draw.integers(0, problems, problems), minlength=problems)
        means = [rows_P[draw.integers(0, len(rows_P), len(rows_P))].mean(0) for rows_P in (one_SP, other_RP)]
        found[i] = weights_P @ (means[0] - means[1]) / problems
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1.0 - tail])
    below, above = (1 + (found <= 0).sum()) / (1 + draws), (1 + (found >= 0).sum()) / (1 + draws)
    p = float(min(1.0, 2.0 * min(below, above)))
    return Difference(mean, float(low), float(high), p)


def _widened(rows_SP: np.ndarray, freedom: int) -> np.ndarray:
    """Seeds moved away from their mean: by sqrt(S / (S - 1)), since a draw of S of them has (S - 1) / S of the variance
    it should have, and by Student's quantile over the normal one, since that variance is itself a guess."""
    seeds = len(rows_SP)
    if seeds < 2:
        return rows_SP
    mean_P, tail = rows_SP.mean(0), 0.5 + LEVEL / 2
    factor = math.sqrt(seeds / (seeds - 1)) * float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail))
    return mean_P + factor * (rows_SP - mean_P)


def significant(p_values: Mapping[Key, float], level: float = 1.0 - LEVEL) -> set[Key]:
    """Those that stand out among all (Holm, 1979): with chance ``level`` at most there is a false one among them."""
    found: set[Key] = set()
    ordered = sorted(p_values, key=lambda key: p_values[key])
    for rank, key in enumerate(ordered):
        if p_values[key] > level / (len(ordered) - rank):
            break
        found.add(key)
    return found
