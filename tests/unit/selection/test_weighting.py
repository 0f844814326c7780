"""Weights along a response and tokens that are never selected."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import PositionSettings, PositionWeighting
from onpolicy_skd.selection.metrics import Signals
from onpolicy_skd.selection.positions import POLICIES
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.selection.weighting import WEIGHTINGS, normalized

COUNTS = [4, 1, 7]
POLICY_NAMES = sorted(set(POLICIES) - {"bandit"})
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=6)
gammas = st.sampled_from([-0.9, 0.0, 0.5, 1.0, 3.0])


def make(counts, seed=0, equal=False, targets=None):
    """Return signals of random numbers; with ``equal`` the teacher's cross-entropies are the student's."""
    rng = torch.Generator().manual_seed(seed)
    entropy, ce, teacher_ce = (torch.rand(sum(counts), generator=rng) * 3 for _ in range(3))
    logprob = -(ce if equal else teacher_ce)
    return Signals(lambda: (entropy, ce), counts, list(range(len(counts))), lambda: (entropy, logprob),
                   targets_N=targets)  # fmt: skip


def test_the_names_in_the_settings_are_those_of_the_code():
    assert set(get_args(PositionWeighting)) == set(WEIGHTINGS)


@given(lengths, gammas, st.integers(0, 9))
def test_iw_equals_its_float64_reference(counts, gamma, seed):
    signals = make(counts, seed)
    factors = WEIGHTINGS["iw"](signals, PositionSettings(weighting="iw", weighting_gamma=gamma))
    start = 0
    for n in counts:
        a = [abs(-t + s) for t, s in zip(signals.teacher_ce_N[start : start + n].double().tolist(),
                                         signals.ce_N[start : start + n].double().tolist(), strict=True)]  # fmt: skip
        expected = [1 + gamma * (1 - sum(a[:t]) / sum(a)) for t in range(n)]
        assert factors[start : start + n].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        start += n


def test_iw_of_equal_models_is_uniform():
    cfg = PositionSettings(weighting="iw")
    assert normalized(WEIGHTINGS["iw"](make(COUNTS, equal=True), cfg), COUNTS).tolist() == [1.0] * 12


@pytest.mark.parametrize(("gamma", "expected"), [(1.0, [1.25, 1.5, 1.75, 2.0]), (-0.8, [0.8, 0.6, 0.4, 0.2])])
def test_ramp_is_linear_along_the_response(gamma, expected):
    factors = WEIGHTINGS["ramp"](make([4, 1]), PositionSettings(weighting="ramp", weighting_gamma=gamma))
    assert factors.tolist() == pytest.approx([*expected, expected[-1]])


@pytest.mark.parametrize("weighting", ["iw", "ramp"])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_gamma_0_is_uniform(weighting, policy):
    def select(**options):
        return Selector(PositionSettings(policy=policy, k=0.5, **options), 0).select(make(COUNTS), 0)[1]

    plain, weighted = select(), select(weighting=weighting, weighting_gamma=0.0)
    assert torch.equal(plain.indices_K, weighted.indices_K)
    assert torch.allclose(plain.weights_K, weighted.weights_K)


@given(lengths, gammas, st.sampled_from(["iw", "ramp"]), st.integers(0, 9))
def test_factors_multiply_the_policys_weights_and_their_mean_is_1(counts, gamma, weighting, seed):
    options = {"weighting": weighting, "weighting_gamma": gamma}
    signals = make(counts, seed)
    _, full = Selector(PositionSettings(policy="full", **options), 0).select(signals, 0)
    for weights_n in full.weights_K.split(full.counts):
        assert weights_n.sum().item() == pytest.approx(1.0, rel=1e-5)
    cfg = PositionSettings(k=0.4, **options)
    _, chosen = Selector(cfg, 0).select(signals, 0)
    taken = torch.tensor(chosen.counts).repeat_interleave(torch.tensor(chosen.counts))
    n = torch.tensor(counts).repeat_interleave(torch.tensor(chosen.counts))
    assert torch.allclose(chosen.weights_K, full.weights_K[chosen.indices_K] * n / taken, rtol=1e-5)


def test_factors_that_are_all_0_leave_a_sequence_without_weight():
    assert normalized(torch.tensor([0.0, 0.0, 2.0, 6.0]), [2, 2]).tolist() == [0.0, 0.0, 0.5, 1.5]


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_unusable_factors_are_an_error(wrong):
    with pytest.raises(ValueError, match=r"positions\.weighting: must return factors"):
        normalized(torch.tensor([1.0, wrong]), [2])


def test_a_weighting_in_user_code(tmp_path, monkeypatch):
    (tmp_path / "user_weighting.py").write_text(
        "def unsure(signals, cfg):\n    return 1.0 + cfg.weighting_gamma * signals.entropy_N\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = PositionSettings(policy="full", weighting="user_weighting:unsure", weighting_gamma=2.0)
    signals = make(COUNTS)
    _, chosen = Selector(cfg, 0).select(signals, 0)
    factors = 1 + 2 * signals.entropy_N
    expected = torch.cat([f / f.sum() for f in factors.split(COUNTS)])
    assert torch.allclose(chosen.weights_K, expected)
    with pytest.raises(ConfigError, match=r"positions\.weighting=user_weighting:no: cannot be imported"):
        Selector(PositionSettings(weighting="user_weighting:no"), 0)


# -- tokens that are never selected ----------------------------------------------------------------------------------


@given(lengths, st.sampled_from(POLICY_NAMES), st.integers(0, 9))
def test_masked_tokens_are_never_selected_and_the_others_as_if_alone(counts, policy, seed):
    targets = torch.randint(0, 5, (sum(counts),), generator=torch.Generator().manual_seed(seed))
    signals = make(counts, seed, targets=targets)
    cfg = PositionSettings(policy=policy, k=0.5, mask_tokens=[3, "special"])
    selector = Selector(cfg, 0, special_ids=[0])
    scores, chosen = selector.select(signals, 0)
    kept = ((targets != 3) & (targets != 0)).nonzero()[:, 0]
    masked = torch.ones(sum(counts), dtype=torch.bool)
    masked[kept] = False
    assert torch.equal(scores.isnan(), masked)
    rest = [int((~m).sum()) for m in masked.split(counts)]
    alone = Signals(lambda: tuple(t[kept] for t in (signals.entropy_N, signals.ce_N)), rest, signals.seeds)
    _, expected = Selector(PositionSettings(policy=policy, k=0.5), 0).select(alone, 0)
    assert torch.equal(chosen.indices_K, kept[expected.indices_K])
    assert torch.equal(chosen.weights_K, expected.weights_K)
    assert chosen.counts == expected.counts


def test_masked_positions_take_no_part_in_weights_or_the_queue():
    targets = torch.tensor([3, 1, 1, 1])
    cfg = PositionSettings(policy="full", weighting="ramp", mask_tokens=[3])
    _, chosen = Selector(cfg, 0).select(make([4], targets=targets), 0)
    assert chosen.weights_K.tolist() == pytest.approx([1.5 / 5.25, 1.75 / 5.25, 2.0 / 5.25])
    gls = Selector(PositionSettings(policy="gls", mask_tokens=[3]), 0)
    scores, _ = gls.select(make([4], targets=targets), 0)
    gls.observe(scores)
    assert torch.equal(gls.state_dict()["scores"], make([4]).entropy_N[1:])


def test_without_masked_tokens_all_positions_may_be_selected():
    assert Selector(PositionSettings(), 0, special_ids=[1]).eligible(make([2])) is None
