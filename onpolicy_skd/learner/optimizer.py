"""AdamW, its learning rates, and the learner's processor threads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from onpolicy_skd.config.schema import LearnerSettings, Settings


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return AdamW's moments and step counts under the names of their parameters."""
    return {
        f"optimizer/{key}/{name}": torch.as_tensor(value)
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor] = lambda tensor, parameter: tensor.to(parameter.device),
) -> None:
    """Load what ``optimizer_tensors`` returned; ``place`` moves a tensor to its parameter's device and sharding."""
    for full, tensor in tensors.items():
        kind, _, rest = full.partition("/")
        if kind == "optimizer":
            key, _, name = rest.partition("/")
            optimizer.state[named[name]][key] = place(tensor, named[name])  # a fused optimizer's step count too


def adamw(named: Mapping[str, Tensor], settings: LearnerSettings) -> torch.optim.AdamW:
    """Return the optimizer of a run; vectors (norms, biases) do not decay."""
    return torch.optim.AdamW(
        [
            dict(params=[p for p in named.values() if p.ndim > 1], weight_decay=settings.weight_decay),
            dict(params=[p for p in named.values() if p.ndim <= 1], weight_decay=0.0),
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=True,  # without: two copies of the largest parameter at each step
    )


def learner_threads(settings: Settings) -> int:
    """Return a rank's CPU threads: as set, or its share of all cores, less one where roles work at the same time."""
    cores = len(os.sched_getaffinity(0)) - settings.pipeline.overlaps
    return settings.learner.threads or max(1, cores // settings.learner.ranks)


def learning_rate(settings: LearnerSettings, step: int, steps: int) -> float:
    """Return the rate of ``step`` (0-based): linear warm-up to ``lr``, then down to ``min_lr_ratio * lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    fall = {"constant": 0.0, "linear": done, "cosine": 0.5 * (1.0 - math.cos(math.pi * done))}[settings.schedule]
    return settings.lr * (1.0 - fall * (1.0 - settings.min_lr_ratio))
