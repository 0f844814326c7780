"""LoRA adapters by peft, and the plain weights into which they are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.types import seed_of

LORA, BASE = ".lora_", ".base_layer.weight"  # in peft's parameter names


def add_lora(model: Any, rank: int, alpha: int, seed: int) -> Any:
    """Freeze ``model`` and add trainable adapters to its linear layers except the LM head (arXiv 2106.09685).

    Layers that are frozen already get none.  The adapters start at zero, so the model's outputs do not change yet.
    Raises ModelError for models that peft does not support, or whose merged weights would not have the names of a
    plain checkpoint.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    family, plain_names = type(model).__name__, [name for name, _ in model.named_parameters()]
    head = model.get_output_embeddings()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and module.weight.requires_grad
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "lora"))
            adapted = inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ModelError(f"student.lora_rank: peft does not support {family}: {reason}; accepted: 0") from error
    if [name for name, _ in merged_parameters(adapted, lambda tensor: tensor)] != plain_names:
        raise ModelError(
            f"student.lora_rank: the merged weights of {family} would not have the names of a plain checkpoint "
            "(experts or other layers that are not linear modules); accepted: 0"
        )
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(LORA in name)
        if LORA in name:
            parameter.data = parameter.data.float()
    return adapted


def merged_parameters(
    model: Any, full_tensor: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield each name of a plain checkpoint and a function that computes the weight, adapters merged.

    ``full_tensor`` gathers a tensor that is sharded over ranks.  A tied LM head is left out.
    """

    def merged(weight: Tensor, layer: Any) -> Tensor:
        a_RI, b_OR = (full_tensor(factor["default"].weight.detach()) for factor in (layer.lora_A, layer.lora_B))
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
