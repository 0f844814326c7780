"""The divergences against a float64 dense reference, TRL, and closed-form facts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy_skd.config.schema import AlignmentSettings
from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import KINDS, Alignment, HiddenRows, Rows
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models import lm_head
from onpolicy_skd.models.lm_head import row_statistics


def make(rows=13, vocabulary=101, student=8, teacher=12, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=rng) * scale

    weights = torch.rand(rows, generator=rng)
    targets = torch.randint(0, vocabulary, (rows,), generator=rng)
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


def teacher_and_rows(inputs):
    return HiddenRows(inputs[2], inputs[3]), Rows(inputs[4], inputs[5])


def ours(inputs, alignment, upstream=1.0):
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    loss, rows = distillation_loss(hidden, head, *teacher_and_rows(inputs), alignment)
    (upstream * loss).backward()
    return loss.detach(), rows, hidden.grad, head.grad


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
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
    actual, expected = ours(inputs, alignment), reference(inputs, alignment)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=2e-4, atol=2e-5)


def test_gradient_agrees_with_finite_differences():
    inputs = make(rows=3, vocabulary=11, student=4, teacher=5)
    alignment = Alignment("reverse_kl", kd_weight=0.7, temperature=1.5)
    _, _, hidden_grad, _ = ours(inputs, alignment)
    direction = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-3
    values = []
    for sign in (1, -1):
        moved = [inputs[0].double() + sign * step * direction, *inputs[1:]]
        values.append(reference(moved, alignment)[0])
    slope = (values[0] - values[1]) / (2 * step)
    assert (hidden_grad.double() * direction).sum() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equals_trl(beta):
    """TRL's chunked loss is the outside oracle: same value and gradients, mean over rows, limits at beta 0 and 1."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    inputs = make(rows=16)
    inputs[4] = torch.full((16,), 1 / 16)
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    loss, _, _ = _chunked_divergence_loss(hidden[None], inputs[2][None], head, inputs[3], torch.ones(1, 16), beta)
    loss.backward()
    actual = ours(inputs, Alignment("jsd", beta))
    assert_close([actual[0], *actual[2:]], [loss.detach().double(), hidden.grad.double(), head.grad.double()])


def test_upstream_gradient_scales_and_a_second_backward_is_refused():
    inputs = make()
    plain, scaled = ours(inputs, Alignment()), ours(inputs, Alignment(), upstream=2.5)
    assert torch.allclose(scaled[2], 2.5 * plain[2])
    assert torch.allclose(scaled[3], 2.5 * plain[3])
    hidden = inputs[0].clone().requires_grad_()
    loss, _ = distillation_loss(hidden, inputs[1], *teacher_and_rows(inputs), Alignment())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_gradient_flows_only_where_it_is_wanted():
    inputs = make()
    head = inputs[1].clone().requires_grad_()
    loss, rows = distillation_loss(inputs[0], head, *teacher_and_rows(inputs), Alignment())
    (2.0 * loss).backward()
    assert_close([head.grad], [2.0 * reference(inputs, Alignment())[3]])
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
    inputs[5] = inputs[5] % 31
    loss, _ = distillation_loss(tied[ids], tied, *teacher_and_rows(inputs), Alignment())
    loss.backward()
    inputs[0] = inputs[1][ids]
    _, _, hidden_grad, head_grad = reference(inputs, Alignment())
    expected = head_grad.index_add(0, ids, hidden_grad)
    assert_close([tied.grad], [expected])


def test_coarse_compute_type_with_float32_masters():
    """bfloat16 hidden states and a float32 head: gradients keep their dtypes and stay near the reference."""
    inputs = make(rows=32, scale=0.5)
    hidden = inputs[0].bfloat16().requires_grad_()
    head = inputs[1].clone().requires_grad_()
    loss, _ = distillation_loss(
        hidden, head, HiddenRows(inputs[2].bfloat16(), inputs[3].bfloat16()), Rows(*inputs[4:]), Alignment()
    )
    loss.backward()
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.float32)
    rounded = [inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2].bfloat16(), inputs[3].bfloat16(), *inputs[4:]]
    assert_close([head.grad], [reference(rounded, Alignment())[3]], 3e-2)


def test_different_vocabularies_and_unknown_divergences_are_errors():
    inputs = make()
    with pytest.raises(ValueError, match="vocabularies differ: student 100, teacher 101"):
        distillation_loss(inputs[0], inputs[1][:100], *teacher_and_rows(inputs), Alignment())
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        Alignment("kl")
    with pytest.raises(ValueError, match="unknown estimator 'top'"):
        Alignment(estimator="top")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("chunk_rows", [None, 1, 7])
def test_row_statistics_equal_the_float64_reference(temperature, chunk_rows):
    hidden, head, *_, targets = make(scale=2.0)
    stats = row_statistics(hidden, head, targets, temperature, chunk_rows)
    entropy, logprob, raw_logprob = stats.entropy_N, stats.logprob_N, stats.raw_logprob_N
    logits = hidden.double() @ head.double().T
    q = torch.softmax(logits / temperature, -1)
    assert torch.allclose(entropy.double(), -torch.xlogy(q, q).sum(-1), rtol=1e-4, atol=1e-5)
    for actual, t in ((logprob, temperature), (raw_logprob, 1.0)):
        expected = torch.log_softmax(logits / t, -1).gather(1, targets[:, None])[:, 0]
        assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_scratch_may_be_made_in_inference_mode_and_used_outside():
    hidden, head, *_, targets = make()
    lm_head._scratches.clear()
    with torch.inference_mode():
        inside = row_statistics(hidden, head, targets)
    assert torch.equal(row_statistics(hidden, head, targets).entropy_N, inside.entropy_N)


def test_statistics_of_extreme_logits_stay_finite():
    head = torch.eye(5)
    hidden = torch.tensor([[1e4, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]])
    stats = row_statistics(hidden, head, torch.tensor([0, 1]))
    entropy, logprob = stats.entropy_N, stats.logprob_N
    assert entropy[0].item() == pytest.approx(0.0, abs=1e-6)
    assert entropy[1].item() == pytest.approx(torch.log(torch.tensor(5.0)).item())
    assert torch.isfinite(logprob).all()


# -- estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["topk_tail", "student_topk_tail"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [101, 500])
def test_topk_tail_is_exact_when_k_is_the_vocabulary(kind, top_k, estimator):
    inputs = make(scale=1.5)
    tail = Alignment(kind, 0.3, 1.5, 0.7, estimator=estimator, top_k=top_k)
    exact = Alignment(kind, 0.3, 1.5, 0.7)
    assert_close(ours(inputs, tail), [t.double() for t in ours(inputs, exact)], 1e-4)


@pytest.mark.parametrize("estimator", ["topk_tail", "student_topk_tail"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 7, 100])
def test_topk_tail_equals_its_float64_reference(kind, top_k, estimator):
    """Both distributions are merged into one model's top classes and the rest, then differentiated by autograd."""
    inputs, alignment = make(), Alignment(kind, 0.3, estimator=estimator, top_k=top_k, chunk_rows=5)
    hidden, head, other, other_head, weights = (t.double() for t in inputs[:5])
    hidden.requires_grad_()
    head.requires_grad_()
    q, p = torch.softmax(hidden @ head.T, -1), torch.softmax(other @ other_head.T, -1)
    ids = (p if estimator == "topk_tail" else q).topk(top_k).indices
    q, p = (torch.cat([d.gather(1, ids), 1 - d.gather(1, ids).sum(1, keepdim=True)], 1) for d in (q, p))
    m = 0.3 * p + 0.7 * q
    rows = {
        "reverse_kl": (q * (q / p).log()).sum(1),
        "forward_kl": (p * (p / q).log()).sum(1),
        "jsd": 0.3 * (p * (p / m).log()).sum(1) + 0.7 * (q * (q / m).log()).sum(1),
    }[kind]
    (rows * weights).sum().backward()
    actual = ours(inputs, alignment)
    assert_close(actual[1:], [rows.detach(), hidden.grad, head.grad], 1e-4)
    exact = ours(inputs, Alignment(kind, 0.3))[1]
    assert (actual[1] <= exact + 1e-5).all()  # merging classes cannot add divergence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_equals_exact_in_expectation(kind, temperature):
    """The expectation over the target is taken exactly: every class once, weighted by its probability."""
    vocabulary = 23
    inputs = make(rows=1, vocabulary=vocabulary)
    hidden, head, other, other_head = inputs[:4]
    q = torch.softmax(hidden.double() @ head.double().T / temperature, -1)[0]
    all_targets = [hidden.expand(vocabulary, -1), head, other.expand(vocabulary, -1), other_head, q.float(),
             torch.arange(vocabulary)]  # fmt: skip
    actual = ours(all_targets, Alignment(kind, 0.3, temperature, estimator="sampled"))
    inputs[4] = torch.ones(1)
    expected = reference(inputs, Alignment(kind, 0.3, temperature))
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert_close([actual[2].sum(0, keepdim=True), actual[3]], expected[2:], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_logit", [0.0, -300.0])
def test_sampled_stays_finite_where_the_probability_of_the_target_underflows(kind, teacher_logit):
    """q(y) = exp(-150) is 0 in float32, its logarithm is not; the teacher finds y likely, or less likely still."""
    head = torch.eye(3)
    student, teacher = torch.tensor([[0.0, 0.0, -150.0]]), torch.tensor([[-5.0, -5.0, teacher_logit]])
    rows, alignment = Rows(torch.ones(1), torch.tensor([2])), Alignment(kind, 0.3, estimator="sampled")
    loss, values, gradient, _ = run_rows([student, head, teacher, head], rows, alignment)
    assert torch.isfinite(torch.cat([loss[None], values, gradient[0]])).all()
    if kind == "reverse_kl":
        log_q, log_p = (t.double().log_softmax(-1)[0, 2].item() for t in (student, teacher))
        assert values.item() == pytest.approx(log_q - log_p, rel=1e-5)
        assert gradient[0, 2].item() == pytest.approx(log_q - log_p, rel=1e-5)


def test_the_settings_reach_the_loss():
    cfg = AlignmentSettings(divergence="jsd", beta=0.25, temperature=2.0, kd_weight=0.5, chunk_rows=7, top_k=9)
    assert Alignment.from_settings(cfg) == Alignment("jsd", 0.25, 2.0, 0.5, 7, top_k=9)


# -- variants --------------------------------------------------------------------------------------------------------


def run_rows(inputs, rows, alignment):
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    loss, values = distillation_loss(hidden, head, HiddenRows(inputs[2], inputs[3]), rows, alignment)
    loss.backward()
    return loss.detach(), values, hidden.grad, head.grad


def test_rows_may_differ_in_temperature():
    inputs = make()
    temperatures = torch.linspace(0.5, 3.0, 13)
    actual = run_rows(inputs, Rows(inputs[4], inputs[5], temperatures), Alignment(kd_weight=0.8, chunk_rows=4))
    for i, t in enumerate(temperatures.tolist()):
        row = [inputs[0][i : i + 1], inputs[1], inputs[2][i : i + 1], *inputs[3:4], inputs[4][i : i + 1],
               inputs[5][i : i + 1]]  # fmt: skip
        expected = reference(row, Alignment(temperature=t, kd_weight=0.8))
        assert_close([actual[1][i : i + 1], actual[2][i : i + 1]], [expected[1], expected[2]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_decoupled_equals_its_float64_reference(temperature):
    inputs = make()
    pairs = torch.rand(13, 2, generator=torch.Generator().manual_seed(3)) * 2
    hidden, head, other, other_head, weights = (t.double() for t in inputs[:5])
    hidden.requires_grad_()
    head.requires_grad_()
    q, p = (torch.softmax(h @ w.T / temperature, -1) for h, w in ((hidden, head), (other, other_head)))
    at = torch.nn.functional.one_hot(inputs[5], 101).bool()
    q_y, p_y = q[at], p[at]
    target = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    q_hat, p_hat = ((d / (1 - d[at][:, None]))[~at].view(13, 100) for d in (q, p))
    rows = pairs[:, 0] * target + pairs[:, 1] * (p_hat * (p_hat / q_hat).log()).sum(1)
    (rows * weights).sum().backward()
    alignment = Alignment("forward_kl", temperature=temperature, chunk_rows=5)
    actual = run_rows(inputs, Rows(inputs[4], inputs[5], decoupled_N2=pairs), alignment)
    assert_close(actual[1:], [rows.detach(), hidden.grad, head.grad], 1e-4)


def test_decoupled_is_forward_kl_if_the_other_classes_weigh_what_the_teacher_gives_them():
    """KL(p||q) = TCKD + (1 - p_y) NCKD (arXiv 2203.08679, Eq. 5)."""
    inputs = make()
    p_y = torch.softmax(inputs[2] @ inputs[3].T, -1).gather(1, inputs[5][:, None])
    pairs = torch.cat([torch.ones(13, 1), 1 - p_y], 1)
    actual = run_rows(inputs, Rows(inputs[4], inputs[5], decoupled_N2=pairs), Alignment("forward_kl", kd_weight=0.5))
    assert_close(actual, reference(inputs, Alignment("forward_kl", kd_weight=0.5)), 1e-4)


def test_decoupled_stays_finite_where_both_are_sure():
    head = torch.eye(4)
    hidden, other = torch.tensor([[60.0, 0, 0, 0]]), torch.tensor([[50.0, 1, 0, 0]])
    rows = Rows(torch.ones(1), torch.tensor([0]), decoupled_N2=torch.ones(1, 2))
    loss, values, gradient, _ = run_rows([hidden, head, other, head], rows, Alignment("forward_kl"))
    assert torch.isfinite(torch.cat([loss[None], values, gradient[0]])).all()


# -- sparse targets --------------------------------------------------------------------------------------------------


def sparse_reference(inputs, ids, probs, residual):
    """The dense target written out in float64 and differentiated by autograd."""
    hidden, head = inputs[0].double().requires_grad_(), inputs[1].double().requires_grad_()
    log_q = torch.log_softmax(hidden @ head.T, -1)
    target = torch.zeros_like(log_q).scatter_add(1, ids, probs.double()).detach()
    lacking = 1 - target.sum(1)
    if residual == "smooth":
        target = target + (lacking / target.shape[1])[:, None]
    rows = (torch.xlogy(target, target) - target * log_q).sum(1)
    if residual == "ghost":
        outside = (log_q.exp() * (target == 0)).sum(1)
        rows = rows + lacking * (lacking / outside).log()
    (rows * inputs[4].double()).sum().backward()
    return rows.detach(), hidden.grad, head.grad, target, log_q.detach().exp()


def sparse_case(slots=6):
    """Teacher probabilities of a few classes; the last slot of every second row is unused and repeats a used class."""
    inputs = make(student=12)
    p = torch.softmax(inputs[2] @ inputs[3].T, -1)
    top = p.topk(slots)
    ids, probs = top.indices.clone(), top.values.clone()
    probs[::2, -1] = 0.0
    ids[::2, -1] = ids[::2, 0]
    return inputs, ids, probs


@pytest.mark.parametrize("residual", ["none", "ghost", "smooth"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_sparse_losses_equal_their_dense_float64_reference(residual, chunk_rows):
    inputs, ids, probs = sparse_case()
    rows, hidden_grad, head_grad, *_ = sparse_reference(inputs, ids, probs, residual)
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    targets = SparseTargets(ids, probs, residual)
    loss, values = distillation_loss(hidden, head, targets, Rows(*inputs[4:]), Alignment(chunk_rows=chunk_rows))
    loss.backward()
    assert_close([values, hidden.grad, head.grad], [rows, hidden_grad, head_grad], 2e-5)


@pytest.mark.parametrize("residual", ["none", "ghost", "smooth"])
def test_sparse_gradients_at_the_logits_equal_the_closed_forms_of_the_appendix(residual):
    """RS-KD, appendix A: Eq. 4 in general, Eq. 5 for top-K, A.5 for the ghost token."""
    inputs, ids, probs = sparse_case()
    *_, target, q = sparse_reference(inputs, ids, probs, residual)
    logits = (inputs[0] @ inputs[1].T).requires_grad_()
    identity = torch.eye(101)
    loss, _ = distillation_loss(
        logits, identity, SparseTargets(ids, probs, residual), Rows(torch.ones(13), inputs[5]), Alignment()
    )
    loss.backward()
    kept = torch.zeros_like(target).scatter_add(1, ids, probs.double()) > 0
    mass_t = target.sum(1, keepdim=True)
    if residual == "ghost":
        mass_q = (q * kept).sum(1, keepdim=True)
        expected = torch.where(kept, q - target, (mass_t - mass_q) / (1 - mass_q) * q)
    else:
        expected = mass_t * q - target
    assert torch.allclose(logits.grad.double(), expected, atol=1e-6)


def test_a_full_ghost_target_is_forward_kl():
    """With every class told apart nothing is left for the ghost."""
    inputs = make(student=12)
    p = torch.softmax(inputs[2] @ inputs[3].T, -1)
    targets = SparseTargets(torch.arange(101).expand(13, -1), p, "ghost")
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    loss, rows = distillation_loss(hidden, head, targets, Rows(*inputs[4:]), Alignment(kd_weight=0.6))
    loss.backward()
    assert_close([loss.detach(), rows, hidden.grad, head.grad],
                 reference(inputs, Alignment("forward_kl", kd_weight=0.6)), 1e-4)  # fmt: skip


def test_no_rows_mean_no_loss_and_no_gradient():
    hidden = torch.zeros(0, 4, requires_grad=True)
    head = torch.randn(9, 4, requires_grad=True)
    nothing = Rows(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    loss, values = distillation_loss(
        hidden, head, HiddenRows(torch.zeros(0, 4), torch.randn(9, 4)), nothing, Alignment()
    )
    loss.backward()
    assert loss == 0
    assert len(values) == 0
    assert head.grad.norm() == 0


@pytest.mark.parametrize(("free_gb", "logits"), [(0.1, 2e7), (8, 6.25e7), (40, 3.125e8), (500, 4e8)])
def test_a_gpus_chunks_take_an_eighth_of_its_free_memory_at_most(free_gb, logits):
    assert lm_head._logits_for(int(free_gb * 1e9)) == logits
