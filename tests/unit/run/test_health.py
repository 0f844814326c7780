import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.evaluation.diagnostics import NGRAM, repetition
from onpolicy_skd.run.health import WINDOW, HealthMonitor, guards

HEALTHY = {
    "response_tokens": 60.0, "repetition": 0.05, "truncated": 0.0, "samples": 8.0, "generated": 8, "dropped": {},
    "entropy": 0.4, "sampler_gap": 1e-3, "teacher_ending": 0.9,
}  # fmt: skip
ILL = {
    "length": {"response_tokens": 150.0},
    "repetition": {"repetition": 0.6},
    "truncated": {"dropped": {"truncated": 7}},
    "entropy": {"entropy": 0.01},
    "gap": {"sampler_gap": 0.08},
    "ending": {"teacher_ending": 0.02},
}


def spoken(watch, record, times=1):
    return [name for _ in range(times) for name, _ in watch.see(record)]


def test_every_guard_is_shown_here():
    assert {g.name for g in guards(0.1)} == set(ILL)


@pytest.mark.parametrize("name", ILL)
def test_a_guard_speaks_once_until_things_were_right_again(name):
    watch, ill = HealthMonitor(0.1), HEALTHY | ILL[name]
    assert spoken(watch, HEALTHY, 2 * WINDOW) == []
    assert spoken(watch, ill, 3 * WINDOW) == [name]
    assert spoken(watch, HEALTHY, WINDOW) == []
    assert spoken(watch, ill, WINDOW) == [name]


def test_it_says_figures_and_what_to_do():
    watch = HealthMonitor(0.1)
    said = [text for r in [HEALTHY] * 20 + [HEALTHY | ILL["length"]] * 20 for _, text in watch.see(r)]
    assert len(said) == 1
    assert "60 at the start" in said[0]
    assert "learner.lr" in said[0]


def test_steps_that_do_not_tell_are_passed_over():
    watch = HealthMonitor(0.1)
    assert spoken(watch, {"step": 3, "event": "fault"}, 30) == []  # off-policy steps and events have no such keys
    assert spoken(watch, {"entropy": 0.4}, WINDOW) == []
    assert spoken(watch, {"entropy": 0.01}, WINDOW) == ["entropy"]


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
