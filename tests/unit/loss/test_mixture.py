"""Mixtures of reverse and forward KL, their gates and schedules, and the bound on log ratios, against float64."""

import dataclasses
import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import AlignmentSettings, MixtureGate, MixtureSettings
from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
from onpolicy_skd.loss.mixture import GATES, GateRows, Mixture, progress
from onpolicy_skd.models.lm_head import RowStatistics

ROWS, VOCABULARY = 13, 101


def make(seed=0, rows=ROWS, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((rows, 8), (VOCABULARY, 8), (rows, 12), (VOCABULARY, 12))
    tensors = [torch.randn(*shape, generator=rng) * scale for shape in shapes]
    targets = torch.randint(0, VOCABULARY, (rows,), generator=rng)
    return [*tensors, torch.rand(rows, generator=rng), targets]


def mixture(gate="constant", step=10**9, **options):
    return Mixture.from_settings(MixtureSettings(gate=gate, **options)).at(step)


def fixed(pairs, **options):
    """Return a mixture whose gate returns ``pairs`` [b, 2] row by row, in blocks of any size."""
    rows = iter(pairs)
    options = MixtureSettings(gate="constant", **options)
    return Mixture(lambda gate_rows, _: torch.stack([next(rows) for _ in gate_rows.entropy_b]), options)


def ours(inputs, alignment, observed=None):
    hidden, head = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    rows = Rows(inputs[4], inputs[5])
    loss, values = distillation_loss(hidden, head, HiddenRows(inputs[2], inputs[3]), rows, alignment, observed)
    loss.backward()
    return loss.detach(), values, hidden.grad, head.grad


def reference(inputs, pairs, skew=0.0, temperature=1.0, kd_weight=1.0, factors=None):
    """Dense, float64, differentiated by autograd; ``factors``: of each row's loss."""
    hidden, head, other, other_head, weights = (t.double() for t in inputs[:5])
    hidden.requires_grad_()
    head.requires_grad_()
    q, p = (torch.softmax(h @ w.T / temperature, -1) for h, w in ((hidden, head), (other, other_head)))
    reverse = (q * (q / ((1 - skew) * p + skew * q)).log()).sum(-1)
    forward = (p * (p / ((1 - skew) * q + skew * p)).log()).sum(-1)
    a, b = pairs.double().unbind(1)
    values = a * reverse + b * forward
    loss = kd_weight * values - (1 - kd_weight) * q.gather(1, inputs[5][:, None])[:, 0].log()
    skipped = (pairs == 0).all(1)
    factors = (torch.ones(len(weights)) if factors is None else factors).double() * ~skipped
    total = (weights * factors * loss).sum()
    total.backward()
    return total.detach(), values.detach(), hidden.grad, head.grad


def assert_close(actual, expected, tolerance=1e-4):
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-9


def pairs_of(seed, rows=ROWS):
    pairs = torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) * 2
    pairs[::3] = 0.0  # skipped
    return pairs


def test_the_names_in_the_settings_are_those_of_the_code():
    assert set(get_args(MixtureGate)) == {"none", *GATES}


@pytest.mark.parametrize("skew", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("chunk_rows", "kd_weight"), [(None, 1.0), (1, 1.0), (5, 0.6)])
def test_value_and_gradient_equal_the_dense_float64_reference(skew, temperature, chunk_rows, kd_weight):
    inputs, pairs = make(), pairs_of(3)
    alignment = Alignment("jsd", 0.5, temperature, kd_weight, chunk_rows, mixture=fixed(pairs, skew=skew))
    assert_close(ours(inputs, alignment), reference(inputs, pairs, skew, temperature, kd_weight))


@given_settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(0, 99), st.sampled_from([0.0, 0.01, 0.5, 0.99]), st.none() | st.integers(1, 9))
def test_any_rows_and_chunks(rows, seed, skew, chunk_rows):
    inputs, pairs = make(seed, rows, 0.7), pairs_of(seed, rows)
    alignment = Alignment(chunk_rows=chunk_rows, mixture=fixed(pairs, skew=skew))
    for a, b in zip(ours(inputs, alignment), reference(inputs, pairs, skew), strict=True):
        assert torch.allclose(a.double(), b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("share", "divergence"), [(1.0, "reverse_kl"), (0.0, "forward_kl")])
@pytest.mark.parametrize("skew", [0.0, 1e-15])
def test_the_limits_are_the_two_divergences(share, divergence, skew):
    inputs = make()
    mixed = ours(inputs, Alignment(mixture=mixture(reverse_weight=share, skew=skew)))
    assert_close(mixed, [t.double() for t in ours(inputs, Alignment(divergence))], 1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_skewed_divergence_alone_equals_the_reference(weight, scheduled):
    """The other divergence is not formed, unless a schedule still gives it weight."""
    inputs = make()
    schedule = {"start": (1.0 - weight, weight), "steps": 4} if scheduled else {}
    alone = mixture(reverse_weight=weight, skew=0.1, step=1 if scheduled else 10**9, **schedule)
    assert alone.used == ((True, True) if scheduled else (weight == 1.0, weight == 0.0))
    pairs = alone.weights(GateRows(*[torch.zeros(ROWS)] * 5))
    assert_close(ours(inputs, Alignment(mixture=alone)), reference(inputs, pairs, skew=0.1))


@pytest.mark.parametrize("skew", [0.0, 0.3])
def test_identical_distributions_have_no_divergence_and_no_gradient(skew):
    inputs = make()
    inputs[2], inputs[3] = inputs[0].clone(), inputs[1].clone()
    _, values, hidden_grad, head_grad = ours(inputs, Alignment(mixture=mixture(skew=skew)))
    assert values.abs().max() < 1e-6
    assert hidden_grad.norm() < 1e-5
    assert head_grad.norm() < 1e-5


@pytest.mark.parametrize("skew", [0.0, 0.1])
def test_extreme_logits_stay_finite(skew):
    head, rows = torch.eye(3), torch.tensor([[0.0, 0.0, -150.0], [200.0, 0.0, 0.0]])
    inputs = [rows, head, rows.flip(0).contiguous(), head, torch.ones(2), torch.tensor([2, 1])]
    assert all(torch.isfinite(t).all() for t in ours(inputs, Alignment(mixture=mixture(skew=skew))))


# -- gates -------------------------------------------------------------------------------------------------------------


def test_gates_see_entropies_log_ratios_and_divergences():
    inputs, temperature, seen = make(), 1.5, []
    alignment = Alignment(temperature=temperature, mixture=Mixture(
        lambda rows, _: seen.append(rows) or torch.ones(ROWS, 2), MixtureSettings(gate="constant")))  # fmt: skip
    ours(inputs, alignment)
    hidden, head, other, other_head = (t.double() for t in inputs[:4])
    q, p = (torch.softmax(h @ w.T / temperature, -1) for h, w in ((hidden, head), (other, other_head)))
    at = inputs[5][:, None]
    expected = [-(q * q.log()).sum(1), -(p * p.log()).sum(1), (p / q).gather(1, at)[:, 0].log(),
                (q * (q / p).log()).sum(1), (p * (p / q).log()).sum(1)]  # fmt: skip
    for actual, values in zip(dataclasses.astuple(seen[0]), expected, strict=True):
        assert torch.allclose(actual.double(), values, rtol=1e-4, atol=1e-5)


def test_statistics_are_observed_as_without_a_mixture():
    inputs = make()
    plain, mixed = (RowStatistics.empty(ROWS, torch.device("cpu")) for _ in range(2))
    ours(inputs, Alignment(), plain)
    ours(inputs, Alignment(mixture=mixture()), mixed)
    assert torch.equal(mixed.entropy_N, plain.entropy_N)
    assert torch.equal(mixed.logprob_N, plain.logprob_N)


def gate_rows(entropy, teacher_entropy):
    zeros = torch.zeros(len(entropy))
    return GateRows(torch.tensor(entropy), torch.tensor(teacher_entropy), zeros, zeros, zeros)


def test_eopd_adds_forward_kl_where_the_teacher_is_unsure():
    gate = mixture("eopd", forward_weight=0.4, teacher_threshold=0.8)
    weights = gate.weights(gate_rows([0.0, 3.0, 0.0], [0.8, 0.81, 5.0]))
    assert weights.tolist() == [[1.0, 0.0], [1.0, pytest.approx(0.4)], [1.0, pytest.approx(0.4)]]


def test_zones_are_the_four_cells_of_two_thresholds():
    cells = {"both_sure": [0.0, 0.0], "student_sure": [0.0, 3.0], "teacher_sure": [2.0, 0.0], "both_unsure": [0.5, 4.0]}
    gate = mixture("zones", student_threshold=0.5, teacher_threshold=1.5, **cells)
    rows = gate_rows([0.5, 0.5, 0.6, 0.6], [1.5, 1.6, 1.5, 1.6])
    assert gate.weights(rows).tolist() == list(cells.values())


@pytest.mark.parametrize(
    ("weights", "rows"),
    [([[1.0, -0.1]], 1), ([[math.nan, 1.0]], 1), ([[math.inf, 1.0]], 1), ([[1.0]], 1), ([[1.0, 1.0]], 2)],
)
def test_unusable_weights_of_a_gate_are_an_error(weights, rows):
    wrong = Mixture(lambda *_: torch.tensor(weights), MixtureSettings(gate="constant"))
    with pytest.raises(ValueError, match=r"alignment\.mixture\.gate: must return two weights per row"):
        wrong.weights(gate_rows([0.0] * rows, [0.0] * rows))


def test_a_gate_in_user_code(tmp_path, monkeypatch):
    (tmp_path / "user_gate.py").write_text(
        "import torch\n"
        "def surprised(rows, cfg):\n"
        "    low = (rows.log_ratio_b < 0).float()\n    return torch.stack([1 - low, cfg.forward_weight * low], 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = AlignmentSettings(mixture={"gate": "user_gate:surprised", "forward_weight": 0.5})
    inputs = make()
    q, p = (torch.softmax(h.double() @ w.double().T, -1) for h, w in (inputs[0:2], inputs[2:4]))
    low = (p / q).gather(1, inputs[5][:, None])[:, 0] < 1
    pairs = torch.stack([(~low).float(), 0.5 * low], 1)
    assert 0 < low.sum() < ROWS
    assert_close(ours(inputs, Alignment.from_settings(cfg)), reference(inputs, pairs))
    with pytest.raises(ConfigError, match=r"alignment\.mixture\.gate=user_gate:no: cannot be imported"):
        Alignment.from_settings(AlignmentSettings(mixture={"gate": "user_gate:no"}))


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]),
        ("linear", [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ("cosine", [0.0, 0.5 - 0.125**0.5, 0.5, 0.5 + 0.125**0.5, 1.0, 1.0]),
    ],
)
def test_the_way_from_start_to_the_gates_weights(schedule, expected):
    options = MixtureSettings(gate="constant", start=[0.0, 1.0], schedule=schedule, steps=4, reverse_weight=1.0)
    assert [progress(options, step) for step in range(6)] == pytest.approx(expected)
    rows = gate_rows([0.0], [0.0])
    for step, done in enumerate(expected):
        assert Mixture.from_settings(options).at(step).weights(rows)[0].tolist() == pytest.approx([done, 1 - done])


def test_without_start_the_gates_weights_hold_from_the_first_step():
    assert progress(MixtureSettings(gate="constant"), 0) == 1.0
    assert Mixture.from_settings(MixtureSettings()) is None
    assert Alignment().at(3) == Alignment()


def test_a_skipped_position_is_skipped_from_the_start():
    gate = mixture("zones", step=0, start=[0.0, 1.0])
    assert gate.weights(gate_rows([0.0, 2.0], [0.0, 0.0])).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_the_plain_divergence_of_a_loss_has_neither_mixture_nor_bound():
    loss = Alignment("jsd", 0.3, 1.5, 0.7, 4, "sampled", mixture=mixture(), clip=1.0)
    assert loss.exact("jsd") == Alignment("jsd", 0.3, 1.5, chunk_rows=4)
    assert loss.exact("forward_kl").kind == "forward_kl"


# -- the bound on log ratios -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mask", "scale"])
@pytest.mark.parametrize("kd_weight", [1.0, 0.6])
def test_positions_beyond_the_bound_are_masked_or_scaled_to_it(mode, kd_weight):
    inputs, clip = make(), 1.0
    q, p = (torch.softmax(h.double() @ w.double().T, -1) for h, w in (inputs[0:2], inputs[2:4]))
    size = (p / q).gather(1, inputs[5][:, None])[:, 0].log().abs()
    factors = (size <= clip).double() if mode == "mask" else torch.where(size > clip, clip / size, 1.0)
    assert 0 < (factors < 1).sum() < ROWS
    actual = ours(inputs, Alignment(kd_weight=kd_weight, chunk_rows=5, clip=clip, clip_mode=mode))
    pairs = torch.tensor([[1.0, 0.0]]).expand(ROWS, 2)
    assert_close(actual, reference(inputs, pairs, kd_weight=kd_weight, factors=factors))


@pytest.mark.parametrize("mode", ["mask", "scale"])
@pytest.mark.parametrize("options", [{}, {"estimator": "sampled"}, {"estimator": "topk_tail", "top_k": 5},
                                     {"mixture": mixture("eopd")}])  # fmt: skip
def test_a_bound_that_no_position_reaches_changes_nothing(mode, options):
    inputs = make()
    plain = Alignment(**options)
    bounded = Alignment(**options, clip=1e3, clip_mode=mode)
    assert_close(ours(inputs, bounded), [t.double() for t in ours(inputs, plain)], 1e-6)


def test_the_gradient_of_the_sampled_token_is_scaled_to_the_bound():
    inputs, clip = make(), 0.5
    inputs[4] = torch.ones(ROWS)
    scaled = ours(inputs, Alignment(estimator="sampled", clip=clip, clip_mode="scale"))
    q, p = (torch.softmax(h.double() @ w.double().T, -1) for h, w in (inputs[0:2], inputs[2:4]))
    slope = (q / p).gather(1, inputs[5][:, None]).log().clamp(-clip, clip)
    one_hot = torch.nn.functional.one_hot(inputs[5], VOCABULARY)
    assert_close([scaled[2]], [slope * (one_hot - q) @ inputs[1].double()])
