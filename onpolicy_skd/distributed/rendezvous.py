"""The rendezvous of a learner's ranks."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from onpolicy_skd.distributed.ranks import Ranks


class Rendezvous:
    """The TCP store at which the ranks of a learner meet; rank 0 opens it, on ``host`` only."""

    def __init__(self, host: str) -> None:
        listener = listen(host)
        self.address: tuple[str, int] = (host, listener.getsockname()[1])
        self._store = TCPStore(
            *self.address, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def listen(host: str) -> socket.socket:
    """Return a socket that listens on a free port of ``host``."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen()
    return listener


def init_process_group(address: tuple[str, int], rank: int, count: int, device: str, timeout_s: float) -> Ranks:
    """Make this process rank ``rank`` of ``count``; return when all have joined.

    Raises RuntimeError if they have not within ``timeout_s``, which also bounds all later collective calls.
    """
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(*address, is_master=False, timeout=timeout)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    return Ranks(rank, count, device)
