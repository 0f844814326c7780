"""The way of weights between actors on one GPU or several, and engines that stop with half of their new weights."""

from types import SimpleNamespace

import pytest
from helpers import tiny_settings

from actors import recovery, weight_sync
from actors.engine_weights import EngineWeights
from actors.faults import Place
from actors.groups import ActorGroups
from actors.recovery import FaultRecovery
from actors.weight_sync import ObjectStoreSync, SharedMemorySync, build_sync

SHARES = {"learner_gpus": 0.5, "teacher_gpus": 0.2, "rollout_gpus": 0.3}


class Actor:
    """Stands for a Ray actor; calls are written down with their arguments."""

    def __init__(self, name, log):
        self._name, self._log = name, log

    def __getattr__(self, method):
        def call(*arguments):
            self._log.append((f"{self._name}.{method}", *arguments))
            return f"{self._name}'s {method}"

        return SimpleNamespace(remote=call)


def groups_on(learner_gpus, engine_gpus, method="ipc"):
    """Return actor groups whose actors report these GPUs, the calls of the actors, and the log."""
    calls, log = [], []
    groups = ActorGroups.__new__(ActorGroups)
    groups.settings = tiny_settings(cluster=SHARES, sync={"method": method})
    groups.log, groups._engines_in_learner = log.append, False
    groups.learner = [Actor(f"rank {i}", calls) for i in range(len(learner_gpus))]
    groups.rollouts = SimpleNamespace(actors=[Actor(f"engine {i}", calls) for i in range(len(engine_gpus))])
    places = zip([*groups.learner, *groups.engines], [*learner_gpus, *engine_gpus], strict=True)
    groups._places = {actor: Place("node", 1, "id", gpu) for actor, gpu in places}
    return groups, calls, log


def sync_of(groups):
    return build_sync(groups.settings, groups.learner, groups.rollouts, groups.gpu_of, groups.log)


@pytest.mark.parametrize(
    ("learner", "engines", "received"),
    [
        (["A"], ["A"], [0]),
        (["A"], ["A", "A"], [0, 0]),  # two engines next to one learner
        (["A", "B"], ["B", "A"], [1, 0]),
        (["A", "B"], ["B"], [1]),
    ],
)
def test_each_engine_maps_the_copy_on_its_gpu(learner, engines, received, monkeypatch):
    monkeypatch.setattr(weight_sync, "wait_all", lambda refs, timeout_s: None)
    groups, calls, log = groups_on(learner, engines)
    sync = sync_of(groups)
    assert isinstance(sync, SharedMemorySync)
    assert log == []
    sync.push(3, 10.0)
    assert [call for call in calls if "receive" in call[0]] == [
        (f"engine {i}.receive", f"rank {rank}'s export_weights", 3) for i, rank in enumerate(received)
    ]
    assert [call for call, *_ in calls][-len(learner) :] == [f"rank {i}.drop_export" for i in range(len(learner))]


@pytest.mark.parametrize(
    ("learner", "engines"), [(["A"], ["B"]), (["A"], ["A", "B"]), ([None], ["A"]), (["A"], [None]), ([None], [None])]
)
def test_engines_on_another_gpu_read_the_object_store(learner, engines):
    groups, _, log = groups_on(learner, engines)
    assert isinstance(sync_of(groups), ObjectStoreSync)
    assert len(log) == 1
    assert "object store" in log[0]
    weights = EngineWeights(groups, colocated=False, vocabulary=512)
    weights.connect()
    weights._sending = True
    assert not weights.take_interrupted()  # an engine loads all of its weights at once


def test_engines_with_half_of_their_weights_are_killed_before_the_learner_is_asked(monkeypatch):
    """It may be waiting for one of them, in a broadcast that ends when the engines do."""
    groups, _, _ = groups_on(["A"], ["B", "C"], "broadcast")
    groups.teachers, events = [], []
    groups.timeout_s, groups.get = lambda: 60.0, lambda refs, role: [7]
    weights = SimpleNamespace(take_interrupted=lambda: True, learner_version=7)
    monkeypatch.setattr(recovery, "kill", lambda actor, where: events.append((actor, where)))

    def answers(actors, timeout_s):
        events.append(actors)

    monkeypatch.setattr(recovery, "unresponsive_reason", answers)
    failed = FaultRecovery(groups, weights, lambda path: [])._failed(RuntimeError(), "its process ended")
    assert list(failed) == groups.engines  # the learner keeps its state
    killed = [(engine, groups.place(engine)) for engine in groups.engines]
    assert events == [*killed, groups.learner]
