"""The comparison of two distributions in one pass over both heads, against float64 references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy_skd.loss import teacher_signals as module
from onpolicy_skd.loss.inputs import HiddenRows
from onpolicy_skd.loss.teacher_signals import teacher_signals
from onpolicy_skd.models.lm_head import GROUP, blocks, largest


def make(rows=13, vocabulary=211, student=8, teacher=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((rows, student), (vocabulary, student), (rows, teacher), (vocabulary, teacher))
    return [torch.randn(*shape, generator=rng) for shape in shapes]


def reference(inputs, k, temperature=1.0):
    """Float64, full distributions, one row at a time with sets of classes."""
    hidden, head, other, other_head = (t.double() for t in inputs)
    q, p = (torch.softmax(h @ w.T / temperature, -1) for h, w in ((hidden, head), (other, other_head)))
    rows = []
    for q_V, p_V in zip(q, p, strict=True):
        of_student, of_teacher = (d.topk(min(k, len(d))).indices.tolist() for d in (q_V, p_V))
        within = p_V[of_student].sort(descending=True).values
        rows.append([(p_V * (p_V / q_V).log()).sum(), (q_V * (q_V / p_V).log()).sum(), within.sum(),
                     len(set(of_student) & set(of_teacher)) / len(of_student), within[0] - within[1]])  # fmt: skip
    return torch.tensor(rows).T


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20), vocabulary=st.sampled_from([2, 3, 63, 64, 211, 64 * 9, 64 * 9 + 5]),
    k=st.sampled_from([2, 3, 8, 600]), temperature=st.sampled_from([1.0, 2.5]),
    chunk_rows=st.none() | st.integers(1, 25), seed=st.integers(0, 99),
)  # fmt: skip
def test_signals_equal_their_float64_reference(rows, vocabulary, k, temperature, chunk_rows, seed):
    inputs = make(rows, vocabulary, seed=seed)
    signals = teacher_signals(*inputs[:2], HiddenRows(*inputs[2:]), k, temperature, chunk_rows)
    for actual, expected in zip(signals, reference(inputs, k, temperature), strict=True):
        assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_whole_vocabulary_holds_all_mass_and_overlaps():
    inputs = make(vocabulary=50)
    signals = teacher_signals(*inputs[:2], HiddenRows(*inputs[2:]), 50)
    assert signals.teacher_mass_N == pytest.approx(torch.ones(13), abs=1e-5)
    assert signals.overlap_N.tolist() == [1.0] * 13


def test_a_teacher_equal_to_the_student_overlaps_even_where_classes_are_equally_likely():
    hidden, head, *_ = make()
    tied = torch.cat([head[:100], head[:100]])  # each class twice
    signals = teacher_signals(hidden, tied, HiddenRows(hidden, tied), 7)
    assert signals.overlap_N.tolist() == [1.0] * 13
    assert signals.forward_kl_N.abs().max() < 1e-6
    assert signals.reverse_kl_N.abs().max() < 1e-6
    assert signals.margin_N.abs().max() < 1e-6


def test_signals_do_not_depend_on_the_size_of_blocks(monkeypatch):
    inputs = make()
    full = teacher_signals(*inputs[:2], HiddenRows(*inputs[2:]), 5)
    monkeypatch.setattr(module, "blocks", lambda logits: (slice(i, i + 1) for i in range(len(logits))))
    assert len(list(blocks(torch.empty(13, 211)))) == 1
    for a, b in zip(full, teacher_signals(*inputs[:2], HiddenRows(*inputs[2:]), 5), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@given(st.integers(1, 9 * GROUP), st.integers(1, 12), st.booleans(), st.integers(0, 9))
def test_largest_is_topk(width, k, ties, seed):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(3, width, generator=rng)
    values = values.round() if ties else values
    k = min(k, width)
    top = largest(values, k)
    assert torch.equal(top.values, values.topk(k).values)
    assert torch.equal(values.gather(1, top.indices), top.values)
    assert all(len(set(row)) == k for row in top.indices.tolist())
