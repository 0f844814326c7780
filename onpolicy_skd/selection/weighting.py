"""Weights along a response: factors of the weights from the policy (docs/method.md, section 4).

A weighting is a function of ``Signals`` and the settings under ``positions`` that returns float32 factors ``[N]``, at
least 0.  To add one, write a function and add a line to ``WEIGHTINGS``, or name a function of your code,
``module:function``, in ``positions.weighting``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from onpolicy_skd.config.schema import PositionSettings
from onpolicy_skd.selection.metrics import Signals

Weighting = Callable[[Signals, PositionSettings], Tensor]


def iw(signals: Signals, cfg: PositionSettings) -> Tensor:
    """1 + gamma (1 - share of sum |a| before t), a = log p(y) - log q(y): larger before the models diverge (IW-OPD)."""
    shares = []
    for size_n in (signals.ce_N - signals.teacher_ce_N).abs().split(list(signals.counts)):
        total = size_n.sum()
        shares.append((size_n.cumsum(0) - size_n) / total if total > 0 else torch.zeros_like(size_n))
    return 1.0 + cfg.weighting_gamma * (1.0 - torch.cat(shares))


def ramp(signals: Signals, cfg: PositionSettings) -> Tensor:
    """1 + gamma t / n for t = 1..n: rising for gamma above 0, falling below."""
    times = [torch.arange(1, n + 1, device=signals.device) / n for n in signals.counts]
    return 1.0 + cfg.weighting_gamma * torch.cat(times)


WEIGHTINGS: dict[str, Weighting | None] = {"uniform": None, "iw": iw, "ramp": ramp}


def normalized(factors_N: Tensor, counts: Sequence[int], eligible_N: Tensor | None = None) -> Tensor:
    """Scale the factors so that their mean over the eligible positions of each sequence is 1, or leave all at 0.

    Raises ValueError for a factor that is negative or not finite.
    """
    if not ((factors_N >= 0) & factors_N.isfinite()).all():
        raise ValueError("positions.weighting: must return factors that are finite and at least 0")
    eligible_N = torch.ones_like(factors_N) if eligible_N is None else eligible_N.float()
    scaled = []
    for factors_n, eligible_n in zip(factors_N.split(list(counts)), eligible_N.split(list(counts)), strict=True):
        total = torch.dot(factors_n, eligible_n)
        scaled.append(factors_n * (eligible_n.sum() / total) if total > 0 else torch.zeros_like(factors_n))
    return torch.cat(scaled)
