"""Rollouts that reach the driver as they complete."""

import numpy as np
import pytest

from actors import rollout_actor
from actors.rollout_actor import RolloutGroup, judged_batches
from onpolicy_skd.config.schema import FaultSettings
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

TOKENIZER = load_tokenizer("bundled:demo_student")
REQUESTS = [RolloutRequest(f"r{i}", [1], 0, answer=str(i)) for i in range(7)]


def answer(request: RolloutRequest, text: str) -> Trajectory:
    ids = np.array(TOKENIZER(text)["input_ids"])
    return Trajectory(request.key, np.array([1]), ids, np.zeros(len(ids), np.float32), "stop", 0)


class Engine:
    """Completes the last request first; only r3 gets a wrong answer."""

    def __init__(self) -> None:
        self.generated = 0

    def stream(self, requests, sampling):
        for r in reversed(requests):
            self.generated += 1
            yield answer(r, "#### 9" if r.key == "r3" else f"#### {r.answer}")


def test_batches_arrive_while_the_engine_generates_the_rest_and_each_answer_meets_its_own_reference():
    engine = Engine()
    batches = judged_batches(engine, REQUESTS, SamplingParams(8), TOKENIZER, "exact_match", 3)
    first = next(batches)
    assert engine.generated == 3
    assert [(t.key, t.correct) for t in first] == [("r6", True), ("r5", True), ("r4", True)]
    assert [(t.key, t.correct) for batch in batches for t in batch] == [
        ("r3", False), ("r2", True), ("r1", True), ("r0", True),
    ]  # fmt: skip


class Group(RolloutGroup):
    """Two actors, without Ray."""

    def __init__(self) -> None:
        self._faults, self._tokens_per_step, self._log = FaultSettings(), 1, print
        self.actors = ["a", "b"]

    def stream(self, requests, sampling, size=None):
        return [[[answer(r, "") for r in share]] for _, share in self._shares(requests)]

    def generate(self, requests, sampling):
        return [lists[0] for lists in self.stream(requests, sampling)]


def test_rollouts_of_two_actors_come_back_in_the_order_of_the_requests(monkeypatch):
    monkeypatch.setattr(rollout_actor, "get_answers", lambda refs, *_: refs)
    assert [t.key for t in Group().gather(REQUESTS, SamplingParams(8))] == [r.key for r in REQUESTS]


def test_an_actor_that_returns_nothing_new_counts_as_hung(monkeypatch):
    monkeypatch.setattr(rollout_actor.ray, "wait", lambda refs, **_: ([], refs))
    with pytest.raises(rollout_actor.GetTimeoutError, match="2 of 2 rollout actors do not answer"):
        list(Group().completed(REQUESTS, SamplingParams(8)))
