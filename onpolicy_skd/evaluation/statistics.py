"""Statistics of a few seeds on a test set: means with intervals, and paired differences with their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

LEVEL = 0.95
BLOCK = 1_000_000  # problem indices of resamples that are in memory at once
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean over seeds, with its interval."""

    mean: float
    std: float | None  # sample standard deviation; None for a single value
    low: float | None  # 95 % interval of the mean, Student's t: seeds are few
    high: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of one method minus the mean of another on the same problems."""

    mean: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided: probability that noise alone gives a difference at least as large


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of ``values`` with its interval.  Raises ValueError for no values."""
    if not len(values):
        raise ValueError("an estimate needs at least one value")
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * std / math.sqrt(count)
    return Estimate(mean, std, mean - half, mean + half, count)


def paired_difference(first_SP: np.ndarray, second_RP: np.ndarray, draws: int = 10_000, seed: int = 0) -> Difference:
    """Bootstrap the difference of two methods, each with some seeds (rows), on the same P problems (columns).

    Each resample draws P problems with replacement, the same for both methods, which makes it paired, and seeds with
    replacement for each method, so that both sources of noise count.  A few seeds underestimate their noise, so they
    are first moved away from their mean (``_widened``): this prevents too many significant differences, at the price of
    too few where seeds agree.  With a single seed, the interval covers the noise of the problems only.  Raises
    ValueError for different problems.
    """
    first_SP, second_RP = np.asarray(first_SP, np.float64), np.asarray(second_RP, np.float64)
    if first_SP.shape[1] != second_RP.shape[1] or 0 in (*first_SP.shape, *second_RP.shape):
        raise ValueError(f"not the same problems: {first_SP.shape[1]} and {second_RP.shape[1]}")
    rng = np.random.default_rng(seed)
    mean = float(first_SP.mean() - second_RP.mean())
    freedom = len(first_SP) + len(second_RP) - 2
    first_SP, second_RP = _widened(first_SP, freedom), _widened(second_RP, freedom)
    block = max(1, BLOCK // first_SP.shape[1])
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    differences = np.concatenate([_resampled_differences(rng, first_SP, second_RP, size) for size in sizes])
    tail = (1.0 - LEVEL) / 2
    low, high = np.quantile(differences, [tail, 1.0 - tail])
    below, above = (1 + (differences <= 0).sum()) / (1 + draws), (1 + (differences >= 0).sum()) / (1 + draws)
    p = float(min(1.0, 2.0 * min(below, above)))
    return Difference(mean, float(low), float(high), p)


def _resampled_differences(
    rng: np.random.Generator, first_SP: np.ndarray, second_RP: np.ndarray, draws: int
) -> np.ndarray:
    """Return the differences of ``draws`` resamples of problems and seeds."""
    problems = first_SP.shape[1]
    counts_DP = _counts(rng.integers(0, problems, (draws, problems)), problems)
    sums_D = []
    for rows_P in (first_SP, second_RP):
        seeds = len(rows_P)
        counts = _counts(rng.integers(0, seeds, (draws, seeds)), seeds)
        sums_D.append((counts * (counts_DP @ rows_P.T)).sum(1) / seeds)
    return (sums_D[0] - sums_D[1]) / problems


def _counts(index_DN: np.ndarray, size: int) -> np.ndarray:
    """Return how often each of ``size`` indices occurs in each row, float64 of shape (D, size)."""
    draws = len(index_DN)
    offset = size * np.arange(draws)[:, None]
    return np.bincount((index_DN + offset).ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)


def _widened(rows_SP: np.ndarray, freedom: int) -> np.ndarray:
    """Move the rows of the seeds away from their mean.

    The factor is sqrt(S / (S - 1)), since a resample of S seeds has (S - 1) / S of the true variance, times Student's
    quantile over the normal one, since that variance is an estimate.
    """
    seeds = len(rows_SP)
    if seeds < 2:
        return rows_SP
    mean_P, tail = rows_SP.mean(0), 0.5 + LEVEL / 2
    factor = math.sqrt(seeds / (seeds - 1)) * float(stats.t.ppf(tail, freedom) / stats.norm.ppf(tail))
    return mean_P + factor * (rows_SP - mean_P)


def significant(p_values: Mapping[Key, float], level: float = 1.0 - LEVEL) -> set[Key]:
    """Return the significant keys (Holm, 1979): the probability that any of them is false is at most ``level``."""
    significant_keys: set[Key] = set()
    ordered = sorted(p_values, key=lambda key: p_values[key])
    for i, key in enumerate(ordered):
        if p_values[key] > level / (len(ordered) - i):
            break
        significant_keys.add(key)
    return significant_keys
