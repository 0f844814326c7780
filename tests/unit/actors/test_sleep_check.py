"""Colocated engines that lose a part of their model while they sleep are refused before anything is written down."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_trajectories, tiny_settings

from actors import engine_weights
from actors.engine_weights import EngineWeights
from actors.placement import Role
from actors.weight_proof import SLEEP_TOLERANCE, check_sleep
from onpolicy_skd.models.loading import ModelError

ANSWERS = make_trajectories([(4, 8)] * 4)


def shifted(trajectories, nats):
    return [dataclasses.replace(t, sampler_logprobs=t.sampler_logprobs + np.float32(nats)) for t in trajectories]


def test_small_differences_pass_and_others_are_refused_by_their_size():
    check_sleep(ANSWERS, shifted(ANSWERS, 0.9 * SLEEP_TOLERANCE))
    with pytest.raises(ModelError, match=r"after its first sleep .* 0\.2 nats"):
        check_sleep(ANSWERS, shifted(ANSWERS, 0.2))
    with pytest.raises(ModelError, match="nan nats"):
        check_sleep(ANSWERS, shifted(ANSWERS, np.nan))


def test_what_follows_a_token_that_differs_is_not_compared():
    """Two tokens about equally likely: either may be the greedy one."""
    other = ANSWERS[0]
    ids, logprobs = other.response_ids.copy(), other.sampler_logprobs.copy()
    ids[3] = 1 if ids[3] != 1 else 2
    logprobs[4:] = -9.0
    check_sleep(ANSWERS[:1], [dataclasses.replace(other, response_ids=ids[:6], sampler_logprobs=logprobs[:6])])
    logprobs[:4] = -9.0
    with pytest.raises(ModelError):
        check_sleep(ANSWERS[:1], [dataclasses.replace(other, response_ids=ids, sampler_logprobs=logprobs)])


class Engine:
    """An engine whose answers change by ``lost`` nats when it sleeps."""

    def __init__(self, lost):
        self.lost, self.answers, self.asleep = lost, ANSWERS, False
        self.sleep = SimpleNamespace(remote=self._sleep)

    def _sleep(self):
        self.answers, self.asleep = shifted(self.answers, self.lost), True

    def gather(self, requests, sampling):
        assert sampling.temperature == 0
        assert not self.asleep
        return self.answers

    def push(self, version, timeout_s):
        self.asleep = False


def weights_of(engine, monkeypatch, colocated=True):
    """The state of one engine, with a proof of updates that always passes."""
    proved = []
    monkeypatch.setattr(engine_weights, "prove_update", lambda *_: proved.append(1))
    groups = SimpleNamespace(
        settings=tiny_settings(), engines=[engine], rollouts=engine, get=lambda refs, role: refs, timeout_s=lambda: 1.0
    )
    weights = EngineWeights(groups, colocated, 97)
    weights._sync = engine
    return weights, proved


def test_the_first_wake_is_compared_with_the_time_before_the_first_sleep(monkeypatch):
    weights, proved = weights_of(Engine(0.0), monkeypatch)
    weights.sleep()
    weights.push()
    assert proved == [1]
    weights, proved = weights_of(Engine(1.0), monkeypatch)
    weights.sleep()
    with pytest.raises(ModelError, match="sleep"):
        weights.push()
    assert proved == []


def test_other_weights_than_the_initial_ones_and_engines_that_never_slept_are_not_compared(monkeypatch):
    weights, proved = weights_of(Engine(1.0), monkeypatch)
    weights.sleep()
    weights.learner_version = 7  # of a resumed run
    weights.push()
    assert proved == [1]
    weights, proved = weights_of(Engine(1.0), monkeypatch, colocated=False)
    weights.sleep()
    weights.push()
    assert proved == [1]


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 0.5, "cuda"), ("auto", 0.0, "cpu"), ("cuda", 0.0, "cuda"), ("cpu", 0.0, "cpu")],
)  # fmt: skip
def test_a_role_uses_the_gpu_that_it_is_given_and_no_other(device, gpus, expected):
    settings = tiny_settings(run={"device": device})
    assert Role("teacher", 1, gpus).on_device(settings).run.device == expected
    assert settings.run.device == device
