"""The selection framework: metrics, policies, their state, sample filters, class samplers."""

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import ClassSettings, PositionMetric, PositionPolicy, PositionSettings
from onpolicy_skd.loss import sparse_targets as classes
from onpolicy_skd.loss.sparse_targets import TRUNCATIONS, Draws, SparseTargets, sample
from onpolicy_skd.loss.teacher_signals import TeacherSignals
from onpolicy_skd.selection import metrics, positions, samples
from onpolicy_skd.selection.metrics import METRICS, Signals
from onpolicy_skd.selection.positions import POLICIES, Context, num_selected
from onpolicy_skd.selection.selector import Bandit, ScoreQueue, Selector
from onpolicy_skd.types import Trajectory

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)
shares = st.sampled_from([0.01, 0.1, 0.2, 1 / 3, 0.5, 0.9, 1.0])
BY_SEQUENCE = [name for name in POLICIES if name != "gls"]


def student(entropy_N, ce_N):
    return lambda: (entropy_N, ce_N)


def scores_for(counts, seed, ties=False):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, sum(counts)) if ties else rng.random(sum(counts))
    return torch.tensor(values, dtype=torch.float32)


def context(k, counts, seed=0, step=0, **options):
    return Context(k, step, [seed + i for i in range(len(counts))], options=PositionSettings(**options))


def by_sequence(chosen, counts):
    """Return per sequence the selected positions from its start, and their weights."""
    starts = np.cumsum([0, *counts])
    pairs = zip(starts, chosen.indices_K.split(chosen.counts), chosen.weights_K.split(chosen.counts), strict=False)
    return [((indices - start).tolist(), weights.tolist()) for start, indices, weights in pairs]


# -- policies --------------------------------------------------------------------------------------------------------


def test_the_names_in_the_settings_are_those_of_the_code():
    assert set(get_args(PositionMetric)) == set(METRICS)
    assert set(get_args(PositionPolicy)) == set(POLICIES)
    assert {"none", "rs_kd", *TRUNCATIONS} == set(get_args(ClassSettings.model_fields["sampler"].annotation))


def test_num_selected_is_the_exact_ceiling():
    assert num_selected(0.2, 15) == 3  # 0.2 * 15 is 3.0000000000000004 in floating point
    assert [num_selected(0.2, n) for n in (1, 5, 6, 10, 11)] == [1, 1, 2, 2, 3]
    assert all(num_selected(k / 100, n) == math.ceil(k * n / 100) for k in range(1, 101) for n in range(1, 300))


@given(lengths, shares, st.integers(0, 9), st.booleans())
def test_top_k_takes_exactly_num_selected_of_the_highest_scores_of_each_sequence(counts, k, seed, ties):
    scores = scores_for(counts, seed, ties)
    chosen = positions.top_k(scores, counts, Context(k))
    for (indices, _), u_n in zip(by_sequence(chosen, counts), scores.split(counts), strict=True):
        values = u_n.tolist()
        best = sorted(range(len(values)), key=lambda i: (-values[i], i))[: num_selected(k, len(values))]
        assert indices == sorted(best)  # ties go to the earlier position


@given(lengths, shares, st.integers(0, 9), st.integers(0, 12))
def test_curriculum_takes_num_selected_neighbors_and_ends_as_top_k(counts, k, seed, step):
    scores = scores_for(counts, seed, ties=seed % 2 == 0)
    chosen = positions.curriculum(scores, counts, context(k, counts, step=step, curriculum_steps=10))
    for (indices, _), u_n in zip(by_sequence(chosen, counts), scores.split(counts), strict=True):
        width = num_selected(k, len(u_n))
        assert len(indices) == width
        ascending = u_n.sort().values
        start = round(min(1.0, step / 10) * (len(u_n) - width))
        assert u_n[indices].sort().values.tolist() == ascending[start : start + width].tolist()
    if step >= 10:
        assert chosen.indices_K.tolist() == positions.top_k(scores, counts, Context(k)).indices_K.tolist()


@given(lengths, shares, st.integers(0, 9), st.sampled_from(sorted(BY_SEQUENCE)), st.randoms(use_true_random=False))
def test_selection_does_not_depend_on_the_rest_of_the_batch(counts, k, seed, policy, shuffler):
    scores = list(scores_for(counts, seed).split(counts))

    def select(order):
        asked = Context(k, 3, [order[i] for i in range(len(order))], options=PositionSettings(curriculum_steps=7))
        return POLICIES[policy](torch.cat([scores[i] for i in order]), [counts[i] for i in order], asked)

    order = list(range(len(counts)))
    shuffler.shuffle(order)
    mixed = by_sequence(select(order), [counts[i] for i in order])
    for place, i in enumerate(order):
        assert mixed[place] == by_sequence(select([i]), [counts[i]])[0]


@given(lengths, shares, st.sampled_from(sorted(set(BY_SEQUENCE) - {"sampled_unbiased"})), st.booleans())
def test_weights_of_each_sequence_sum_to_one(counts, k, policy, all_zero):
    scores = torch.zeros(sum(counts)) if all_zero else scores_for(counts, 0)
    chosen = POLICIES[policy](scores, counts, context(k, counts))
    assert len(chosen.indices_K) == len(chosen.weights_K) == sum(chosen.counts)
    assert chosen.indices_K.tolist() == sorted(set(chosen.indices_K.tolist()))
    for weights_n in chosen.weights_K.split(chosen.counts):
        assert weights_n.sum().item() == pytest.approx(1.0, rel=1e-5)
    if policy in ("full", "weighted"):
        assert chosen.counts == counts


def test_weighted_weighs_by_the_score():
    chosen = positions.weighted(torch.tensor([1.0, 3.0, 0.0, 5.0]), [3, 1], Context(0.5))
    assert chosen.weights_K.tolist() == [0.25, 0.75, 0.0, 1.0]


def test_nan_and_negative_scores_are_errors():
    with pytest.raises(ValueError, match="NaN"):
        positions.top_k(torch.tensor([0.0, float("nan")]), [2], Context(0.5))
    for policy in (positions.weighted, positions.sampled):
        with pytest.raises(ValueError, match="negative"):
            policy(torch.tensor([0.0, -1.0]), [2], context(0.5, [2]))


DRAWN = [{}, {"smoothing": 2.0}, {"coverage": 0.5}, {"clip": 0.6}, {"coverage": 0.34, "smoothing": 3.0, "clip": 1.0}]


@pytest.mark.parametrize("options", DRAWN)
@pytest.mark.parametrize("policy", ["sampled", "sampled_unbiased"])
def test_drawn_estimates_are_unbiased_within_four_standard_errors(policy, options):
    """sampled: of sum w L with w the drawing probabilities; sampled_unbiased: of the plain mean of L."""
    scores = torch.tensor([0.1, 2.0, 0.5, 0.7, 0.2, 1.1, 0.05])
    losses = torch.tensor([3.0, -1.0, 2.0, 0.5, 4.0, 1.0, -6.0])
    n, trials = 7, 4_000
    counts = [n] * trials
    asked = context(0.6, counts, policy=policy, **options)
    chosen = POLICIES[policy](scores.repeat(trials), counts, asked)
    terms = losses[chosen.indices_K % n] * chosen.weights_K
    estimates = [terms_n.sum().item() for terms_n in terms.split(chosen.counts)]
    clipped = scores.clamp(max=options.get("clip", 10.0)) ** (1 / options.get("smoothing", 1.0))
    w = clipped / clipped.sum()
    expected = (losses.mean() if policy == "sampled_unbiased" else (w * losses).sum()).item()
    error = np.std(estimates, ddof=1) / trials**0.5
    assert abs(np.mean(estimates) - expected) < 4 * error
    assert error > 0


@given(lengths, shares, st.integers(0, 99), st.sampled_from(["sampled", "sampled_unbiased"]), st.sampled_from(DRAWN))
def test_draws_stay_within_the_budget_and_are_a_function_of_the_seed(counts, k, seed, policy, options):
    asked = context(k, counts, seed, policy=policy, **options)
    scores = scores_for(counts, seed)
    chosen, again = (POLICIES[policy](scores, counts, asked) for _ in range(2))
    assert torch.equal(chosen.indices_K, again.indices_K)
    assert torch.equal(chosen.weights_K, again.weights_K)
    assert all(1 <= taken <= num_selected(k, n) for taken, n in zip(chosen.counts, counts, strict=True))
    covered = [math.floor(round(options.get("coverage", 0.0) * num_selected(k, n), 9)) for n in counts]
    for (indices, _), u_n, certain in zip(by_sequence(chosen, counts), scores.split(counts), covered, strict=True):
        ceiling = u_n.clamp(max=options.get("clip", 10.0))
        assert set(torch.argsort(ceiling, descending=True, stable=True)[:certain].tolist()) <= set(indices)


def test_nothing_is_drawn_where_only_certain_positions_have_a_score():
    asked = context(0.9, [3], policy="sampled", coverage=0.5)
    (indices, weights), *_ = by_sequence(positions.sampled(torch.tensor([0.0, 2.0, 0.0]), [3], asked), [3])
    assert (indices, weights) == ([1], [1.0])


def test_skipped_positions_are_never_drawn_unless_there_are_no_others():
    scores, counts = torch.ones(13), [10, 3]
    for seed in range(50):
        asked = context(0.5, counts, seed, policy="sampled", skip_first=3)
        first, second = by_sequence(positions.sampled(scores, counts, asked), counts)
        assert min(first[0]) >= 3
        assert second[0]
    covered = context(0.9, [10], policy="sampled_unbiased", skip_first=5, coverage=0.9)
    for u in (torch.arange(10.0).flip(0), torch.zeros(10), torch.tensor([1.0] * 5 + [0.0] * 5)):
        ((indices, _),) = by_sequence(positions.sampled_unbiased(u, [10], covered), [10])
        assert min(indices) >= 5


def test_draws_are_independent_of_a_random_score():
    """Scores and draws of one sequence share its seed but not its stream."""
    n, hits = 50, 0
    for seed in range(200):
        scores = metrics.random(Signals(student(torch.zeros(n), torch.zeros(n)), [n], [seed]))
        chosen = positions.sampled(scores, [n], Context(0.02, 0, [seed]))
        hits += (scores[chosen.indices_K] > 0.5).item()
    assert 0.75 - 0.13 < hits / 200 < 0.75 + 0.13  # P = 3/4 when drawn in proportion; 4 standard errors


# -- schedule and state ----------------------------------------------------------------------------------------------


def test_the_budget_grows_linearly():
    options = PositionSettings(k=0.5, k_start=0.1, schedule_steps=4)
    assert [positions.scheduled_k(options, s) for s in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert positions.scheduled_k(PositionSettings(k=0.3), 10) == 0.3


@given(st.lists(lengths, min_size=1, max_size=5), shares, st.integers(1, 200))
def test_the_queue_holds_the_last_scores_and_gives_their_quantile(batches, k, size):
    queue, seen = ScoreQueue(size), []
    assert queue.threshold(k) is None
    for number, counts in enumerate(batches):
        scores = scores_for(counts, number)
        queue.push(scores)
        seen = (seen + scores.tolist())[-size:]
        threshold = queue.threshold(k)
        assert sum(s >= threshold for s in seen) == num_selected(k, len(seen))


def test_ranges_are_asked_for_only_by_metrics_of_the_whole_batch():
    assert Selector(PositionSettings(metric="tip_soft_or"), 0).ranges(0) == ("entropy_N", "kl_N")
    assert Selector(PositionSettings(metric="ta_opd"), 0).ranges(0) == ("kl_N", "teacher_mass_N")
    assert Selector(PositionSettings(metric="kl"), 0).ranges(0) == ()


def signals_of(entropy, counts):
    return Signals(student(entropy, torch.zeros_like(entropy)), counts, list(range(len(counts))))


def test_gls_is_top_k_until_a_batch_is_known_and_then_a_threshold():
    selector = Selector(PositionSettings(policy="gls", k=0.5), 0)
    first = signals_of(torch.tensor([1.0, 2.0, 3.0, 4.0]), [2, 2])
    scores, chosen = selector.select(first, 0)
    assert chosen.indices_K.tolist() == [1, 3]
    selector.observe(scores)
    _, chosen = selector.select(signals_of(torch.tensor([1.0, 2.5, 3.0, 4.0]), [2, 2]), 1)
    assert chosen.indices_K.tolist() == [2, 3]  # at or above the upper half of what was seen: 3 and 4
    assert chosen.counts == [0, 2]
    assert chosen.weights_K.tolist() == [0.5, 0.5]


def test_all_positions_are_selected_without_any_score():
    def no_pass():
        raise AssertionError("a pass over the LM head")

    scores, selection = Selector(PositionSettings(policy="full"), 0).select(Signals(no_pass, [2, 1], [7, 8]), 0)
    assert scores.tolist() == [0.0, 0.0, 0.0]
    assert selection.indices_K.tolist() == [0, 1, 2]
    assert selection.weights_K.tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("policy", ["gls", "bandit", "top_k"])
def test_state_survives_saving(policy):
    def selector():
        return Selector(PositionSettings(policy=policy, k=0.3, arms=["student_entropy", "student_ce"]), 1)

    first = selector()
    if first.bandit:
        first.bandit.start(1.0)
    for step in range(5):
        _, _ = first.select(signals_of(scores_for([9, 4], step), [9, 4]), step)
        first.observe(scores_for([9, 4], step))
        if first.bandit:
            first.bandit.reward(step, 1.0 / (step + 2))
    second = selector()
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    for step in range(5, 9):
        both = [s.select(signals_of(scores_for([9, 4], step), [9, 4]), step)[1] for s in (first, second)]
        assert torch.equal(both[0].indices_K, both[1].indices_K)
        assert first.metric(step) == second.metric(step)


def test_the_bandit_learns_which_arm_helps():
    """Arm 1 halves the divergence, the others leave it."""
    bandit, divergence, played = Bandit(["kl", "student_entropy", "random"], 0.2, 3), 1.0, []
    bandit.start(divergence)
    for step in range(400):
        arm = bandit.arm(step)
        played.append(arm)
        divergence = 1.0 if divergence < 1e-3 else divergence * (0.5 if arm == 1 else 1.0)
        reward = bandit.reward(step, divergence)
        assert 0.0 <= reward <= 1.0
    assert bandit.probabilities().sum() == pytest.approx(1.0)
    assert (bandit.probabilities() >= 0.2 / 3 - 1e-9).all()
    assert played[200:].count(1) > 120


def test_exp3_update_is_the_published_one():
    bandit = Bandit(["kl", "random"], 0.5, 0)
    bandit.start(2.0)
    arm, before = bandit.arm(0), bandit.probabilities()
    assert bandit.reward(0, 1.5) == pytest.approx(0.25)  # a quarter is gone
    gained = math.exp(0.5 * 0.25 / (before[arm].item() * 2))
    weights = [gained if i == arm else 1.0 for i in range(2)]
    expected = 0.5 * weights[arm] / sum(weights) + 0.25
    assert bandit.probabilities()[arm].item() == pytest.approx(expected)
    rose = bandit.arm(1)
    assert bandit.reward(1, 3.0) == 0.0
    assert bandit.state_dict()["last"][rose] == 3.0
    done = Bandit(["kl", "random"], 0.5, 0)
    done.start(0.0)
    assert done.reward(0, 0.0) == 0.0  # nothing was left to gain


# -- metrics ---------------------------------------------------------------------------------------------------------

ENTROPY, CE = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([1.0, 2.0, 3.0])
T_ENTROPY, T_LOGPROB = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([-0.5, -4.0, 0.0])
KL, REVERSE = torch.tensor([0.7, -1e-9, 0.9]), torch.tensor([0.6, 0.2, 0.8])
MASS, OVERLAP, MARGIN = torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1.0, 0.25, 0.5]), torch.tensor([0.8, 0.1, 0.3])


def with_teacher(calls=None, ranges=None):
    def entropy_and_logprob():
        calls.append("entropy_and_logprob") if calls is not None else None
        return T_ENTROPY, T_LOGPROB

    def teacher_signals():
        calls.append("teacher_signals") if calls is not None else None
        return TeacherSignals(KL, REVERSE, MASS, OVERLAP, MARGIN)

    return Signals(student(ENTROPY, CE), [2, 1], [7, 8], entropy_and_logprob, teacher_signals, ranges)


BATCH_RANGES = {"entropy_N": (0.1, 0.3), "kl_N": (0.0, 0.9), "teacher_mass_N": (0.2, 1.0)}

EXPECTED = {
    "student_entropy": ([0.1, 0.3, 0.2], []),
    "student_ce": ([1.0, 2.0, 3.0], []),
    "prefix": ([0.0, -1.0, 0.0], []),
    "teacher_entropy": ([0.5, 0.4, 0.3], ["entropy_and_logprob"]),
    "teacher_ce": ([0.5, 4.0, 0.0], ["entropy_and_logprob"]),
    "kl": ([0.7, 0.0, 0.9], ["teacher_signals"]),
    "reverse_kl": ([0.6, 0.2, 0.8], ["teacher_signals"]),
    "kl_plus_entropy": ([0.8, 0.3, 1.1], ["teacher_signals"]),
    "ce_ratio": ([2.0, 0.5, 3e6], ["entropy_and_logprob"]),
    "ce_ratio_plus_entropy": ([2.1, 0.8, 3e6], ["entropy_and_logprob"]),
    "tip_soft_or": ([0.7 / 0.9, 1.0, 1.0], ["teacher_signals"]),
    "tip_q3": ([0.7 / 0.9, 0.0, 0.5], ["teacher_signals"]),
    "ta_opd": ([0.7 / 0.9 * 0.7 / 0.8, 0.0, 0.5], ["teacher_signals"]),
    "teacher_mass": ([0.9, 0.2, 0.6], ["teacher_signals"]),
    "overlap": ([1.0, 0.25, 0.5], ["teacher_signals"]),
    "margin": ([0.8, 0.1, 0.3], ["teacher_signals"]),
}


def test_metrics_are_grouped_by_what_they_read():
    reads = {"teacher_signals": [], "entropy_and_logprob": [], "records": [], "nothing": []}

    def unknown():
        raise LookupError

    for metric in METRICS.values():
        calls = []
        metric(with_teacher(calls, BATCH_RANGES))
        if not calls:
            try:
                metric(Signals(unknown, [2, 1], [7, 8]))
            except LookupError:
                calls.append("records")
        reads[calls[0] if calls else "nothing"].append(metric)
    assert set(reads["nothing"]) == metrics.MODEL_FREE
    assert set(reads["records"]) == metrics.FROM_RECORDS
    assert set(reads["teacher_signals"]) == metrics.FROM_TEACHER_ROWS


@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_equals_its_formula_and_asks_the_teacher_for_no_more_than_it_needs(name):
    expected, asked = EXPECTED[name]
    calls = []
    assert METRICS[name](with_teacher(calls, BATCH_RANGES)).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert calls == asked


def test_tip_scales_over_the_ranges_of_the_batch():
    scores = metrics.tip_soft_or(with_teacher(ranges=BATCH_RANGES | {"entropy_N": (0.1, 0.5), "kl_N": (0.0, 1.4)}))
    h, d = [0.0, 0.5, 0.25], [0.5, 0.0, 0.9 / 1.4]
    assert scores.tolist() == pytest.approx([1 - (1 - a) * (1 - b) for a, b in zip(h, d, strict=True)])
    flat = metrics.tip_soft_or(with_teacher(ranges=BATCH_RANGES | {"entropy_N": (0.3, 0.3)}))
    assert flat.tolist() == pytest.approx([0.7 / 0.9, 0.0, 1.0])  # equal entropies tell nothing apart


def test_missing_ranges_are_an_error():
    with pytest.raises(RuntimeError, match=r"mark the metric with @scaled_over_batch\('entropy_N'\)"):
        metrics.tip_soft_or(with_teacher())


def test_a_metric_in_user_code_gets_the_ranges_that_it_asks_for(tmp_path, monkeypatch):
    (tmp_path / "user_scaled.py").write_text(
        "from onpolicy_skd.selection.metrics import scaled_over_batch\n"
        "@scaled_over_batch('margin_N', 'overlap_N')\n"
        "def sure(signals):\n    return signals.scaled('margin_N') + signals.scaled('overlap_N')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    selector = Selector(PositionSettings(metric="user_scaled:sure"), 0)
    assert selector.ranges(0) == ("margin_N", "overlap_N")
    ranges = {"margin_N": (0.0, 1.0), "overlap_N": (0.0, 2.0)}
    scores, _ = selector.select(with_teacher(ranges=ranges), 0)
    assert scores.tolist() == pytest.approx([1.3, 0.225, 0.55])
    with pytest.raises(ConfigError, match=r"positions\.policy=gls: scores scaled within each batch"):
        Selector(PositionSettings(metric="user_scaled:sure", policy="gls"), 0)


def test_random_is_a_function_of_each_sequences_seed():
    drawn = metrics.random(with_teacher())
    alone = metrics.random(Signals(student(torch.zeros(1), torch.zeros(1)), [1], [8]))
    assert drawn[2] == alone[0]
    assert len(set(drawn.tolist())) == 3


@pytest.mark.parametrize("name", ["teacher_ce", "kl"])
def test_without_a_teacher_its_metrics_are_refused(name):
    with pytest.raises(RuntimeError, match="needs the teacher"):
        METRICS[name](Signals(student(ENTROPY, CE), [2, 1], [7, 8]))


def test_response_tokens_that_are_not_known_are_an_error():
    with pytest.raises(RuntimeError, match="response tokens are not known"):
        _ = with_teacher().targets_N


def test_metrics_and_policies_in_user_code(tmp_path, monkeypatch):
    (tmp_path / "user_selection.py").write_text(
        "from onpolicy_skd.selection.positions import top_k\n"
        "def surprise(signals):\n    return signals.ce_N - signals.entropy_N\n"
        "policy = top_k\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = PositionSettings(metric="user_selection:surprise", policy="user_selection:policy", k=0.5)
    scores, chosen = Selector(cfg, 0).select(with_teacher(), 0)
    assert scores.tolist() == pytest.approx([0.9, 1.7, 2.8])
    assert chosen.indices_K.tolist() == [1, 2]
    with pytest.raises(ConfigError, match=r"positions\.metric=user_selection:nothing: cannot be imported .*accepted: "):
        Selector(PositionSettings(metric="user_selection:nothing"), 0)
    with pytest.raises(ConfigError, match="number: is not a function"):
        Selector(PositionSettings(metric="user_selection:number"), 0)
    with pytest.raises(ConfigError, match=r"positions\.policy=no\.such:thing"):
        Selector(PositionSettings(policy="no.such:thing"), 0)


# -- samples ---------------------------------------------------------------------------------------------------------


def trajectory(key, ids, reason="stop", correct=None):
    ids = np.asarray(ids, dtype=np.int64)
    return Trajectory(key, np.array([1]), ids, np.zeros(len(ids), np.float32), reason, 0, correct)


def test_validity_counts_every_reason():
    batch = [trajectory("good", [2, 3]), trajectory("none", []), trajectory("cut", [4], "length"),
             trajectory("alien", [2, 50])]  # fmt: skip
    report = samples.validity(batch, vocabulary=50)
    assert report.kept == ["good"]
    assert report.dropped == {"empty": 1, "truncated": 1, "outside_vocabulary": 1}
    assert report.generated == 4
    assert samples.validity(batch, 51, drop_truncated=False).kept == ["good", "cut", "alien"]


def test_correctness_keeps_one_kind_and_counts_the_other():
    batch = [
        trajectory("a", [2], correct=True),
        trajectory("b", [2], correct=False),
        trajectory("c", [], correct=False),
    ]
    wrong = samples.validity(batch, 9, correctness="wrong")
    assert (wrong.kept, wrong.dropped) == (["b"], {"right": 1, "empty": 1})
    right = samples.validity(batch, 9, correctness="right")
    assert (right.kept, right.dropped) == (["a"], {"wrong": 1, "empty": 1})
    with pytest.raises(ValueError, match="d has no correctness"):
        samples.validity([trajectory("d", [2])], 9, correctness="right")


def test_paced_weights_are_p_times_one_minus_p():
    verdicts = {"x": [True, False, False, False], "y": [True, True], "z": [False, False, False]}
    batch = [trajectory(f"{p}/{i}", [2], correct=c) for p, answers in verdicts.items() for i, c in enumerate(answers)]
    weights = samples.paced(batch)
    assert [weights[f"x/{i}"] for i in range(4)] == [0.1875] * 4
    assert weights["y/0"] == weights["z/2"] == 0.0
    with pytest.raises(ValueError, match="has no correctness"):
        samples.paced([trajectory("d/0", [2])])


@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=40), shares)
def test_top_share_keeps_the_exact_ceiling_and_breaks_ties_early(scores, share):
    kept = samples.top_share(scores, share)
    assert len(kept) == num_selected(share, len(scores))
    assert kept == sorted(kept)
    worst = min(scores[i] for i in kept)
    for i in set(range(len(scores))) - set(kept):
        assert scores[i] < worst or (scores[i] == worst and all(j < i for j in kept if scores[j] == worst))


# -- classes ---------------------------------------------------------------------------------------------------------


def teacher_rows(rows=5, vocabulary=40, scale=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(rows, vocabulary, generator=rng) * scale, -1)


def draws_for(rows, sampler="rs_kd", seed=0, targets=None, **options):
    cfg = ClassSettings(sampler=sampler, **options)
    uniform = torch.rand(rows, cfg.draws, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Draws(cfg, torch.zeros(rows, dtype=torch.long) if targets is None else targets, uniform)


def dense(targets, vocabulary):
    return torch.zeros(len(targets.ids_NC), vocabulary).scatter_add(1, targets.ids_NC, targets.probs_NC)


@given_settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 60), st.integers(1, 80), st.integers(0, 99), st.sampled_from([0.5, 1.0, 1.3]))
def test_rs_kd_is_a_distribution_over_unique_drawn_classes(rows, vocabulary, draws, seed, proposal):
    targets = classes.rs_kd(
        teacher_rows(rows, vocabulary, seed=seed), draws_for(rows, seed=seed, draws=draws, proposal=proposal)
    )
    assert torch.allclose(targets.probs_NC.sum(1), torch.ones(rows), atol=1e-5)
    for ids, probs in zip(targets.ids_NC.tolist(), targets.probs_NC.tolist(), strict=True):
        used = [i for i, p in zip(ids, probs, strict=True) if p > 0]
        assert len(used) == len(set(used)) <= draws
        assert set(ids) == set(used)  # unused slots repeat a used class
        if proposal == 1.0:
            counts = np.array([p for p in probs if p > 0]) * draws
            assert np.allclose(counts, counts.round(), atol=1e-3)


def test_rs_kd_is_unbiased_in_target_and_gradient_and_top_k_biased_as_eq_5_says():
    vocabulary, trials = 40, 3_000
    log_p = teacher_rows(1)
    p, q = log_p.exp()[0], torch.softmax(torch.randn(vocabulary, generator=torch.Generator().manual_seed(9)), -1)
    drawn = sample(log_p.expand(trials, -1), draws_for(trials, draws=12))
    targets = dense(drawn, vocabulary)
    error = targets.std(0) / trials**0.5
    assert ((targets.mean(0) - p).abs() <= 4 * error + 1e-6).all()
    gradients = targets.sum(1, keepdim=True) * q - targets
    assert ((gradients.mean(0) - (q - p)).abs() <= 4 * error + 1e-6).all()
    top = dense(sample(log_p, draws_for(1, "top_k", k=12)), vocabulary)[0]
    kept = top > 0
    mass = p[kept].sum()
    assert torch.allclose((mass * q - top)[~kept], mass * q[~kept])  # Eq. 5: no teacher outside the top K
    assert (top.sum() * q - top - (q - p)).abs().max() > 0.01


def test_a_proposal_other_than_p_keeps_the_estimate_near_p():
    log_p = teacher_rows(1)
    drawn = classes.rs_kd(log_p.expand(400, -1), draws_for(400, draws=500, proposal=0.8))
    assert (dense(drawn, 40).mean(0) - log_p.exp()[0]).abs().max() < 0.01


def test_truncations_equal_their_definitions():
    log_p, targets = teacher_rows(5), torch.tensor([0, 1, 2, 3, 39])
    p = log_p.exp()
    top = p.topk(4)
    mass = top.values.sum(1, keepdim=True)

    def build(name, **options):
        return sample(log_p, draws_for(5, name, targets=targets, **options))

    plain = torch.zeros_like(p).scatter(1, top.indices, top.values)
    assert torch.allclose(dense(build("top_k", k=4), 40), plain)
    assert torch.allclose(dense(build("top_k_normalised", k=4), 40), plain / mass)
    for name, residual in (("ghost_token", "ghost"), ("label_smoothing", "smooth")):
        truncated = build(name, k=4)
        assert torch.allclose(dense(truncated, 40), plain)
        assert truncated.residual == residual
    fixed = plain.scatter_add(1, targets[:, None], 1 - mass)
    assert torch.allclose(dense(build("naive_fix", k=4), 40), fixed, atol=1e-6)
    inside = sample(log_p, draws_for(5, "naive_fix", targets=top.indices[:, 2], k=4))
    assert torch.allclose(dense(inside, 40), plain.scatter_add(1, top.indices[:, 2:3], 1 - mass), atol=1e-6)
    assert dense(build("top_k", k=99), 40).sum(1).tolist() == pytest.approx([1.0] * 5)


@given(st.floats(0.05, 1.0), st.integers(1, 40), st.integers(0, 20))
def test_top_p_keeps_the_fewest_classes_that_reach_the_mass(p, k, seed):
    log_p = teacher_rows(3, seed=seed)
    truncated = sample(log_p, draws_for(3, "top_p", k=k, p=p))
    for row, probs in zip(log_p.exp().sort(descending=True).values, truncated.probs_NC, strict=True):
        used = int((probs > 0).sum())
        assert 1 <= used <= k
        assert row[: used - 1].sum() < p + 1e-6
        assert used == k or row[:used].sum() >= p - 1e-5


def test_targets_of_different_widths_are_concatenated():
    wide = SparseTargets(torch.tensor([[3, 4]]), torch.tensor([[0.5, 0.5]]), "ghost")
    narrow = SparseTargets(torch.tensor([[7], [8]]), torch.tensor([[1.0], [0.9]]), "ghost")
    both = classes.concatenate([wide, narrow])
    assert both.ids_NC.tolist() == [[3, 4], [7, 7], [8, 8]]
    assert both.probs_NC.tolist() == [[0.5, 0.5], [1.0, 0.0], [pytest.approx(0.9), 0.0]]
    assert both.residual == both.to("cpu").residual == "ghost"
    assert both.to("meta").ids_NC.device == both.to("meta").probs_NC.device == torch.device("meta")
    assert classes.concatenate([]).ids_NC.shape == (0, 1)
    assert dataclasses.astuple(both[1:2])[0].tolist() == [[7, 7]]
