"""AdamW, its learning rates, and how many processor threads a learner takes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from onpolicy_skd.config import LearnerSettings


def adamw(named: Mapping[str, Tensor], settings: LearnerSettings) -> torch.optim.AdamW:
    """The optimizer of a run; vectors (norms, biases) do not decay."""
    return torch.optim.AdamW(
        [
            dict(params=[p for p in named.values() if p.ndim > 1], weight_decay=settings.weight_decay),
            dict(params=[p for p in named.values() if p.ndim <= 1], weight_decay=0.0),
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=True,  # else two copies of the largest parameter at each step
    )


def learner_threads(settings: LearnerSettings) -> int:
    """Processor threads of one rank on CPU: as set, or its part of all cores but one, left to the other roles."""
    return settings.threads or max(1, ((os.cpu_count() or 2) - 1) // settings.ranks)


def learning_rate(settings: LearnerSettings, step: int, steps: int) -> float:
    """Rate of ``step`` (0-based) of ``steps``: linear warm-up to ``lr``, then down to ``min_lr_ratio * lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    fall = {"constant": 0.0, "linear": done, "cosine": 0.5 * (1.0 - math.cos(math.pi * done))}[settings.schedule]
    return settings.lr * (1.0 - fall * (1.0 - settings.min_lr_ratio))
