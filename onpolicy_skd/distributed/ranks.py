"""One learner as several processes, its ranks: they share the student's weights (FSDP2) and the work on each batch.

Every rank is given whole batches and comes to the same results, but runs the models over its own share alone.  What
they do together (forwards, backwards, ``gather``, ``full_tensor``) each of them must do equally often, in the
same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import MethodType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from onpolicy_skd.models.batch import balance_by_tokens
from onpolicy_skd.models.split_model import SplitModel

T = TypeVar("T")


class Ranks:
    """This process, number ``rank`` of ``count``."""

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        """With a ``count`` above 1 ``join`` must have been called."""
        self.rank = rank
        self.count = count
        self._device = device

    def shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences of so many tokens, by the rank that works on them."""
        return balance_by_tokens(lengths, self.count)

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def shard(self, student: SplitModel) -> SplitModel:
        """``student`` with every parameter cut among the ranks, and gathered, block by block, while it is needed.

        Embeddings, final norm and LM head stay whole from a forward to the backward after it, since the loss uses the
        head outside the model's own forward.  Gradients are summed over the ranks.
        """
        if self.count == 1:
            return student
        model, mesh = student.model, init_device_mesh(self._device, (self.count,))
        blocks = set(getattr(model, "_no_split_modules", None) or ())
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # each rank's loss is its part of one mean
                module.set_force_sum_reduction_for_comms(True)
        # FSDP gathers the outermost parameters in the model's forward only, which would project every position.
        model.backbone_forward = MethodType(lambda self, **inputs: self.base_model(**inputs), model)
        register_fsdp_forward_method(model, "backbone_forward")
        return dataclasses.replace(student, takes_embeddings=False, forward=model.backbone_forward)

    def reshard(self, student: SplitModel) -> None:
        """Frees what a forward has gathered: the shards are about to be read or written."""
        if isinstance(student.model, FSDPModule):
            student.model.reshard()

    def full_tensor(self, tensor: Tensor, everywhere: bool = False) -> Tensor:
        """All of a tensor that is cut among the ranks; on others than rank 0 an empty one, unless ``everywhere``."""
        if not isinstance(tensor, DTensor):
            return tensor
        found = tensor.full_tensor()
        return found if everywhere or self.rank == 0 else found.new_empty(0)


def full_scalar(value: Tensor) -> float:
    """Of a norm, which may be spread over the ranks."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole ``tensor``, if ``parameter`` is cut among ranks; on its device."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
