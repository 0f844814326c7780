"""New weights from the learner directly to vLLM's workers, through vLLM's update calls (vllm_engine.py).

``broadcast``: the learner's rank 0 and all workers of all engines are one group; NCCL on GPUs, gloo on CPUs.
``ipc``: a worker on the learner's GPU maps the memory in which the learner holds a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from onpolicy_skd.distributed.rendezvous import Rendezvous, listen

Address = tuple[str, int]
Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Names, dtypes and shapes of the weights that a worker will get; names as in a transformers checkpoint."""

    names: list[str]
    dtype_names: list[str]  # such as "bfloat16"
    shapes: list[list[int]]
    handles: list[dict[str, tuple]] | None = None  # ipc: by the GPU's UUID, the arguments that map each tensor

    @staticmethod
    def of(metas: Iterable[tuple[str, torch.dtype, Iterable[int]]], handles: Any = None) -> WeightSpec:
        names, types, shapes = zip(*metas, strict=True)
        return WeightSpec([*names], [str(t).removeprefix("torch.") for t in types], [[*s] for s in shapes], handles)

    @property
    def update(self) -> dict[str, Any]:
        """The spec as vLLM's ``update_info``."""
        info = {"names": self.names, "dtype_names": self.dtype_names, "shapes": self.shapes}
        return info if self.handles is None else info | {"ipc_handles": self.handles}


class GlooGroup:
    """A gloo group separate from torch's default group; rank 0 broadcasts."""

    def __init__(self, address: Address, rank: int, count: int, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(*address, is_master=False, timeout=timeout)
        self._group: Any = dist.ProcessGroupGloo(self._store, rank, count, timeout)

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        options = dist.BroadcastOptions()  # type: ignore[attr-defined]
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self._group.shutdown()


class Sender:
    """The learner's side of ``broadcast``: rank 0 of the group."""

    def __init__(self, host: str, device: str) -> None:
        self._device = device
        if device == "cuda":
            self._listener = listen(host)  # until ``join``, so that no other process takes the port
            self.address: Address = (host, self._listener.getsockname()[1])
        else:
            self._rendezvous = Rendezvous(host)
            self.address = self._rendezvous.address
        self._group: Any = None

    def join(self, count: int, timeout_s: float) -> None:
        """Form the group; return when all ``count`` members have joined."""
        if self._device == "cuda":
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
            from vllm.distributed.utils import StatelessProcessGroup
            from vllm.utils.nccl import unpinned_nccl_env

            torch.cuda.set_stream(torch.cuda.current_stream())  # else vLLM moves this thread to another stream
            store = StatelessProcessGroup.create(
                *self.address, 0, count, store_timeout=math.ceil(timeout_s), listen_socket=self._listener
            )
            with unpinned_nccl_env():  # as vLLM's workers, so that both sides choose the same transport
                self._group = PyNcclCommunicator(store, device=torch.cuda.current_device())
        else:
            self._group = GlooGroup(self.address, 0, count, timeout_s)

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()

    def send(self, weights: Named) -> None:
        """Broadcast the tensors, in the order of their WeightSpec."""
        for _, tensor in weights:
            self._group.broadcast(tensor.contiguous(), src=0)
        if self._device == "cuda":
            torch.cuda.synchronize()


def exported(weights: Named) -> tuple[WeightSpec, list[Tensor]]:
    """Return the WeightSpec for ``ipc``, and copies on this GPU that must live until the workers have read them."""
    from torch.multiprocessing.reductions import reduce_tensor

    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    kept = [(name, tensor.clone()) for name, tensor in weights]
    handles = [{uuid: reduce_tensor(tensor)[1]} for _, tensor in kept]
    return WeightSpec.of(((n, t.dtype, t.shape) for n, t in kept), handles), [t for _, t in kept]
