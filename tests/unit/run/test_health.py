import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.evaluation.diagnostics import NGRAM, repetition
from onpolicy_skd.run.health import WINDOW, HealthMonitor, guards

HEALTHY = {
    "response_tokens": 60.0, "repetition": 0.05, "truncated": 0.0, "entropy": 0.4, "sampler_gap": 1e-3,
    "teacher_ending": 0.9,
}  # fmt: skip
ILL = {
    "length": {"response_tokens": 150.0},
    "repetition": {"repetition": 0.6},
    "truncated": {"truncated": 0.8},
    "entropy": {"entropy": 0.01},
    "gap": {"sampler_gap": 0.08},
    "ending": {"teacher_ending": 0.02},
}


def warnings(monitor, record, times=1):
    return [name for _ in range(times) for name, _ in monitor.check(record)]


def test_every_guard_is_shown_here():
    assert {g.name for g in guards(0.1)} == set(ILL)


@pytest.mark.parametrize("name", ILL)
def test_a_guard_warns_once_until_things_were_right_again(name):
    monitor, ill = HealthMonitor(0.1), HEALTHY | ILL[name]
    assert warnings(monitor, HEALTHY, 2 * WINDOW) == []
    assert warnings(monitor, ill, 3 * WINDOW) == [name]
    assert warnings(monitor, HEALTHY, WINDOW) == []
    assert warnings(monitor, ill, WINDOW) == [name]


def test_longer_responses_are_expected_where_their_limit_grows():
    monitor = HealthMonitor(0.1, growing=True)
    assert warnings(monitor, HEALTHY, 2 * WINDOW) == []
    assert warnings(monitor, HEALTHY | ILL["length"], 3 * WINDOW) == []


def test_a_warning_has_figures_and_advice():
    monitor = HealthMonitor(0.1)
    texts = [text for r in [HEALTHY] * 20 + [HEALTHY | ILL["length"]] * 20 for _, text in monitor.check(r)]
    assert len(texts) == 1
    assert "60 at the start" in texts[0]
    assert "learner.lr" in texts[0]


@pytest.mark.parametrize(("metric", "middle", "swing"), [("truncated", 0.5, 0.06), ("teacher_ending", 0.1, 0.01)])
def test_a_mean_that_swings_around_the_limit_warns_once(metric, middle, swing):
    monitor = HealthMonitor(0.1)
    series = middle + swing * np.sin(np.arange(150) / 4)
    assert len([name for value in series for name in warnings(monitor, HEALTHY | {metric: value})]) == 1


@pytest.mark.parametrize(("metric", "value"), [("truncated", 0.97), ("teacher_ending", 0.01)])
def test_what_the_first_step_leaves_no_doubt_about_is_said_at_once(metric, value):
    assert len(warnings(HealthMonitor(0.1), HEALTHY | {metric: value})) == 1


@pytest.mark.parametrize(("metric", "value"), [("truncated", 0.6), ("teacher_ending", 0.08)])
def test_what_the_first_step_leaves_in_doubt_needs_a_full_window(metric, value):
    monitor = HealthMonitor(0.1)
    assert warnings(monitor, HEALTHY | {metric: value}, WINDOW - 1) == []
    assert len(warnings(monitor, HEALTHY | {metric: value})) == 1


def test_records_without_a_metric_are_skipped():
    monitor = HealthMonitor(0.1)
    assert warnings(monitor, {"step": 3, "event": "fault"}, 30) == []  # off-policy steps and events lack these keys
    assert warnings(monitor, {"entropy": 0.4}, WINDOW) == []
    assert warnings(monitor, {"entropy": 0.01}, WINDOW) == ["entropy"]


def slow_repetition(ids):
    seen, again = set(), 0
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    for gram in grams:
        again += gram in seen
        seen.add(gram)
    return again / len(grams)


@given(st.lists(st.integers(0, 2), min_size=NGRAM + 1, max_size=60))
def test_repetition_is_the_share_of_grams_seen_before(ids):
    assert repetition(np.array(ids)) == pytest.approx(slow_repetition(ids))


def test_repetition_of_extremes():
    assert repetition([5] * 500) == pytest.approx(1.0, abs=0.01)
    assert repetition(range(500)) == 0
    assert repetition([1, 2]) == repetition([]) == 0
