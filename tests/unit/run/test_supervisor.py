import pytest
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.config.schema import FaultSettings
from onpolicy_skd.run.supervisor import LONGEST_WAIT, GiveUp, Restart, Supervisor


class FakeClock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def make(**settings):
    clock = FakeClock()
    return Supervisor(FaultSettings(**settings), clock), clock


def test_waits_double_up_to_a_minute():
    supervisor, _ = make(restarts=9, backoff_seconds=2.0)
    waits = [supervisor.decide({"teacher": "gone"}).seconds for _ in range(9)]
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert max(waits) == LONGEST_WAIT


def test_one_failure_too_many_within_the_window_ends_the_run_with_the_cause():
    supervisor, clock = make(restarts=2)
    for cause in ("a", "b"):
        assert isinstance(supervisor.decide({"rollout": cause}), Restart)
        clock.now += 60
    decision = supervisor.decide({"rollout": "killed"})
    assert isinstance(decision, GiveUp)
    assert decision.reason == "rollout failed 3 times within an hour, faults.restarts=2; the last time: killed"


def test_failures_are_forgotten_after_the_window():
    supervisor, clock = make(restarts=1, backoff_seconds=1.0)
    for _ in range(5):
        assert supervisor.decide({"learner": "x"}) == Restart(1.0)
        clock.now += 3600


def test_each_role_has_its_history():
    supervisor, _ = make(restarts=1)
    assert isinstance(supervisor.decide({"teacher": "x"}), Restart)
    assert isinstance(supervisor.decide({"rollout": "x"}), Restart)
    assert isinstance(supervisor.decide({"learner": "x", "teacher": "x"}), GiveUp)


def test_no_restarts_at_all_if_so_set():
    assert isinstance(make(restarts=0)[0].decide({"ray": "x"}), GiveUp)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 4000)), max_size=40), st.integers(0, 5))
def test_never_more_restarts_within_a_window_than_set(events, restarts):
    supervisor, clock = make(restarts=restarts)
    granted = {role: [] for role in "abc"}
    for role, pause in events:
        clock.now += pause
        if isinstance(supervisor.decide({role: "x"}), Restart):
            granted[role].append(clock.now)
            recent = [t for t in granted[role] if clock.now - t < 3600]
            assert len(recent) <= restarts


def test_the_timeout_grows_with_the_work():
    faults_cfg = FaultSettings(deadline_minutes=2)
    assert faults_cfg.timeout_s() == faults_cfg.timeout_s(0.1) == 120
    assert faults_cfg.timeout_s(10) == 1200
    with pytest.raises(ValueError, match="deadline_minutes"):
        FaultSettings(deadline_minutes=0)
