"""Mixtures of reverse and forward KL whose weights depend on the position (docs/method.md, section 7).

A gate is a function of ``GateRows`` and the settings under ``alignment.mixture`` that returns the weights (a, b) of
reverse and forward KL, float32 ``[b, 2]``.  To add one, write a function and add a line to ``GATES``, or name a
function of your code, ``module:function``, in ``alignment.mixture.gate``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onpolicy_skd.config import plugins
from onpolicy_skd.config.schema import MixtureSettings


@dataclass(frozen=True, slots=True)
class GateRows:
    """Inputs of a gate for b rows, float32, nats, without gradient."""

    entropy_b: Tensor  # H(q)
    teacher_entropy_b: Tensor  # H(p)
    log_ratio_b: Tensor  # log p(y) - log q(y)
    reverse_kl_b: Tensor  # KL(q || p), skewed if the mixture is
    forward_kl_b: Tensor  # KL(p || q), skewed if the mixture is


Gate = Callable[[GateRows, MixtureSettings], Tensor]


def constant(rows: GateRows, cfg: MixtureSettings) -> Tensor:
    """Return (lambda, 1 - lambda) for every row."""
    return rows.entropy_b.new_tensor([cfg.reverse_weight, 1.0 - cfg.reverse_weight]).expand(len(rows.entropy_b), 2)


def eopd(rows: GateRows, cfg: MixtureSettings) -> Tensor:
    """Return (1, w) where the teacher's entropy exceeds the threshold, else (1, 0) (EOPD)."""
    forward = cfg.forward_weight * (rows.teacher_entropy_b > cfg.teacher_threshold).float()
    return torch.stack([torch.ones_like(forward), forward], 1)


def zones(rows: GateRows, cfg: MixtureSettings) -> Tensor:
    """Return the weights of each row's zone: student sure or unsure, teacher sure or unsure (SEAD)."""
    cells = [[cfg.both_sure, cfg.student_sure], [cfg.teacher_sure, cfg.both_unsure]]
    student = (rows.entropy_b > cfg.student_threshold).long()
    teacher = (rows.teacher_entropy_b > cfg.teacher_threshold).long()
    return rows.entropy_b.new_tensor(cells)[student, teacher]


GATES: dict[str, Gate] = {"constant": constant, "eopd": eopd, "zones": zones}


@dataclass(frozen=True, slots=True)
class Mixture:
    """A gate and its settings at a step; ``progress`` goes from ``start`` (0) to the gate's weights (1)."""

    gate: Gate
    options: MixtureSettings
    progress: float = 1.0

    @classmethod
    def from_settings(cls, cfg: MixtureSettings) -> Mixture | None:
        """Return the mixture, or None without one.  Raises ConfigError for a gate that cannot be imported."""
        if cfg.gate == "none":
            return None
        return cls(plugins.find(cfg.gate, GATES, "alignment.mixture.gate"), cfg)

    def at(self, step: int) -> Mixture:
        """Return the mixture after ``step`` optimizer steps."""
        return dataclasses.replace(self, progress=progress(self.options, step))

    @property
    def used(self) -> tuple[bool, bool]:
        """True for each of (reverse KL, forward KL) whose weight can differ from 0."""
        if self.gate is not constant or (self.options.start is not None and self.progress < 1.0):
            return (True, True)
        return (self.options.reverse_weight > 0.0, self.options.reverse_weight < 1.0)

    def weights(self, rows: GateRows) -> Tensor:
        """Return (a, b) of each row ``[b, 2]``.

        Raises ValueError for weights of another shape, and for negative or non-finite ones.
        """
        gated = self.gate(rows, self.options).float()
        if gated.shape != (len(rows.entropy_b), 2) or not ((gated >= 0) & gated.isfinite()).all():
            raise ValueError("alignment.mixture.gate: must return two weights per row, finite and at least 0")
        if self.options.start is None or self.progress == 1.0:
            return gated
        blended = torch.lerp(gated.new_tensor(self.options.start).expand_as(gated), gated, self.progress)
        return torch.where(gated.any(1, keepdim=True), blended, 0.0)  # rows that the gate skips stay skipped


def progress(cfg: MixtureSettings, step: int) -> float:
    """Return the share of the way from ``start`` to the gate's weights after ``step`` optimizer steps."""
    done = min(1.0, step / cfg.steps)
    if cfg.start is None or done == 1.0:
        return 1.0
    return {"constant": 0.0, "linear": done, "cosine": 0.5 - 0.5 * math.cos(math.pi * done)}[cfg.schedule]
