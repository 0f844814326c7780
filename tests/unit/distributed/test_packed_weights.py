"""Weights that travel packed are the weights, however they are cut into buffers."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.distributed import weight_transfer
from onpolicy_skd.distributed.weight_transfer import (
    GlooGroup,
    Sender,
    WeightSpec,
    buffers,
    fill,
    packed,
    plain_segments,
    unpacked,
)

SHAPES = [(7, 5), (3,), (), (64, 8), (1, 1), (2, 3, 4)]
TYPES = [torch.bfloat16, torch.bfloat16, torch.float16, torch.bfloat16, torch.float16, torch.bfloat16]


def weights(seed=0):
    rng = torch.Generator().manual_seed(seed)
    pairs = enumerate(zip(SHAPES, TYPES, strict=True))
    return [(f"w{i}", torch.randn(shape, generator=rng).to(dtype)) for i, (shape, dtype) in pairs]


def spec_of(named):
    return WeightSpec.of((n, t.dtype, t.shape) for n, t in named)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_buffers_hold_all_tensors_in_order_and_no_more_than_fits(sizes, limit):
    counts, first = list(buffers(sizes, limit)), 0
    assert sum(counts) == len(sizes)
    for count in counts:
        assert count == 1 or sum(sizes[first : first + count]) <= limit
        first += count
        if first < len(sizes):  # the next one did not fit
            assert sum(sizes[first - count : first + 1]) > limit


@pytest.mark.parametrize("limit", [1, 100, 10**6])
def test_unpacked_tensors_are_those_that_were_packed(limit):
    named, received, first = weights(), [], 0
    spec = spec_of(named)
    cut = list(buffers(spec.sizes, limit))
    for buffer, count in zip(packed(iter(named), limit), cut, strict=True):
        received += unpacked(buffer, spec, range(first, first + count))
        first += count
    assert [n for n, _ in received] == spec.names
    for (_, actual), (_, sent) in zip(received, named, strict=True):
        assert actual.dtype == sent.dtype
        assert torch.equal(actual, sent)


def test_packing_is_lazy():
    """A sharded learner gathers each tensor when it is asked for; no more than a buffer of them is held."""
    asked = []

    def gathered():
        for name, tensor in weights():
            asked.append(name)
            yield name, tensor

    sender = packed(gathered(), limit=1)
    next(sender)
    assert asked == ["w0", "w1"]


def test_one_buffer_for_the_shared_gpu_holds_all():
    named = weights()
    spec = spec_of(named)
    buffer = torch.empty(sum(spec.sizes), dtype=torch.uint8)
    fill(buffer, iter(named))
    for (_, actual), (_, sent) in zip(unpacked(buffer, spec, range(len(named))), named, strict=True):
        assert torch.equal(actual, sent)
    assert "tensor_sizes" not in spec.update
    shared = dataclasses.replace(spec, handles={"uuid": ()}).update
    assert shared["tensor_sizes"] == spec.sizes
    assert shared["ipc_handles"] == {"uuid": ()}


def test_a_broadcast_in_few_calls_delivers_the_weights(monkeypatch):
    monkeypatch.setattr(weight_transfer, "BUFFER_BYTES", 200)
    named = weights()
    spec, sender = spec_of(named), Sender("127.0.0.1", "cpu")
    with ThreadPoolExecutor() as others:
        joined = others.submit(sender.init_process_group, 2, 30)
        receiver = GlooGroup(sender.address, 1, 2, 30)
        joined.result()
        sending = others.submit(sender.send, iter(named))
        received, first, cut = [], 0, list(buffers(spec.sizes, 200))
        for count in cut:
            buffer = torch.empty(sum(spec.sizes[first : first + count]), dtype=torch.uint8)
            receiver.broadcast(buffer)
            received += unpacked(buffer, spec, range(first, first + count))
            first += count
        sending.result()
    assert 1 < len(cut) < len(named)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(received, named, strict=True))
    receiver.destroy()
    sender.close()


@pytest.mark.parametrize(
    ("variable", "configured", "expected"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "", []),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64", []),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64",
         ["expandable_segments:False,max_split_size_mb:64", "expandable_segments:True,max_split_size_mb:64"]),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", ["expandable_segments:False", "expandable_segments:True"]),
    ],
)  # fmt: skip
def test_expandable_segments_are_off_while_memory_is_shared(variable, configured, expected, monkeypatch):
    calls = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, configured)
    monkeypatch.setattr(weight_transfer, "set_allocator", calls.append)
    with plain_segments():
        assert len(calls) == len(expected) // 2
    assert calls == expected
