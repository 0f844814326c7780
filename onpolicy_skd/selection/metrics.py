"""Position scores u(t): higher is selected first (docs/method.md, section 4).

A metric is a function of ``Signals`` that returns float32 ``[N]``, one score per eligible position; adding one is one
function and one line in ``METRICS``, or a function in your code named ``module:function`` in ``positions.metric``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LEAST_CE = 1e-6  # nats; floor of the teacher's cross-entropy in ce_ratio
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Smallest and largest values over the eligible positions of a whole optimizer batch, nats."""

    entropy: Range
    kl: Range


class Signals:
    """Numbers of the N eligible positions of B sequences, in nats, each computed when it is first read.

    ``teacher_entropy_N`` and ``teacher_ce_N`` cost two numbers per position on the wire, ``kl_N`` and
    ``reverse_kl_N`` the teacher's hidden rows at all eligible positions and a pass over both heads.
    """

    def __init__(
        self,
        entropy_and_ce: Callable[[], tuple[Tensor, Tensor]],
        counts: Sequence[int],
        seeds: Sequence[int],
        entropy_and_logprob: Callable[[], tuple[Tensor, Tensor]] | None = None,
        divergence: Callable[[str], Tensor] | None = None,
        ranges: Ranges | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._fetch_entropy_and_ce = entropy_and_ce  # () -> H(q_t) and -log q_t(y_t)
        self.counts = counts  # eligible positions of each sequence; sums to N
        self.seeds = seeds  # one per sequence, for random metrics
        self._fetch_entropy_and_logprob = entropy_and_logprob  # () -> H(p_t) and log p_t(y_t)
        self._divergence = divergence  # "forward_kl" or "reverse_kl" -> its value per position
        self._ranges = ranges
        self.device = device

    @cached_property
    def _entropy_and_ce(self) -> tuple[Tensor, Tensor]:
        return self._fetch_entropy_and_ce()

    @property
    def entropy_N(self) -> Tensor:
        """H(q_t)."""
        return self._entropy_and_ce[0]

    @property
    def ce_N(self) -> Tensor:
        """-log q_t(y_t)."""
        return self._entropy_and_ce[1]

    @cached_property
    def _entropy_and_logprob(self) -> tuple[Tensor, Tensor]:
        if self._fetch_entropy_and_logprob is None:
            raise RuntimeError("this position score needs the teacher, and there is none here")
        return self._fetch_entropy_and_logprob()

    @property
    def teacher_entropy_N(self) -> Tensor:
        """H(p_t)."""
        return self._entropy_and_logprob[0]

    @property
    def teacher_ce_N(self) -> Tensor:
        """-log p_t(y_t)."""
        return -self._entropy_and_logprob[1]

    @cached_property
    def kl_N(self) -> Tensor:
        """KL(p_t || q_t)."""
        return self._value("forward_kl")

    @cached_property
    def reverse_kl_N(self) -> Tensor:
        """KL(q_t || p_t)."""
        return self._value("reverse_kl")

    @property
    def ranges(self) -> Ranges:
        """Ranges over the whole optimizer batch, computed beforehand for the metrics in ``WHOLE_BATCH`` only."""
        if self._ranges is None:
            raise RuntimeError("the ranges of the optimizer batch are known for metrics listed in WHOLE_BATCH only")
        return self._ranges

    def _value(self, kind: str) -> Tensor:
        if self._divergence is None:
            raise RuntimeError("this position score needs the teacher, and there is none here")
        return self._divergence(kind).clamp(min=0.0)  # rounding may leave a divergence just below 0


def student_entropy(signals: Signals) -> Tensor:
    """H(q_t)."""
    return signals.entropy_N


def teacher_entropy(signals: Signals) -> Tensor:
    """H(p_t)."""
    return signals.teacher_entropy_N


def student_ce(signals: Signals) -> Tensor:
    """-log q_t(y_t) (Wang et al., 2021)."""
    return signals.ce_N


def teacher_ce(signals: Signals) -> Tensor:
    """-log p_t(y_t) (Zhong et al., 2024)."""
    return signals.teacher_ce_N


def kl(signals: Signals) -> Tensor:
    """KL(p_t || q_t): always forward, whichever divergence is trained."""
    return signals.kl_N


def reverse_kl(signals: Signals) -> Tensor:
    """KL(q_t || p_t)."""
    return signals.reverse_kl_N


def kl_plus_entropy(signals: Signals) -> Tensor:
    """KL(p_t || q_t) + H(q_t)."""
    return signals.kl_N + signals.entropy_N


def ce_ratio(signals: Signals) -> Tensor:
    """CE(y_t, q_t) / max(CE(y_t, p_t), 1e-6) (DA-KD)."""
    return signals.ce_N / signals.teacher_ce_N.clamp(min=LEAST_CE)


def ce_ratio_plus_entropy(signals: Signals) -> Tensor:
    """ce_ratio + H(q_t), in raw nats."""
    return ce_ratio(signals) + signals.entropy_N


def tip_soft_or(signals: Signals) -> Tensor:
    """1 - (1 - h)(1 - d): h, d are student entropy and KL, scaled to [0, 1] over the optimizer batch (TIP)."""
    h = _scaled(signals.entropy_N, signals.ranges.entropy)
    d = _scaled(signals.kl_N, signals.ranges.kl)
    return 1.0 - (1.0 - h) * (1.0 - d)


def random(signals: Signals) -> Tensor:
    """Uniform on [0, 1), a function of each sequence's seed only."""
    scores = [
        torch.rand(n, generator=torch.Generator().manual_seed(seed))
        for n, seed in zip(signals.counts, signals.seeds, strict=True)
    ]
    return torch.cat(scores).to(signals.entropy_N.device)


def prefix(signals: Signals) -> Tensor:
    """-t: the first positions of each response."""
    steps = [-torch.arange(n, dtype=torch.float32) for n in signals.counts]
    return torch.cat(steps).to(signals.entropy_N.device)


Metric = Callable[[Signals], Tensor]

METRICS: dict[str, Metric] = {
    "student_entropy": student_entropy,
    "teacher_entropy": teacher_entropy,
    "student_ce": student_ce,
    "teacher_ce": teacher_ce,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "kl_plus_entropy": kl_plus_entropy,
    "ce_ratio": ce_ratio,
    "ce_ratio_plus_entropy": ce_ratio_plus_entropy,
    "tip_soft_or": tip_soft_or,
    "random": random,
    "prefix": prefix,
}
WHOLE_BATCH = frozenset({"tip_soft_or"})  # their scores depend on the ranges of the optimizer batch


def _scaled(values_N: Tensor, bounds: Range) -> Tensor:
    low, high = bounds
    return ((values_N - low) / (high - low)).clamp(0.0, 1.0) if high > low else torch.zeros_like(values_N)
