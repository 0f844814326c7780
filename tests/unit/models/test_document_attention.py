"""Attention by boundaries of documents compared with attention under a dense mask."""

import dataclasses
import types

import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_families import ACCEPTED, TRANSFORMED, family
from test_families import VOCABULARY as FAMILY_VOCABULARY

from onpolicy_skd.models import document_attention as attention
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.split_model import split

SDPA = torch.nn.functional.scaled_dot_product_attention
NEED_MASKS = {  # families with sinks, soft caps, or attention that is not in transformers' registry
    "falcon", "gemma2", "gpt_oss", "gptj", "mpt", "nemotron", "stablelm", "xglm",
}  # fmt: skip


def boundaries(lengths):
    """Return int32 starts of documents of these lengths, and the end."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(rows, length, heads, groups, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(rows, n, length, 8) for n in (heads, groups, groups)]
    return [torch.randn(shape, generator=rng, requires_grad=True) for shape in shapes]


def under_mask(q, k, v, cu_seq_lens, scaling):
    """Attend under the mask of the documents, with keys and values repeated."""
    document = torch.repeat_interleave(cu_seq_lens.diff()).view(q.shape[0], q.shape[2])
    mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return SDPA(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2)


@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.3]),
)
def test_it_is_attention_under_a_dense_mask(rows, heads, scaling):
    width = max(map(sum, rows))
    lengths = [n for row in rows for n in [*row, width - sum(row)] if n]  # the rest of a row is padding
    given = inputs(len(rows), width, *heads)
    cu_seq_lens = boundaries(lengths)
    actual, weights = attention.document_attention(
        None, *given, None, scaling=scaling, cu_seq_lens_q=cu_seq_lens, max_length_q=max(lengths), position_ids=None
    )
    expected = under_mask(*given, cu_seq_lens, scaling)
    assert weights is None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, given, upstream) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("groups", "dtype"), [(4, torch.float32), (2, torch.bfloat16)])
def test_the_kernel_gets_flat_rows_and_boundaries(groups, dtype, monkeypatch):
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        calls.append(options)
        assert query.shape == (2 * 9, 4, 8)
        assert key.shape == value.shape == (2 * 9, groups, 8)
        assert query.dtype == key.dtype == value.dtype == dtype
        assert cu_seq_q is cu_seq_k
        assert cu_seq_q.dtype == torch.int32
        assert cu_seq_q.tolist() == [0, 4, 9, 18]
        assert max_q == max_k == 9
        return attention._attend_one_by_one(query, key, value, cu_seq_q, max_q, options["scale"])

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_kernel_takes", lambda *_: True)
    q, k, v = inputs(2, 9, 4, groups)
    cu_seq_lens = boundaries([4, 5, 9])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual, _ = attention.document_attention(
            None, q, k, v.to(dtype), None, scaling=0.3, cu_seq_lens_q=cu_seq_lens, max_length_q=9
        )  # queries and keys in float32, as norms with float32 weights leave them
    assert calls == [{"scale": 0.3, "window_size": (-1, 0), "enable_gqa": groups != 4}]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert torch.allclose(actual.float(), under_mask(q, k, v, cu_seq_lens, 0.3), atol=tolerance)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "value_size", "capability", "takes"),
    [
        ("cuda", torch.bfloat16, 128, 128, (9, 0), True), ("cuda", torch.float16, 64, 64, (8, 0), True),
        ("cuda", torch.float32, 128, 128, (9, 0), False), ("cuda", torch.bfloat16, 128, 128, (7, 5), False),
        ("cuda", torch.bfloat16, 192, 128, (9, 0), False), ("cuda", torch.bfloat16, 20, 20, (9, 0), False),
        ("cuda", torch.bfloat16, 512, 512, (9, 0), False), ("cpu", torch.bfloat16, 128, 128, (9, 0), False),
    ],
)  # fmt: skip
def test_the_kernel_is_used_where_it_exists(device, dtype, size, value_size, capability, takes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q, k, v = (
        types.SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(9, 2, n))
        for n in (size, size, value_size)
    )
    assert attention._kernel_takes(q, k, v) is takes


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"softcap": 50.0}, "a soft cap"), ({"s_aux": torch.zeros(2)}, "sinks"), ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1)}, "a position bias"), ({"sliding_window": 4}, "a sliding window"),
        ({"is_causal": False}, "attention to later tokens"),
    ],
)  # fmt: skip
def test_attention_that_is_more_is_refused(options, named):
    with pytest.raises(ValueError, match=f"attention with {named} cannot read boundaries"):
        attention.document_attention(
            None, *inputs(1, 5, 2, 2), None, cu_seq_lens_q=boundaries([5]), max_length_q=5, **options
        )


def test_a_window_longer_than_the_documents_has_no_effect():
    given, options = inputs(1, 8, 2, 1), {"cu_seq_lens_q": boundaries([5, 3]), "max_length_q": 5}
    windowed, _ = attention.document_attention(None, *given, None, sliding_window=5, **options)
    assert torch.equal(windowed, attention.document_attention(None, *given, None, **options)[0])


def test_the_model_s_attention_is_restored():
    model = tiny_model("qwen3", False)
    student, batch = split(model, VOCABULARY), collate(make_trajectories([(9, 20), (3, 4), (2, 5)]), 0, packed=True)
    assert student.reads_documents
    assert model.config._attn_implementation == "sdpa"
    student.hidden(batch)
    assert model.config._attn_implementation == "sdpa"

    def broken(**_):
        assert model.config._attn_implementation == attention.NAME
        raise RuntimeError

    with pytest.raises(RuntimeError):
        dataclasses.replace(student, forward=broken).hidden(batch)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", sorted({*ACCEPTED, *TRANSFORMED}))
def test_families_compute_packed_responses_as_if_each_were_alone(name):
    """With boundaries of documents, else with a mask; those that can do neither are refused by ``check_documents``."""
    from onpolicy_skd.models.split_model import ModelError, check_documents

    student = split(family(name, **TRANSFORMED.get(name, ({},))[0]), FAMILY_VOCABULARY)
    try:
        check_documents(student, 0, 32)
    except ModelError:
        assert not student.reads_documents
        return
    assert student.reads_documents == (name not in NEED_MASKS)
    batch = make_trajectories([(9, 20), (3, 4), (2, 5), (6, 1)], FAMILY_VOCABULARY)
    packed = collate(batch, 0, packed=True)
    with torch.no_grad():
        hidden_by_sequence = student.hidden(packed).split(packed.counts)
        for t, hidden in zip(batch, hidden_by_sequence, strict=True):
            assert torch.allclose(hidden, student.hidden(collate([t], 0)), rtol=1e-4, atol=1e-4)
