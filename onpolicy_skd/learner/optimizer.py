"""AdamW, its learning rate schedule, and the learner's CPU threads."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import LearnerSettings, Settings

SHARED = ("qmap1", "qmap2")  # state of bitsandbytes that is one tensor for all parameters; a file needs copies


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the optimizer's moments and step counts under the names of their parameters."""
    return {
        f"optimizer/{key}/{name}": torch.as_tensor(value).clone() if key in SHARED else torch.as_tensor(value)
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
            value = place(tensor, named[name])  # a fused optimizer's step count is on the device too
            is_count = value.ndim == 0 and not value.is_floating_point()  # bitsandbytes counts steps in an int
            optimizer.state[named[name]][key] = value.item() if is_count else value


def build_optimizer(named: Mapping[str, Tensor], settings: LearnerSettings) -> torch.optim.Optimizer:
    """Return the optimizer of a run; vectors (norms, biases) do not decay.

    With ``adamw_8bit`` bitsandbytes keeps the moments of parameters with at least 4,096 weights in 8 bits
    (arXiv:2110.02861).
    """
    groups = [
        dict(params=[p for p in named.values() if p.ndim > 1], weight_decay=settings.weight_decay),
        dict(params=[p for p in named.values() if p.ndim <= 1], weight_decay=0.0),
    ]
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, lr=settings.lr, betas=betas)
    # Without ``fused``, each step would make two copies of the largest parameter.
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, fused=True)


def check_optimizer(settings: LearnerSettings) -> None:
    """Raise ConfigError if the package of ``learner.optimizer`` is missing."""
    if settings.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "learner.optimizer=adamw_8bit: the package bitsandbytes is not installed; install this project with the "
            "extra bitsandbytes, for example pip install '.[bitsandbytes]', or use adamw"
        )


def learner_threads(settings: Settings) -> int:
    """Return a rank's CPU threads: as set, or its share of all cores, minus one core if roles work at the same time."""
    cores = len(os.sched_getaffinity(0)) - settings.pipeline.overlaps
    return settings.learner.threads or max(1, cores // settings.learner.ranks)


def learning_rate(settings: LearnerSettings, step: int, steps: int) -> float:
    """Return the rate of ``step`` (0-based): linear warm-up to ``lr``, then decay towards ``min_lr_ratio * lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    fall = {"constant": 0.0, "linear": done, "cosine": 0.5 * (1.0 - math.cos(math.pi * done))}[settings.schedule]
    return settings.lr * (1.0 - fall * (1.0 - settings.min_lr_ratio))
