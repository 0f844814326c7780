"""Transfer of new weights from the learner directly to vLLM's workers, through vLLM's update calls (vllm_engine.py).

Tensors travel packed in byte buffers, because one call for each of hundreds of tensors would take longer.
``broadcast``: the learner's rank 0 and all workers of all engines are one group; NCCL on GPUs, gloo on CPUs.
``ipc``: a worker on the learner's GPU maps the memory in which the learner holds a copy.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from onpolicy_skd.distributed.rendezvous import Rendezvous, listen

Address = tuple[str, int]
Named = Iterable[tuple[str, Tensor]]
BUFFER_BYTES = 2**26  # size of a gloo buffer; a larger tensor fills one alone
ABORTED = "the broadcast of weights was aborted, because an engine failed"
POLL_S = 0.001  # seconds between two checks of whether a gloo broadcast has ended


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Names, dtypes and shapes of the weights that a worker will get, named as in a transformers checkpoint."""

    names: list[str]
    dtype_names: list[str]  # such as "bfloat16"
    shapes: list[list[int]]
    handles: dict[str, tuple] | None = None  # ipc: by the GPU's UUID, the arguments that map the buffer of all tensors

    @staticmethod
    def of(metas: Iterable[tuple[str, torch.dtype, Iterable[int]]]) -> WeightSpec:
        names, types, shapes = zip(*metas, strict=True)
        return WeightSpec([*names], [str(t).removeprefix("torch.") for t in types], [[*s] for s in shapes])

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        types = (getattr(torch, name) for name in self.dtype_names)
        return [dtype.itemsize * math.prod(shape) for dtype, shape in zip(types, self.shapes, strict=True)]

    @property
    def update(self) -> dict[str, Any]:
        """The spec as vLLM's ``update_info``."""
        info = {"names": self.names, "dtype_names": self.dtype_names, "shapes": self.shapes}
        return info if self.handles is None else info | {"ipc_handles": self.handles, "tensor_sizes": self.sizes}


class AbortedError(RuntimeError):
    """A broadcast that another thread has ended, because a peer will not receive the rest."""


class GlooGroup:
    """A gloo group separate from torch's default group; rank 0 broadcasts."""

    def __init__(self, address: Address, rank: int, count: int, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(*address, is_master=False, timeout=timeout)
        self._group: Any = dist.ProcessGroupGloo(self._store, rank, count, timeout)
        self._aborted = threading.Event()

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        """Broadcast ``tensor``.  Raises RuntimeError if a peer is gone, and AbortedError after ``abort``."""
        options = dist.BroadcastOptions()  # type: ignore[attr-defined]
        options.rootRank, options.rootTensor = src, 0
        work = self._group.broadcast([tensor], options)
        while not work.is_completed():
            if self._aborted.wait(POLL_S):
                raise AbortedError(ABORTED)
        work.wait()

    def send(self, weights: Named) -> None:
        for buffer in packed(weights, BUFFER_BYTES):
            self.broadcast(buffer)

    def abort(self) -> None:
        """Make a broadcast that waits in another thread raise AbortedError."""
        self._aborted.set()

    def destroy(self) -> None:
        self._group.shutdown()


class NcclGroup:
    """An NCCL group separate from torch's default group, for its rank 0; the others are vLLM's workers."""

    def __init__(self, address: Address, count: int, timeout_s: float, listener: Any) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        torch.cuda.set_stream(torch.cuda.current_stream())  # otherwise vLLM moves this thread to another stream
        store = StatelessProcessGroup.create(
            *address, 0, count, store_timeout=math.ceil(timeout_s), listen_socket=listener
        )
        with unpinned_nccl_env():  # as in vLLM's workers, so that both sides choose the same transport
            self._communicator: Any = PyNcclCommunicator(store, device=torch.cuda.current_device())
        self._aborted = False

    def send(self, weights: Named) -> None:
        """Broadcast the tensors and wait for the end.  Raises AbortedError after ``abort``."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.synchronize()  # the broadcast's streams do not wait for the optimizer's
        packed_nccl_broadcast_producer(iter(weights), self._communicator, 0, lambda item: item[1])
        if self._aborted:
            raise AbortedError(ABORTED)

    def abort(self) -> None:
        """End a broadcast that waits in another thread for a peer, with ncclCommAbort, the only call that does."""
        communicator = self._communicator
        # Set first: the call frees NCCL's communicator, and the other thread must not use it for another broadcast.
        self._aborted = communicator.disabled = True
        with torch.cuda.device(communicator.device):
            communicator.nccl.ncclCommAbort(communicator.comm)

    def destroy(self) -> None:
        self._communicator.destroy()  # does nothing after ``abort``, because the communicator is disabled


def buffers(sizes: Iterable[int], limit: int) -> Iterator[int]:
    """Yield the number of tensors in each buffer: consecutive ones of at most ``limit`` bytes together, at least one.

    Reads one size ahead.  Sender and receiver both know the sizes, so they get the same numbers.
    """
    count = filled = 0
    for size in sizes:
        if count and filled + size > limit:
            yield count
            count = filled = 0
        count, filled = count + 1, filled + size
    if count:
        yield count


def packed(weights: Named, limit: int) -> Iterator[Tensor]:
    """Yield the weights as byte buffers, cut as ``buffers`` does."""
    waiting: list[Tensor] = []
    filled = 0
    for _, tensor in weights:
        flat = as_bytes(tensor)
        if waiting and filled + flat.numel() > limit:
            yield torch.cat(waiting)
            waiting, filled = [], 0
        waiting.append(flat)
        filled += flat.numel()
    if waiting:
        yield torch.cat(waiting)


def unpacked(buffer: Tensor, spec: WeightSpec, places: range) -> list[tuple[str, Tensor]]:
    """Return the tensors ``places`` of ``spec`` that ``buffer`` holds, as views."""
    sizes, types = spec.sizes, [getattr(torch, name) for name in spec.dtype_names]
    flat = buffer.split([sizes[i] for i in places])
    return [(spec.names[i], b.view(types[i]).view(spec.shapes[i])) for i, b in zip(places, flat, strict=True)]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Sender:
    """The learner's side of ``broadcast``: rank 0 of the group."""

    def __init__(self, host: str, device: str) -> None:
        self._device = device
        if device == "cuda":
            self._listener = listen(host)  # open until ``init_process_group``, so that no other process takes the port
            self.address: Address = (host, self._listener.getsockname()[1])
        else:
            self._rendezvous = Rendezvous(host)
            self.address = self._rendezvous.address
        self._group: GlooGroup | NcclGroup | None = None

    def init_process_group(self, count: int, timeout_s: float) -> None:
        """Form the group; return when all ``count`` members have joined."""
        if self._device == "cuda":
            self._group = NcclGroup(self.address, count, timeout_s, self._listener)
        else:
            self._group = GlooGroup(self.address, 0, count, timeout_s)

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()

    def send(self, weights: Named) -> None:
        """Broadcast the tensors, in the order of their WeightSpec, once ``init_process_group`` has returned.

        Raises RuntimeError if a peer is gone, and AbortedError after ``abort``; all tensors are read first, since other
        ranks of the learner help to gather them.
        """
        assert self._group is not None
        remaining = iter(weights)
        try:
            self._group.send(remaining)
        finally:
            deque(remaining, maxlen=0)

    def abort(self) -> None:
        """Make ``send``, in another thread, end with AbortedError.  The group is of no use afterwards."""
        assert self._group is not None
        self._group.abort()


def exported(weights: Named, spec: WeightSpec) -> tuple[WeightSpec, Tensor]:
    """Copy the weights on this GPU; return the WeightSpec for ``ipc`` and the copy, to keep until it has been read."""
    from torch.multiprocessing.reductions import reduce_tensor

    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    with plain_segments():
        buffer = torch.empty(sum(spec.sizes), dtype=torch.uint8, device="cuda")
    fill(buffer, weights)
    torch.cuda.synchronize()
    return replace(spec, handles={uuid: reduce_tensor(buffer)[1]}), buffer


def fill(buffer: Tensor, weights: Named) -> None:
    """Copy the weights into ``buffer``, one after the other."""
    start = 0
    for _, tensor in weights:
        flat = as_bytes(tensor)
        buffer[start : start + flat.numel()].copy_(flat)
        start += flat.numel()


@contextmanager
def plain_segments() -> Iterator[None]:
    """Allocate GPU memory without expandable segments, which some kernels and containers cannot map elsewhere.

    Many users export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; it is restored afterwards.
    """
    configured = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    expandable = "expandable_segments:True" in configured
    if expandable:
        set_allocator(configured.replace("expandable_segments:True", "expandable_segments:False"))
    try:
        yield
    finally:
        if expandable:
            set_allocator(configured)


def set_allocator(text: str) -> None:
    """Replace all settings of the GPU allocator."""
    torch._C._accelerator_setAllocatorSettings(text)  # type: ignore[attr-defined]
