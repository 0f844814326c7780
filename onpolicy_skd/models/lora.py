"""LoRA adapters by peft, and the plain weights they merge into."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
import numpy as np
import torch
from torch import Tensor
from onpolicy_skd.storage.files import sha256
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.batch import Batch, collate
from onpolicy_skd.types import Trajectory, seed_of

LORA, BASE = ".lora_", ".base_layer.weight"  # in peft's names of parameters


def add_lora(model: Any, rank: int, alpha: int, seed: int) -> Any:
    """``model`` with all weights frozen and trainable low-rank additions in its linear layers but the LM head; they
    change nothing yet (arXiv 2106.09685)."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "lora"))
        found = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"), model)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(LORA in name)
        if LORA in name:
            parameter.data = parameter.data.float()
    return found


def merged_parameters(model: Any, full_tensor: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names as in a plain checkpoint, and what computes each weight, low-rank additions included.

    ``full_tensor`` makes one of a tensor that is cut among ranks.  A tied LM head is left out.
    """

    def merged(weight: Tensor, layer: Any) -> Tensor:
        a_RI, b_OR = (full_tensor(part["default"].weight.detach()) for part in (layer.lora_A, layer.lora_B))
        base = full_tensor(weight.detach())
        if not base.numel():
            return base
        delta = layer.scaling["default"] * (b_OR @ a_RI)
        return base.float() + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)

    for name, parameter in model.named_parameters():
        if name.endswith(BASE):
            layer = model.get_submodule(name.removesuffix(BASE))
            yield name.removesuffix(BASE) + ".weight", partial(merged, parameter, layer)
        elif LORA not in name:
            yield name.replace(".base_layer.", "."), partial(lambda p: full_tensor(p.detach()), parameter)

