"""Position scores u(t): higher is selected first (docs/method.md, section 4).

A metric is a function of ``Signals`` that returns float32 ``[N]``, one score per eligible position.  To add one, write
a function and add a line to ``METRICS``, or name a function of your code, ``module:function``, in ``positions.metric``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from onpolicy_skd.loss.teacher_signals import TeacherSignals

LEAST_CE = 1e-6  # nats; floor of the teacher's cross-entropy in ce_ratio
Ranges = Mapping[str, tuple[float, float]]  # least and largest value of a signal over a whole optimizer batch, by name


class Signals:
    """Numbers of the N eligible positions of B sequences, in nats, each computed when it is first read.

    ``teacher_entropy_N`` and ``teacher_ce_N`` transfer two numbers per position.  ``kl_N``, ``reverse_kl_N``,
    ``teacher_mass_N``, ``overlap_N`` and ``margin_N`` share the teacher's hidden rows at all eligible positions and one
    pass over both heads.
    """

    def __init__(
        self,
        entropy_and_ce: Callable[[], tuple[Tensor, Tensor]],
        counts: Sequence[int],
        seeds: Sequence[int],
        entropy_and_logprob: Callable[[], tuple[Tensor, Tensor]] | None = None,
        teacher_signals: Callable[[], TeacherSignals] | None = None,
        ranges: Ranges | None = None,
        device: torch.device | str = "cpu",
        targets_N: Tensor | None = None,
    ) -> None:
        self._fetch_entropy_and_ce = entropy_and_ce  # () -> H(q_t) and -log q_t(y_t)
        self.counts = counts  # eligible positions of each sequence; sums to N
        self.seeds = seeds  # one per sequence, for random metrics
        self._fetch_entropy_and_logprob = entropy_and_logprob  # () -> H(p_t) and log p_t(y_t)
        self._fetch_teacher_signals = teacher_signals
        self._ranges = ranges or {}
        self.device = device
        self._targets_N = targets_N

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

    @property
    def targets_N(self) -> Tensor:
        """Token ids y_t, int64."""
        if self._targets_N is None:
            raise RuntimeError("the response tokens are not known here")
        return self._targets_N

    @cached_property
    def _teacher_signals(self) -> TeacherSignals:
        if self._fetch_teacher_signals is None:
            raise RuntimeError("this position score needs the teacher, and there is none here")
        return self._fetch_teacher_signals()

    @property
    def kl_N(self) -> Tensor:
        """KL(p_t || q_t)."""
        return self._teacher_signals.forward_kl_N.clamp(min=0.0)  # rounding may leave a divergence just below 0

    @property
    def reverse_kl_N(self) -> Tensor:
        """KL(q_t || p_t)."""
        return self._teacher_signals.reverse_kl_N.clamp(min=0.0)

    @property
    def teacher_mass_N(self) -> Tensor:
        """The teacher's probability of the student's K most likely classes (``positions.top_classes``)."""
        return self._teacher_signals.teacher_mass_N

    @property
    def overlap_N(self) -> Tensor:
        """Share of these K classes that are among the teacher's K most likely ones."""
        return self._teacher_signals.overlap_N

    @property
    def margin_N(self) -> Tensor:
        """The teacher's largest minus second largest probability within these classes."""
        return self._teacher_signals.margin_N

    def scaled(self, name: str) -> Tensor:
        """Return a signal, for example ``kl_N``, scaled to [0, 1] over the whole optimizer batch; 0 if all are equal.

        Raises RuntimeError if the metric is not marked with ``scaled_over_batch(name)``, so that the range is unknown.
        """
        if name not in self._ranges:
            raise RuntimeError(f"the range of {name} is not known; mark the metric with @scaled_over_batch({name!r})")
        low, high = self._ranges[name]
        values_N = getattr(self, name)
        return ((values_N - low) / (high - low)).clamp(0.0, 1.0) if high > low else torch.zeros_like(values_N)


Metric = Callable[[Signals], Tensor]
RANGES: dict[Metric, tuple[str, ...]] = {}  # signals that a metric reads scaled


def scaled_over_batch(*names: str) -> Callable[[Metric], Metric]:
    """Mark a metric that reads ``signals.scaled(name)`` for these names; a separate forward measures their ranges."""

    def mark(metric: Metric) -> Metric:
        RANGES[metric] = names
        return metric

    return mark


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


@scaled_over_batch("entropy_N", "kl_N")
def tip_soft_or(signals: Signals) -> Tensor:
    """1 - (1 - h)(1 - d): h, d are student entropy and KL, scaled to [0, 1] over the optimizer batch (TIP)."""
    return 1.0 - (1.0 - signals.scaled("entropy_N")) * (1.0 - signals.scaled("kl_N"))


@scaled_over_batch("entropy_N", "kl_N")
def tip_q3(signals: Signals) -> Tensor:
    """(1 - h) d, with tip_soft_or's h and d: where the student is sure and the teacher disagrees (TIP)."""
    return (1.0 - signals.scaled("entropy_N")) * signals.scaled("kl_N")


@scaled_over_batch("kl_N", "teacher_mass_N")
def ta_opd(signals: Signals) -> Tensor:
    """Scaled KL times scaled teacher mass: disagreement about classes that the student considers (TA-OPD)."""
    return signals.scaled("kl_N") * signals.scaled("teacher_mass_N")


def teacher_mass(signals: Signals) -> Tensor:
    """The teacher's probability of the student's top classes: where it is small, the teacher prefers others."""
    return signals.teacher_mass_N


def overlap(signals: Signals) -> Tensor:
    """Share of the student's top classes among the teacher's."""
    return signals.overlap_N


def margin(signals: Signals) -> Tensor:
    """The teacher's largest minus second largest probability within the student's top classes."""
    return signals.margin_N


def random(signals: Signals) -> Tensor:
    """Uniform on [0, 1), a function of each sequence's seed only."""
    scores = [
        torch.rand(n, generator=torch.Generator().manual_seed(seed))
        for n, seed in zip(signals.counts, signals.seeds, strict=True)
    ]
    return torch.cat(scores).to(signals.device)


def prefix(signals: Signals) -> Tensor:
    """-t: the first positions of each response."""
    steps = [-torch.arange(n, dtype=torch.float32) for n in signals.counts]
    return torch.cat(steps).to(signals.device)


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
    "tip_q3": tip_q3,
    "ta_opd": ta_opd,
    "teacher_mass": teacher_mass,
    "overlap": overlap,
    "margin": margin,
    "random": random,
    "prefix": prefix,
}
MODEL_FREE = frozenset({random, prefix})  # read no model
FROM_RECORDS = frozenset({student_entropy, student_ce})  # read only what engines may have recorded
FROM_TEACHER_ROWS = frozenset(
    {kl, reverse_kl, kl_plus_entropy, tip_soft_or, tip_q3, ta_opd, teacher_mass, overlap, margin}
)  # read the teacher's hidden rows at all eligible positions
