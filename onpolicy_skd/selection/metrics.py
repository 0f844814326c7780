"""Position scores u(t): higher is selected first.

A metric is a function of ``Signals`` that returns float32 ``[N]``, one score per eligible position; adding one is
one function and one line in ``METRICS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known of the N eligible positions of B sequences without the teacher; nats."""

    entropy_N: Tensor  # H(q_t) at the distillation temperature
    logprob_N: Tensor  # log q_t(y_t) at temperature 1
    counts: Sequence[int]  # eligible positions of each sequence; sums to N
    seeds: Sequence[int]  # one per sequence, for metrics that draw


def student_entropy(signals: Signals) -> Tensor:
    return signals.entropy_N


def student_ce(signals: Signals) -> Tensor:
    return -signals.logprob_N


def random(signals: Signals) -> Tensor:
    """Uniform on [0, 1), a function of each sequence's seed alone."""
    draws = [
        torch.rand(n, generator=torch.Generator().manual_seed(seed))
        for n, seed in zip(signals.counts, signals.seeds, strict=True)
    ]
    return torch.cat(draws).to(signals.entropy_N.device)


def prefix(signals: Signals) -> Tensor:
    """-t: the first positions of each response."""
    steps = [-torch.arange(n, dtype=torch.float32) for n in signals.counts]
    return torch.cat(steps).to(signals.entropy_N.device)


METRICS: dict[str, Callable[[Signals], Tensor]] = {
    "student_entropy": student_entropy,
    "student_ce": student_ce,
    "random": random,
    "prefix": prefix,
}
