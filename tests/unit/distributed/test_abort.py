"""A broadcast of weights ends when an engine fails: by ``abort``, or by itself if gloo sees that the peer is gone."""

import multiprocessing
import signal
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from onpolicy_skd.distributed.weight_transfer import AbortedError, GlooGroup, NcclGroup, Sender

SECONDS = 20  # until the test fails; the group's own limit is longer


def peer(address, connection):
    """Join the group, take one tensor, then do nothing."""
    group = GlooGroup(address, 1, 2, 600)
    group.broadcast(torch.empty(4, dtype=torch.uint8))
    connection.send("took one")
    signal.pause()


@pytest.fixture
def joined():
    """A sender, and the process of a peer that takes only the first buffer."""
    sender = Sender("127.0.0.1", "cpu")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=peer, args=(sender.address, there), daemon=True)
    process.start()
    sender.init_process_group(2, 600)
    yield sender, process, here
    process.kill()
    process.join()


def sending(sender, monkeypatch):
    """Start to send; return the future and the names of the tensors that were asked for."""
    asked = []

    def weights():
        for number in range(5):
            asked.append(number)
            yield f"w{number}", torch.ones(4, dtype=torch.uint8)

    monkeypatch.setattr("onpolicy_skd.distributed.weight_transfer.BUFFER_BYTES", 4)
    return ThreadPoolExecutor().submit(sender.send, weights()), asked


def test_abort_ends_a_broadcast_to_a_peer_that_hangs(joined, monkeypatch):
    sender, _, connection = joined
    future, asked = sending(sender, monkeypatch)
    assert connection.recv() == "took one"
    time.sleep(0.5)
    assert not future.done()
    sender.abort()
    with pytest.raises(AbortedError, match="an engine failed"):
        future.result(SECONDS)
    assert asked == [0, 1, 2, 3, 4]  # other ranks of the learner help to gather all of them


def test_a_killed_peer_ends_a_broadcast(joined, monkeypatch):
    sender, process, connection = joined
    future, asked = sending(sender, monkeypatch)
    assert connection.recv() == "took one"
    process.kill()
    with pytest.raises(RuntimeError):
        future.result(SECONDS)
    assert asked == [0, 1, 2, 3, 4]
    sender.close()


class Communicator:
    """Stands for vLLM's PyNcclCommunicator with a peer that takes only the first tensor."""

    def __init__(self):
        self.available, self.disabled, self.device, self.comm = True, False, "cuda:0", "comm"
        self.calls, self._freed = [], threading.Event()
        self.nccl = types.SimpleNamespace(ncclCommAbort=self._abort)

    def broadcast(self, tensor, src):
        if self.disabled:
            return
        assert not self._freed.is_set()
        self.calls.append("broadcast")
        if len(self.calls) > 1:
            assert self._freed.wait(SECONDS)

    def _abort(self, comm):
        assert self.disabled  # before the memory of ``comm`` is freed
        self.calls.append(f"abort {comm}")
        self._freed.set()

    def destroy(self):
        if self.available and not self.disabled:
            self._abort(self.comm)


def test_abort_ends_a_broadcast_by_nccl(monkeypatch):
    def produce(iterator, group, src, post_iter_func):
        for item in iterator:
            group.broadcast(post_iter_func(item), src=src)

    module = types.SimpleNamespace(packed_nccl_broadcast_producer=produce)
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.packed_tensor", module)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: threading.Lock())  # any context manager
    group, sender = NcclGroup.__new__(NcclGroup), Sender.__new__(Sender)
    group._communicator, group._aborted, sender._group = Communicator(), False, group
    future, asked = sending(sender, monkeypatch)
    time.sleep(0.5)
    assert not future.done()
    sender.abort()
    with pytest.raises(AbortedError, match="an engine failed"):
        future.result(SECONDS)
    assert asked == [0, 1, 2, 3, 4]
    sender.close()
    assert group._communicator.calls == ["broadcast", "broadcast", "abort comm"]
