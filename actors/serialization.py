"""Tensors as numpy arrays, which Ray passes through shared memory several times faster than pickled tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.models.lm_head import LMHead

Packed = tuple[np.ndarray, str]  # the array (bfloat16 as int16, because numpy has no bfloat16), torch's dtype name


def pack(tensor: Tensor) -> Packed:
    tensor = tensor.detach().contiguous().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy(), name


def unpack(packed: Packed) -> Tensor:
    """Return a copy as a tensor: arrays from the object store are read-only."""
    array, name = packed
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor


def pack_head(head: LMHead) -> tuple[Packed, Packed | None, float, float | None]:
    return pack(head.weight_VH), None if head.bias_V is None else pack(head.bias_V), head.scale, head.cap


def unpack_head(packed: tuple[Packed, Packed | None, float, float | None]) -> LMHead:
    weight, bias, scale, cap = packed
    return LMHead(unpack(weight), None if bias is None else unpack(bias), scale, cap)


def pack_named(named: Iterable[tuple[str, Tensor]]) -> dict[str, Packed]:
    return {name: pack(tensor) for name, tensor in named}


def unpack_named(packed: dict[str, Packed]) -> Iterator[tuple[str, Tensor]]:
    for name, value in packed.items():
        yield name, unpack(value)
