"""Losses of heads with a bias, a scale and a soft cap against a float64 dense reference."""

import itertools

import pytest
import torch

from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.lm_head import LMHead, row_statistics

ROWS, V, H, G = 11, 53, 8, 6
HEADS = [(1.0, 2.0, False), (0.25, None, False), (1.0, None, True), (3.0, 1.5, True)]  # scale, cap, bias


def make(kind, hidden, seed):
    rng = torch.Generator().manual_seed(seed)
    scale, cap, has_bias = kind
    bias = torch.randn(V, generator=rng) if has_bias else None
    return torch.randn(ROWS, hidden, generator=rng), LMHead(torch.randn(V, hidden, generator=rng), bias, scale, cap)


def dense(hidden, weight, bias, head):
    z = head.scale * (hidden @ weight.T + (0 if bias is None else bias))
    return z if head.cap is None else head.cap * torch.tanh(z / head.cap)


def leaves(hidden, head, dtype):
    tensors = (hidden, head.weight_VH, head.bias_V)
    return [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in tensors]


@pytest.mark.parametrize(("kind", "chunk_rows"), [*zip(("reverse_kl", "forward_kl", "jsd"), (None, 3, 4), strict=True)])
@pytest.mark.parametrize(("student", "teacher"), [*itertools.pairwise([*HEADS, HEADS[0]])])
def test_value_and_gradients_equal_the_dense_reference(student, teacher, kind, chunk_rows):
    (hidden, head), (other, other_head) = make(student, H, 0), make(teacher, G, 1)
    alignment = Alignment(kind, 0.3, 1.7, 0.8, chunk_rows)
    weights, targets = torch.linspace(0.1, 1.0, ROWS), torch.arange(ROWS) * 3

    expected = leaves(hidden, head, torch.float64)
    log_q = torch.log_softmax(dense(*expected, head) / 1.7, -1)
    log_p = torch.log_softmax(dense(*leaves(other, other_head, torch.float64), other_head).detach() / 1.7, -1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.3 * p + 0.7 * q).log()
    rows = {
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "forward_kl": (p * (log_p - log_q)).sum(-1),
        "jsd": 0.3 * (p * (log_p - log_m)).sum(-1) + 0.7 * (q * (log_q - log_m)).sum(-1),
    }[kind]
    reference = (weights * (0.8 * rows - 0.2 * log_q[torch.arange(ROWS), targets])).sum()
    reference.backward()

    actual = leaves(hidden, head, torch.float32)
    trained = LMHead(actual[1], actual[2], head.scale, head.cap)
    loss, values = distillation_loss(
        actual[0], trained, HiddenRows(other, other_head), Rows(weights, targets), alignment
    )
    (2.0 * loss).backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(values.double(), rows.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is not None:
            assert (ours.grad / 2 - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


@pytest.mark.parametrize("kind", HEADS)
def test_statistics_and_sparse_targets_see_the_same_logits(kind):
    hidden, head = make(kind, H, 2)
    log_q = torch.log_softmax(dense(hidden.double(), head.weight_VH.double(), head.bias_V, head), -1)
    targets = torch.arange(ROWS)
    stats = row_statistics(hidden, head, targets, chunk_rows=4)
    torch.testing.assert_close(stats.entropy_N.double(), -(log_q.exp() * log_q).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.logprob_N.double(), log_q[targets, targets], rtol=1e-5, atol=1e-6)
    sparse = SparseTargets(torch.arange(3).repeat(ROWS, 1), torch.full((ROWS, 3), 1 / 3))
    alignment, rows = Alignment("forward_kl"), Rows(torch.ones(ROWS), targets)
    _, values = distillation_loss(hidden, head, sparse, rows, alignment)
    expected = (torch.log(torch.tensor(1 / 3)) - log_q[:, :3]).mean(-1)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_saturated_cap_passes_no_gradient_and_no_nan():
    hidden, head = make((1.0, 2.0, True), H, 3)
    hidden = (1e4 * hidden).requires_grad_()
    weight = head.weight_VH.requires_grad_()
    other, other_head = make(HEADS[0], G, 4)
    rows = Rows(torch.ones(ROWS), torch.zeros(ROWS, dtype=torch.long))
    loss, _ = distillation_loss(
        hidden, LMHead(weight, None, 1.0, 2.0), HiddenRows(other, other_head), rows, Alignment()
    )
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.abs().max() < 1e-3
    assert weight.grad.isfinite().all()
