"""Requests to a teacher in another process: sent one micro-batch ahead, with the results of requests sent in time."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from helpers import make_trajectories
from learner_helpers import LENGTHS, build

from onpolicy_skd.teacher.teacher import PrefetchingTeacher, Teacher

STEPS = 3  # the first measures teacher mass and overlap, which need the rows at all positions
BUDGET = 60  # tokens per micro-batch: several of them
FORWARD = {"divergence": "forward_kl"}
ENGINE = {"entropy": "engine"}
MASK = list(range(40))
KNOWN = {  # selections whose positions are known before the forward
    "full": {"positions": {"policy": "full"}},
    "all of k": {"positions": {"k": 1.0}},
    "random": {"positions": {"metric": "random"}},
    "prefix by curriculum": {"positions": {"metric": "prefix", "policy": "curriculum"}},
    "sampled": {"positions": {"metric": "random", "policy": "sampled_unbiased", "k": 0.5}},
    "weighted": {"positions": {"policy": "weighted"}},
    "iw": {"positions": {"policy": "full", "weighting": "iw"}},
    "kl": {"positions": {"metric": "kl"}},
    "tip": {"positions": {"metric": "tip_soft_or", "mask_tokens": MASK}},
    "masked": {"positions": {"policy": "full", "mask_tokens": MASK}},
    "rs_kd": {"positions": {"policy": "full"}, "classes": {"sampler": "rs_kd", "draws": 6}, "alignment": FORWARD},
    "egad": {"positions": {"metric": "random"}, "alignment": {"variant": "egad"}},
    "engine": {"rollout": ENGINE},
    "engine, gls": {"rollout": ENGINE, "positions": {"policy": "gls", "k": 0.3, "queue": 90, "mask_tokens": MASK}},
    "engine, ce": {"rollout": ENGINE, "positions": {"metric": "student_ce", "policy": "sampled"}},
}
BANDIT = {"policy": "bandit", "arms": ["reverse_kl", "student_entropy", "random"]}
UNKNOWN = {
    "learner": {},
    "gls": {"positions": {"policy": "gls", "queue": 90}},
    "teacher_entropy": {"positions": {"metric": "teacher_entropy"}},
    "ce_ratio": {"positions": {"metric": "ce_ratio"}},
    "user policy": {"positions": {"metric": "random", "policy": "onpolicy_skd.selection.positions:top_k"}},
}


class SlowTeacher(Teacher):
    """A teacher whose answers arrive ``seconds`` after their request; ``events``: what happened, in order."""

    seconds = 0.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events = []
        self._sent = None  # arguments of the prefetched answer, and the time at which it arrives

    def rows(self, request):
        self._wait_for(request)
        return super().rows(request)

    def classes(self, request, seeds, options):
        self._wait_for(request, seeds, options)
        return super().classes(request, seeds, options)

    def _wait_for(self, *arguments):
        sent, self._sent = self._sent, None
        if sent is None:
            self.events.append(("request", keys(arguments[0])))
        else:
            assert sent[0] == arguments, "the prefetched answer is another one"
            self.events.append(("use", keys(arguments[0])))
        time.sleep(max(0.0, (sent[1] if sent else time.monotonic() + self.seconds) - time.monotonic()))


class RemoteTeacher(SlowTeacher):
    """The same as the learner sees it from another process."""

    def prefetch_rows(self, request):
        self._prefetch(request)

    def prefetch_classes(self, request, seeds, options):
        self._prefetch(request, seeds, options)

    def _prefetch(self, *arguments):
        assert self._sent is None, "the last answer was not used"
        self.events.append(("prefetch", keys(arguments[0])))
        self._sent = arguments, time.monotonic() + self.seconds


def keys(request):
    return [key for key, _ in request]


def batches(sections, steps=STEPS):
    """The batches of ``steps`` steps; with ``rollout.entropy=engine`` they have random entropies as if recorded."""
    rng = np.random.default_rng(1)
    for version in range(steps):
        batch = make_trajectories(LENGTHS, seed=version, version=version)
        for i, t in enumerate(batch if "rollout" in sections else ()):
            entropy, logprobs = rng.uniform(0, 3, (2, len(t.target_ids))).astype(np.float32)
            batch[i] = dataclasses.replace(t, sampler_entropy=entropy, sampler_logprobs=-logprobs)
        yield batch


def trained(sections, teacher_class):
    """Return the records of some steps, the final weights and the teacher's events per step."""
    learner, teacher = build(budget=BUDGET, teacher_class=teacher_class, learner={"lr": 1e-2}, **sections)
    records, events = [], []
    for batch in batches(sections):
        teacher.encode(batch)
        record = learner.step(batch).as_dict()
        records.append({name: value for name, value in record.items() if not name.endswith("seconds")})
        events.append([*teacher.events])
        teacher.events.clear()
    return records, learner.state.tensors(), events


@pytest.mark.parametrize("name", KNOWN)
def test_a_step_with_prefetched_answers_is_bit_for_bit_the_same(name):
    records, tensors, events = trained(KNOWN[name], RemoteTeacher)
    expected, expected_tensors, _ = trained(KNOWN[name], SlowTeacher)
    assert records == expected
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensors[n], t) for n, t in expected_tensors.items())
    for step in events:
        used = [asked for kind, asked in step if kind == "use"]
        prefetched = [asked for kind, asked in step if kind == "prefetch"]
        assert len(used) > 2
        assert used == prefetched
        requested = [asked for kind, asked in step if kind == "request"]
        assert len(requested) == (len(used) if name == "tip" else 0)  # the ranges over the batch need a pass before


@pytest.mark.parametrize("name", UNKNOWN)
def test_positions_that_the_models_decide_are_requested_once_they_are_known(name):
    records, tensors, (measured, *others) = trained(UNKNOWN[name], RemoteTeacher)
    expected, expected_tensors, _ = trained(UNKNOWN[name], SlowTeacher)
    assert records == expected
    assert all(torch.equal(tensors[n], t) for n, t in expected_tensors.items())
    assert {kind for kind, _ in measured} == {"prefetch", "use"}  # rows at all positions, for teacher mass and overlap
    for step in others:
        assert len(step) > 2
        assert {kind for kind, _ in step} == {"request"}


def test_a_bandit_prefetches_for_the_arms_that_allow_it():
    records, _, events = trained({"positions": BANDIT}, RemoteTeacher)
    assert records == trained({"positions": BANDIT}, SlowTeacher)[0]
    for record, step in zip(records[1:], events[1:], strict=True):
        known = BANDIT["arms"][record["arm"]] != "student_entropy"
        assert ("prefetch" in {kind for kind, _ in step}) == known


def test_rows_are_requested_before_the_backward_of_the_micro_batch_before(monkeypatch):
    learner, teacher = build(budget=BUDGET, teacher_class=RemoteTeacher, positions={"policy": "full"})
    learner.state.version = 1  # no measurement of teacher mass and overlap
    (batch,) = batches({}, steps=1)
    teacher.encode(batch)
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: teacher.events.append("backward") or backward(loss))
    learner.accumulate(batch)
    members = [[t.key for t in group] for group in learner._forward.members(batch)]
    assert len(members) > 2
    expected = [("prefetch", members[0])]
    for now, following in zip(members, [*members[1:], None], strict=True):
        expected += [("use", now), *([("prefetch", following)] if following else []), "backward"]
    assert teacher.events == expected


def test_the_learner_waits_less_for_a_slow_teacher(monkeypatch):
    backward, waits = torch.Tensor.backward, {}
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: time.sleep(0.06) or backward(loss))
    for teacher_class in (SlowTeacher, RemoteTeacher):
        monkeypatch.setattr(teacher_class, "seconds", 0.05)
        learner, teacher = build(budget=BUDGET, teacher_class=teacher_class, positions={"policy": "full"})
        (batch,) = batches({}, steps=1)
        teacher.encode(batch)
        waits[teacher_class] = learner.accumulate(batch).teacher_wait_seconds
        count = len(learner._forward.members(batch))
    assert waits[SlowTeacher] >= 0.05 * count
    assert waits[RemoteTeacher] < 0.05 + 0.01 * count  # the first answer, at most


def test_a_teacher_in_the_learners_process_is_not_asked_ahead():
    assert isinstance(RemoteTeacher.__new__(RemoteTeacher), PrefetchingTeacher)
    assert not isinstance(SlowTeacher.__new__(SlowTeacher), PrefetchingTeacher)
