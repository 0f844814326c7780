"""The ranks of a learner: processes that share the student's weights (FSDP2) and the work on each batch.

All ranks get the same batches and return the same results, but each runs the models over its share only.  Collective
calls (forwards, backwards, ``gather``, ``full_tensor``) must be made equally often on all ranks, in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from onpolicy_skd.models.batch import balance_by_tokens
from onpolicy_skd.models.compilation import decoder_layers
from onpolicy_skd.models.loading import pick_dtype
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.types import Trajectory

T = TypeVar("T")


class Ranks:
    """This process, number ``rank`` of ``count``."""

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        """Describe the process; with a ``count`` above 1, ``init_process_group`` must have been called."""
        self.rank = rank
        self.count = count
        self._device = device

    def shares(self, lengths: Sequence[int]) -> list[list[int]]:
        """Divide sequences of ``lengths`` tokens over the ranks; return the indices for each rank."""
        return balance_by_tokens(lengths, self.count)

    def local(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Return the trajectories that this rank works on."""
        return [trajectories[i] for i in self.shares([t.length for t in trajectories])[self.rank]]

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of each rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def gather_by_index(self, local: Mapping[int, T]) -> list[T]:
        """Return the values of all ranks in the order of their indices 0, 1, 2, ..."""
        values = {index: value for share in self.gather(local) for index, value in share.items()}
        return [values[index] for index in range(len(values))]

    def shard(self, student: SplitModel, compute_dtype: str = "float32") -> SplitModel:
        """Shard the parameters of ``student`` over the ranks; each block is gathered while it is needed.

        A block is gathered in ``compute_dtype`` (a setting, as ``pick_dtype`` reads it); the shards keep their type.
        Embeddings, norms and LM head stay gathered, in the type of their shards, from a forward to the backward after
        it, since the loss uses the head outside the model's forward.  Gradients are summed over the ranks in float32.
        """
        if self.count == 1:
            return student
        model, mesh = student.model, init_device_mesh(self._device, (self.count,))
        dtype = pick_dtype(compute_dtype, self._device)
        blocks = {layer: _gathered_by(layer, dtype) for layer in decoder_layers(model)}
        # The model first, although FSDP is usually applied to blocks first: the model then gathers the blocks' norms.
        fully_shard(model, mesh=mesh, ignored_params=set().union(*(params for params, _ in blocks.values())))
        for block, (params, policy) in blocks.items():
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(block.parameters()) - params)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # each rank's loss is a share of one mean
                module.set_force_sum_reduction_for_comms(True)
        # FSDP gathers the outermost parameters in the model's forward only, which would project every position.
        model.backbone_forward = MethodType(lambda self, **inputs: self.base_model(**inputs), model)
        register_fsdp_forward_method(model, "backbone_forward")
        return dataclasses.replace(student, takes_embeddings=False, forward=model.backbone_forward)

    def reshard(self, student: SplitModel) -> None:
        """Reshard parameters gathered by a forward, before the shards are read or written."""
        if isinstance(student.model, FSDPModule):
            student.model.reshard()

    def full_tensor(self, tensor: Tensor, everywhere: bool = False) -> Tensor:
        """Gather a sharded tensor; ranks other than 0 get an empty one, unless ``everywhere``."""
        if not isinstance(tensor, DTensor):
            return tensor
        full = tensor.full_tensor()
        return full if everywhere or self.rank == 0 else full.new_empty(0)


def _gathered_by(block: nn.Module, dtype: torch.dtype) -> tuple[set[nn.Parameter], MixedPrecisionPolicy]:
    """Return the parameters that ``block`` gathers by itself, and the dtypes in which it gathers and reduces them.

    Autocast rounds the weights of linear layers to the compute ``dtype`` anyway.  Gathering them in that dtype halves
    the bytes and gives the results of a single rank; autocast, which stays around the forward, has nothing left to
    round.  Norms, which autocast does not round, are small; the model gathers them.  The block's input keeps its dtype:
    in ``dtype`` the residual stream would be coarser than on a single rank.  A block with other matrices, such as
    mixture-of-experts layers, is gathered in the dtype of its shards.
    """
    params = set(block.parameters())
    linear = {p for m in block.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    if dtype == torch.float32 or any(p.ndim > 1 for p in params - linear):
        return params, MixedPrecisionPolicy()
    return linear, MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def full_scalar(value: Tensor) -> float:
    """Return the number in a scalar that may be a DTensor, such as a gradient norm."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's shard of ``tensor`` if ``parameter`` is sharded, else ``tensor``; on the same device."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device, copy=True)
    mesh, placements = parameter.device_mesh, parameter.placements
    chunks = tensor.chunk(mesh.size(), dim=0)  # sharded over the first dimension, as FSDP2 does
    shard = chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else tensor[:0]
    local = shard.to(parameter.device, copy=True)  # reads only that slice of a mapped file
    return DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride())
