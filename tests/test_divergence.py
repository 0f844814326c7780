"""The divergences against a float64 dense reference, TRL, and closed-form facts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy_skd.divergence import KINDS, Alignment, distillation_loss
from onpolicy_skd.lm_head import row_statistics


def make(rows=13, vocabulary=101, student=8, teacher=12, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=draw) * scale

    weights = torch.rand(rows, generator=draw)
    targets = torch.randint(0, vocabulary, (rows,), generator=draw)
    return [normal(rows, student), normal(vocabulary, student), normal(rows, teacher), normal(vocabulary, teacher),
            weights, targets]  # fmt: skip


def reference(inputs, alignment):
    """Dense, float64, differentiated by autograd: the loss, its rows, and the gradients to hidden states and head."""
    hidden, head, other, other_head, weights = (t.double() for t in inputs[:5])
    hidden.requires_grad_()
    head.requires_grad_()
    log_q = torch.log_softmax(hidden @ head.T / alignment.temperature, -1)
    log_p = torch.log_softmax(other @ other_head.T / alignment.temperature, -1)
    q, p, beta = log_q.exp(), log_p.exp(), alignment.beta
    if alignment.kind == "reverse_kl":
        rows = (q * (log_q - log_p)).sum(-1)
    elif alignment.kind == "forward_kl":
        rows = (p * (log_p - log_q)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        rows = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    cross_entropy = -log_q.gather(1, inputs[5][:, None])[:, 0]
    loss = (weights * (alignment.kd_weight * rows + (1 - alignment.kd_weight) * cross_entropy)).sum()
    loss.backward()
    return loss.detach(), rows.detach(), hidden.grad, head.grad


def ours(inputs, alignment, upstream=1.0):
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    loss, rows = distillation_loss(hidden, head, *inputs[2:], alignment)
    (upstream * loss).backward()
    return loss.detach(), rows, hidden.grad, head.grad


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kd_weight", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 13, 64])
def test_value_and_gradient_equal_the_dense_float64_reference(kind, kd_weight, temperature, chunk_rows):
    alignment = Alignment(kind, 0.3, temperature, kd_weight, chunk_rows)
    inputs = make()
    assert_close(ours(inputs, alignment), reference(inputs, alignment))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30), vocabulary=st.integers(2, 400), student=st.integers(1, 24), teacher=st.integers(1, 24),
    chunk_rows=st.none() | st.integers(1, 40), seed=st.integers(0, 99), kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_any_shape_and_chunk(rows, vocabulary, student, teacher, chunk_rows, seed, kind):
    inputs = make(rows, vocabulary, student, teacher, seed, 0.7)
    alignment = Alignment(kind, 0.5, chunk_rows=chunk_rows)
    found, expected = ours(inputs, alignment), reference(inputs, alignment)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=2e-4, atol=2e-5)


def test_gradient_agrees_with_finite_differences():
    inputs = make(rows=3, vocabulary=11, student=4, teacher=5)
    alignment = Alignment("reverse_kl", kd_weight=0.7, temperature=1.5)
    _, _, hidden_grad, _ = ours(inputs, alignment)
    direction = torch.randn_like(inputs[0])
    step = 1e-3
    values = []
    for sign in (1, -1):
        moved = [inputs[0] + sign * step * direction, *inputs[1:]]
        values.append(reference(moved, alignment)[0])
    slope = (values[0] - values[1]) / (2 * step)
    assert (hidden_grad.double() * direction).sum() == pytest.approx(slope.item(), rel=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_trl(beta):
    """TRL's chunked loss is the outside oracle: same value and gradients, mean over rows, limits at beta 0 and 1."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    inputs = make(rows=16)
    inputs[4] = torch.full((16,), 1 / 16)
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    loss, _, _ = _chunked_divergence_loss(hidden[None], inputs[2][None], head, inputs[3], torch.ones(1, 16), beta)
    loss.backward()
    found = ours(inputs, Alignment("jsd", beta))
    assert_close([found[0], *found[2:]], [loss.detach().double(), hidden.grad.double(), head.grad.double()])


def test_upstream_gradient_scales_and_a_second_backward_is_refused():
    inputs = make()
    plain, scaled = ours(inputs, Alignment()), ours(inputs, Alignment(), upstream=2.5)
    assert torch.allclose(scaled[2], 2.5 * plain[2])
    assert torch.allclose(scaled[3], 2.5 * plain[3])
    hidden = inputs[0].clone().requires_grad_()
    loss, _ = distillation_loss(hidden, *inputs[1:], Alignment())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_gradient_flows_only_where_it_is_wanted():
    inputs = make()
    head = inputs[1].clone().requires_grad_()
    loss, rows = distillation_loss(inputs[0], head, *inputs[2:], Alignment())
    loss.backward()
    assert head.grad is not None
    assert not rows.requires_grad


def test_identical_distributions_have_no_divergence_and_no_gradient():
    inputs = make(student=8, teacher=8)
    inputs[2], inputs[3] = inputs[0].clone(), inputs[1].clone()
    for kind in KINDS:
        _, rows, hidden_grad, head_grad = ours(inputs, Alignment(kind))
        assert rows.abs().max() < 1e-6
        assert hidden_grad.norm() < 1e-5
        assert head_grad.norm() < 1e-5


def test_the_head_may_share_its_storage_with_embeddings():
    """A tied head: gradients of both uses add up in one parameter."""
    inputs = make(vocabulary=31)
    ids = torch.arange(13) % 31
    tied = inputs[1].clone().requires_grad_()
    loss, _ = distillation_loss(tied[ids], tied, *inputs[2:4], inputs[4], inputs[5] % 31, Alignment())
    loss.backward()
    inputs[5] = inputs[5] % 31
    inputs[0] = inputs[1][ids]
    _, _, hidden_grad, head_grad = reference(inputs, Alignment())
    expected = head_grad.index_add(0, ids, hidden_grad)
    assert_close([tied.grad], [expected])


def test_coarse_compute_type_with_float32_masters():
    """bfloat16 hidden states against a float32 head: gradients keep their own types and stay near the reference."""
    inputs = make(rows=32, scale=0.5)
    hidden = inputs[0].bfloat16().requires_grad_()
    head = inputs[1].clone().requires_grad_()
    loss, _ = distillation_loss(hidden, head, inputs[2].bfloat16(), inputs[3].bfloat16(), *inputs[4:], Alignment())
    loss.backward()
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.float32)
    rounded = [inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2].bfloat16(), inputs[3].bfloat16(), *inputs[4:]]
    assert_close([head.grad], [reference(rounded, Alignment())[3]], 3e-2)


def test_different_vocabularies_and_unknown_divergences_are_errors():
    inputs = make()
    with pytest.raises(ValueError, match="vocabularies differ: student 100, teacher 101"):
        distillation_loss(inputs[0], inputs[1][:100], *inputs[2:], Alignment())
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        Alignment("kl")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7])
def test_row_statistics_equal_the_float64_reference(temperature, chunk_rows):
    hidden, head, *_, targets = make(scale=2.0)
    entropy, logprob = row_statistics(hidden, head, targets, temperature, chunk_rows)
    logits = hidden.double() @ head.double().T
    q = torch.softmax(logits / temperature, -1)
    assert torch.allclose(entropy.double(), -torch.xlogy(q, q).sum(-1), rtol=1e-4, atol=1e-5)
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logprob.double(), expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_extreme_logits_stay_finite():
    head = torch.eye(5)
    hidden = torch.tensor([[1e4, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]])
    entropy, logprob = row_statistics(hidden, head, torch.tensor([0, 1]))
    assert entropy[0].item() == pytest.approx(0.0, abs=1e-6)
    assert entropy[1].item() == pytest.approx(torch.log(torch.tensor(5.0)).item())
    assert torch.isfinite(logprob).all()
