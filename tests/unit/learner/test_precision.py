"""float16: loss scaling, overflows; and how much of an update a forward sees."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import make_trajectories, tiny_settings
from learner_helpers import LENGTHS, build, relative

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.learner import precision
from onpolicy_skd.learner.learner import GradientOverflowError, Learner, NonFiniteLossError
from onpolicy_skd.learner.precision import LossScale, precision_warning, sampled_weights, update_sums
from onpolicy_skd.models import loading
from onpolicy_skd.models.loading import load_model, saved_dtype
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.transformers_engine import TransformersEngine
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.types import RolloutRequest, SamplingParams

HALF = {"learner": {"compute_dtype": "float16", "lr": 1e-3, "warmup_steps": 0}}
VARIANTS = {
    "full_kd": {},
    "cross-entropy": {"alignment": {"kd_weight": 0.5}},
    "egad": {"alignment": {"variant": "egad", "feature_entropy": 0.0}, "positions": {"k": 1.0}},
    "ema_self": {"alignment": {"ema_weight": 0.5}},
    "rs_kd": {"mode": "off_policy", "classes": {"sampler": "rs_kd", "draws": 8}},
}


def step(learner, teacher, seed=0):
    batch = make_trajectories(LENGTHS, seed=seed, version=learner.version)
    teacher.encode(batch)
    return learner.step(batch)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_scale_changes_no_digit_of_a_float32_step(name):
    """A power of two is exact: the same losses, norms and weights, whichever terms the loss has."""
    (plain, teacher), (scaled, other) = build(**VARIANTS[name]), build(**VARIANTS[name])
    scaled.state.loss_scale.value = 2.0**12
    for seed in range(3):
        expected, record = step(plain, teacher, seed), step(scaled, other, seed)
        assert (record.loss, record.grad_norm) == (expected.loss, expected.grad_norm)
    for a, b in zip(plain.state.named.values(), scaled.state.named.values(), strict=True):
        assert torch.equal(a, b)


def test_without_a_scale_float16_loses_small_gradients_and_with_it_none():
    """Each of these samples is one of 100,000 in the step."""
    batch = make_trajectories([(6, 40)] * 8)

    def scaled(compute, scale):
        learner, teacher = build(learner={"compute_dtype": compute})
        learner.state.loss_scale.value = scale
        teacher.encode(batch)
        learner.accumulate(batch, 1e5)
        return {n: p.grad / scale for n, p in learner.state.named.items()}

    exact = scaled("float32", 1.0)
    lost, kept, coarse = (relative(scaled(*case), exact) for case in
                          (("float16", 1.0), ("float16", 2.0**16), ("bfloat16", 1.0)))  # fmt: skip
    assert kept < 0.1 * lost
    assert kept < 0.25 * coarse  # eight times finer


def test_an_overflow_leaves_weights_alone_halves_the_scale_and_is_counted():
    learner, teacher = build(**HALF)
    learner.state.loss_scale.value = 2.0**24
    weights = {n: p.clone() for n, p in learner.state.named.items()}
    messages = []
    while not learner.version:
        assert all(torch.equal(p, weights[n]) for n, p in learner.state.named.items())
        assert not learner.state.optimizer.state
        try:
            record = step(learner, teacher)
        except GradientOverflowError as error:
            messages.append(str(error))
    overflows = len(messages)
    assert overflows > 0
    assert all(f"{2.0 ** (23 - i):g}" in text for i, text in enumerate(messages))
    assert (record.overflows, record.loss_scale) == (overflows, 2.0 ** (24 - overflows))
    assert not torch.equal(learner.state.named["model.norm.weight"], weights["model.norm.weight"])


def test_a_gradient_that_no_scale_helps_is_a_loss_that_is_not_finite():
    learner, teacher = build(**HALF)
    learner.state.loss_scale.value = 2.0
    parameter = learner.state.named["model.norm.weight"]
    handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(GradientOverflowError):
        step(learner, teacher)
    with pytest.raises(NonFiniteLossError, match="gradient norm") as caught:
        step(learner, teacher)
    assert not isinstance(caught.value, GradientOverflowError)
    handle.remove()
    assert step(learner, teacher).overflows == 1


def test_the_scale_grows_after_steps_without_an_overflow(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 2)
    scale = LossScale(torch.float16)
    for expected in (16, 17, 17, 18):
        scale.stepped()
        assert scale.value == 2.0**expected
    scale.overflowed()
    scale.stepped()
    assert scale.value == 2.0**17
    for _ in range(40):
        scale.stepped()
    assert scale.value == precision.LARGEST_SCALE
    for dtype in (torch.float32, torch.bfloat16):
        other = LossScale(dtype)
        for _ in range(4):
            other.stepped()
        assert (other.value, other.can_halve(), other.state_dict()) == (1.0, False, {})


def test_a_checkpoint_holds_the_scale(tmp_path):
    learner, teacher = build(**HALF)
    learner.state.loss_scale.value, learner.state.loss_scale.overflows = 2.0**9, 7
    for seed in range(3):
        step(learner, teacher, seed)
    checkpoint.save(tmp_path, 3, {}, learner.state.tensors(), keep=1)
    resumed, other = build(**HALF)
    resumed.state.restore(checkpoint.newest(tmp_path).tensors, 3)
    assert resumed.state.loss_scale.state_dict()["state"].tolist() == [2.0**9, 7, 3]
    assert dataclasses.replace(step(resumed, other, 3), learner_seconds=0.0, teacher_wait_seconds=0.0) == (
        dataclasses.replace(step(learner, teacher, 3), learner_seconds=0.0, teacher_wait_seconds=0.0)
    )
    plain, _ = build()  # of a run that continues in another type
    plain.state.restore(checkpoint.newest(tmp_path).tensors, 3)
    assert plain.state.loss_scale.value == 1.0


def test_engine_and_learner_agree_in_float16():
    settings = tiny_settings(**HALF, rollout={"dtype": "float16", "max_tokens": 24})
    engine = TransformersEngine("bundled:demo_student", settings)
    requests = [RolloutRequest(f"t{i}", list(range(3 + i, 12 + i)), i) for i in range(6)]
    gaps = {}
    for dtype in ("float16", "bfloat16"):
        student = split(load_model("bundled:demo_student", torch.float32, "cpu"), 512)
        learner = Learner(student, None, tiny_settings(learner={"compute_dtype": dtype}), 0, 10)
        gaps[dtype] = np.mean(learner.scorer.sampler_gaps(engine.generate(requests, SamplingParams(24))))
    assert gaps["float16"] < 2e-3
    assert gaps["float16"] < gaps["bfloat16"]  # two types differ more


@pytest.mark.parametrize(("dtype", "expected"), [("float16", torch.float16), ("auto", torch.bfloat16)])
def test_a_bfloat16_student_trained_in_float16_is_saved_in_float16(monkeypatch, dtype, expected):
    config = type("Config", (), {"dtype": torch.bfloat16, "get_text_config": lambda self: self})()
    monkeypatch.setattr(loading, "load_config", lambda *_: config)
    assert saved_dtype(tiny_settings(learner={"compute_dtype": dtype})) == expected


# -- what a forward sees of an update ----------------------------------------------------------------------------------


def test_updates_below_the_grid_are_not_seen_until_they_have_gathered():
    grid = 2.0**-14  # of bfloat16 between 2^-7 and 2^-6
    before = torch.full((1000,), 0.0125).bfloat16().float()
    small = update_sums(before, before + 0.1 * grid, torch.bfloat16)
    assert (small.weights, small.changed, small.visible) == (1000, 0, 0)
    assert small.intended == pytest.approx(100 * grid, rel=1e-4)
    spread = before + torch.linspace(-0.5, 0.5, 1000) * grid  # masters anywhere between two steps of the grid
    gathered = update_sums(spread, spread + 0.1 * grid, torch.bfloat16)
    assert gathered.changed == pytest.approx(100, abs=2)
    assert gathered.visible / gathered.intended == pytest.approx(1.0, rel=0.05)
    assert update_sums(before, before + 0.1 * grid, torch.float32).changed == 1000


def test_a_step_tells_how_much_of_it_the_forward_sees():
    seen = {}
    for dtype in ("bfloat16", "float16", "float32"):
        learner, teacher = build(learner={"compute_dtype": dtype, "lr": 2e-5, "warmup_steps": 0})
        for parameter in learner.state.named.values():
            parameter.data = parameter.data.bfloat16().float()  # as loaded from a bfloat16 checkpoint
        record = step(learner, teacher)
        seen[dtype] = (record.update_changed, record.update_visible)
    assert seen["bfloat16"][0] < 0.2 * seen["float32"][0]
    assert seen["bfloat16"][0] < seen["float16"][0] < seen["float32"][0]
    assert seen["float32"][1] == 1.0
    assert seen["float32"][0] > 0.9


def test_no_update_is_no_reading():
    learner, _ = build()
    weights = sampled_weights(learner.state.named)
    learner._add_precision_metrics(record := step(*build()), weights)
    assert (record.update_changed, record.update_visible) == (0.0, None)


def test_a_sample_is_spread_over_all_matrices_and_bounded(monkeypatch):
    learner, _ = build()
    matrices = [p for p in learner.state.named.values() if p.ndim > 1]
    assert len(sampled_weights(learner.state.named)) == sum(p.numel() for p in matrices)
    monkeypatch.setattr(precision, "SAMPLED_WEIGHTS", 500)
    weights = sampled_weights(learner.state.named)
    assert len(matrices) < len(weights) <= 500 + len(matrices)


def test_the_warning_names_finer_types_and_goes_with_larger_rates():
    weights = 0.02 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    text = precision_warning(weights, 1e-5, torch.bfloat16)
    assert text.startswith("learner.lr=1e-05: a step of this size does not change 8")
    assert "float16 or float32" in text
    assert precision_warning(weights, 1e-5, torch.float16) is None
    assert "to float32" in precision_warning(weights, 1e-6, torch.float16)
    assert precision_warning(weights, 1e-4, torch.bfloat16) is None
    assert precision_warning(weights, 1e-6, torch.float32) is None
    assert precision_warning(torch.zeros(10), 1e-9, torch.bfloat16) is None  # the second factor of a new adapter


def test_the_learner_warns_with_its_rate_and_type():
    learner, _ = build(learner={"compute_dtype": "bfloat16", "lr": 1e-6})
    assert "learner.lr=1e-06" in learner.precision_warning()
    assert build()[0].precision_warning() is None


def test_float16_is_a_choice_of_all_three_dtypes():
    for section in ("teacher", "rollout"):
        assert getattr(tiny_settings(**{section: {"dtype": "float16"}}), section).dtype == "float16"
    assert isinstance(tiny_settings(**HALF), Settings)
