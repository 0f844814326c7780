"""Faults of actors and errors of code, runs that survive faults, and damaged input."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from helpers import tiny_settings
from ray.exceptions import ActorUnavailableError, GetTimeoutError, ObjectLostError, ObjectStoreFullError

from actors.engine_weights import EngineWeights
from actors.faults import (
    NO_ANSWER,
    fault_of,
    faulty_actor,
    get_answers,
    kill,
    needs_restart,
    place,
    reports_faults,
    unresponsive_reason,
    watch_workers,
)
from actors.groups import ActorGroups
from actors.learner_actor import LearnerActor
from actors.recovery import FaultRecovery
from eval.faults import damage, processes
from eval.faults.__main__ import main
from eval.soak import conclude, drift
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.storage import files
from onpolicy_skd.train import connect

learner_class = LearnerActor.__ray_metadata__.modified_class


@pytest.fixture(scope="module")
def cluster():
    with connect(tiny_settings()):
        yield


@ray.remote(num_cpus=0.1)
@reports_faults
class Actor:
    def __init__(self, problem=None, updates=0):
        self.updates = updates
        if problem:
            raise problem

    def ready(self):
        return place()

    def version(self):
        return self.updates

    def restore(self, path):
        self.updates = 7
        return 7, []

    def fail(self, problem):
        raise problem

    def stream(self, problem):
        yield 1
        raise problem

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def get(self, refs):
        return ray.get(refs)

    def watch(self, lost):
        watch_workers(SimpleNamespace(on_worker_death=lambda _: None, lost_worker=lambda _: lost))


@pytest.fixture(scope="module")
def actor(cluster):
    """An actor for tests that leave it alive: a process of Ray takes seconds to start."""
    return Actor.remote()


def raised(ref):
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(ref, timeout=60)
    return caught.value


def test_what_code_raises_is_no_fault(actor):
    for problem in (ValueError("no"), ConfigError("lr: no"), ZeroDivisionError()):
        assert fault_of(raised(actor.fail.remote(problem))) is None
    assert fault_of(raised(Actor.remote(ValueError("no")).ready.remote())) is None  # it would come again


@pytest.mark.parametrize(
    "problem", [MemoryError("host"), pytest.param(torch.OutOfMemoryError("CUDA out of memory"), marks=pytest.mark.slow)]
)
def test_out_of_memory_is_a_fault_of_the_one_that_ran_out(actor, problem):
    other = Actor.remote()
    actor_id = ray.get(actor.ready.remote()).actor_id
    stream = actor.stream.options(num_returns="streaming").remote(problem)
    assert ray.get(next(stream)) == 1
    for ref in (actor.fail.remote(problem), next(stream), other.get.remote([actor.fail.remote(problem)])):
        error = raised(ref)
        assert str(problem) in fault_of(error)
        assert faulty_actor(error) == actor_id
        assert needs_restart(error)
    kill(other, None)


def test_an_error_is_a_fault_if_the_engine_has_lost_a_worker_process(cluster):
    actor = Actor.remote()
    for lost in (False, True):
        ray.get(actor.watch.remote(lost))
        error = raised(actor.fail.remote(RuntimeError("Worker failed with error 'Connection reset by peer'")))
        assert needs_restart(error) == lost
        assert (fault_of(error) is None) != lost
    kill(actor, None)


def test_a_dead_actor_is_a_fault_also_where_another_one_needed_it(actor):
    dead = Actor.remote()
    where = ray.get(dead.ready.remote())
    os.kill(where.pid, signal.SIGKILL)
    for error in (raised(dead.ready.remote()), raised(actor.get.remote([dead.ready.remote()]))):
        assert "its process ended" in fault_of(error)
        assert faulty_actor(error) == where.actor_id
        assert not needs_restart(error)
    assert unresponsive_reason([actor], 30) is None
    assert "its process ended" in unresponsive_reason([actor, dead], 30)


def test_an_actor_that_no_longer_hears_ray_is_killed_too(cluster):
    actor = Actor.remote()
    where = ray.get(actor.ready.remote())
    process = psutil.Process(where.pid)
    process.suspend()
    assert unresponsive_reason([actor], 1.0) == NO_ANSWER
    kill(actor, where)
    process.wait(20)


def test_other_faults_have_words():
    assert fault_of(GetTimeoutError("x")) == NO_ANSWER
    assert "unavailable" in fault_of(ActorUnavailableError("the node is unavailable", None))
    assert fault_of(ObjectStoreFullError("full")).startswith("ObjectStoreFullError")
    assert fault_of(ObjectLostError("aa", None, "")).startswith("ObjectLostError")
    assert fault_of(RuntimeError("no")) is None
    assert len(fault_of(ActorUnavailableError("rpc error " * 100, None))) <= 200
    assert "\n" not in fault_of(ActorUnavailableError("rpc\nerror", None))


def test_the_log_names_a_role_that_does_not_answer(actor):
    lines = []
    ray.get(actor.ready.remote())
    assert get_answers([actor.sleep.remote(1.2)], "teacher", 4, lines.append) == [1.2]
    assert lines == ["the teacher has not answered for 1 s (faults.deadline_minutes allows 4 s)"]
    with pytest.raises(GetTimeoutError, match="the teacher has not answered for 1 s"):
        get_answers(actor.sleep.remote(2.5), "teacher", 1, lines.append)


def recovery(learner, updates=0, **sections):
    """FaultRecovery of one learner, which stands at version ``updates``, without engines or teachers."""
    groups = ActorGroups.__new__(ActorGroups)
    groups.settings, groups.log = tiny_settings(faults={"backoff_seconds": 0}, **sections), print
    groups.teachers, groups.learner, groups._places, groups._joined = [], [learner], {}, False
    groups.rollouts, groups._engines_in_learner = SimpleNamespace(actors=[]), False
    groups._placement = SimpleNamespace(wait=lambda log: None)
    rollout = SimpleNamespace(gpus=0.0)
    groups._resources = SimpleNamespace(learner=SimpleNamespace(count=1), rollout=rollout, colocated=False)
    groups._start_rank = lambda rank: Actor.remote()
    weights = EngineWeights(groups, False, 512)
    weights.learner_version = updates
    groups._places[learner] = ray.get(learner.ready.remote())
    return FaultRecovery(groups, weights, lambda path: [])


@pytest.mark.parametrize(("made", "rolled_back"), [(3, False), (4, True)])
def test_an_update_whose_answer_was_lost_is_not_made_twice(cluster, tmp_path, made, rolled_back):
    """A learner that answers too late is well, but whether it made the update shows in its version alone."""
    faults = recovery(Actor.remote(updates=made), 3)
    done = faults.recover(GetTimeoutError("late"), tmp_path, lambda _: None)
    assert (done.rolled_back, done.restarted) == (rolled_back, ["learner"] * rolled_back)
    assert faults._weights.learner_version == (0 if rolled_back else 3)
    kill(faults._groups.learner[0], None)


def test_the_log_and_the_record_name_the_role_of_a_dead_actor(cluster, tmp_path):
    learner, lines = Actor.remote(), []
    faults = recovery(learner)
    os.kill(ray.get(learner.ready.remote()).pid, signal.SIGKILL)
    done = faults.recover(raised(learner.ready.remote()), tmp_path, lines.append)
    assert lines[0].startswith("fault: learner: its process ended unexpectedly")
    assert lines[1] == "restarting 1 x learner in 0 s"
    assert done.cause.startswith("learner: its process ended")
    kill(faults._groups.learner[0], None)


def test_a_learner_that_is_not_where_the_records_are_saves_nothing(tmp_path):
    """A new learner, after a failed recovery, must not take the place of the trained one's checkpoint."""
    actor = object.__new__(learner_class)
    student = SimpleNamespace(device=torch.device("cpu"))
    learner = SimpleNamespace(version=0, state=SimpleNamespace(tensors=dict), student=student)
    actor._learner, actor._rank, actor._out_of_step = learner, 0, False
    with pytest.raises(files.SaveError, match="at policy version 0, not 41"):
        actor.save(tmp_path, 41, 41, {}, 2)
    assert list(tmp_path.iterdir()) == []
    assert actor.save(tmp_path, 0, 0, {}, 2).name == "step-00000000"


def test_an_error_of_code_is_raised_and_restarts_nothing(actor, tmp_path):
    error = raised(actor.fail.remote(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        recovery(actor).recover(error, tmp_path, lambda _: None)


def test_a_private_ray_listens_on_loopback_alone(cluster):
    heard = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone in the meantime
            connections = process.net_connections("inet")
            name = process.name()
            heard |= {(name, c.laddr.ip.removeprefix("::ffff:")) for c in connections if c.status == psutil.CONN_LISTEN}
    assert len(heard) > 3
    assert {(name, ip) for name, ip in heard if ip != "127.0.0.1"} == set()


def test_a_private_ray_answers_nobody_without_its_token(cluster):
    address = ray.get_runtime_context().gcs_address
    near = "from ray._private import ray_constants as known; known.ENABLE_RAY_CLUSTER = False"  # as we do
    code = f"import ray; {near}; ray.init(address={address!r})"
    stranger = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_NUM_REDIS_GET_RETRIES": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


# -- whole runs ----------------------------------------------------------------------------------------------------


def lab(tmp_path, engine="transformers"):
    return processes.Lab(tmp_path, engine, random.Random(0))


@pytest.mark.slow
def test_a_run_that_cannot_recover_ends_with_a_checkpoint_and_the_cause(tmp_path):
    """No restart is allowed, and a rollout actor is killed."""
    run = lab(tmp_path)
    process = run.start(run.command("r", 500, "faults.restarts=0", "run.checkpoint_every=0"), "r")
    processes.wait_for(process, lambda: (tmp_path / "r.log").exists() and "step 3/" in run.log_text("r"))
    processes.actors(process.pid, "Rollout")[0].kill()
    assert process.wait(120) == 1
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "rollout failed 1 times" in summary["reason"]
    assert "faults.restarts=0" in summary["reason"]
    assert processes.one_error(run.log_text("r"))
    assert (tmp_path / "r" / "checkpoints" / f"step-{summary['steps']:08d}").is_dir()


@pytest.mark.slow
def test_a_run_survives_actors_that_hang(tmp_path):
    overrides = ["faults.deadline_minutes=0.5"]
    tally = processes.killed_actors(lab(tmp_path), processes.KINDS, signal.SIGSTOP, overrides)
    assert (tally.ended_right, tally.wrong) == (3, 0), tally.notes


@pytest.mark.slow
def test_a_run_survives_ranks_and_teachers_that_are_killed(tmp_path):
    """All ranks are replaced, as none can continue without the others; losses stay bit for bit the same."""
    overrides = ["learner.ranks=2", "teacher.actors=2"]
    tally = processes.killed_actors(lab(tmp_path), ["Learner", "Teacher"], overrides=overrides)
    assert (tally.ended_right, tally.wrong) == (2, 0), tally.notes


@pytest.mark.slow
def test_a_run_survives_kills_while_weights_are_broadcast(tmp_path):
    """An engine with half of its new weights is replaced as well."""
    overrides = ["sync.method=broadcast", "rollout.actors=2"]
    tally = processes.killed_actors(lab(tmp_path, "vllm"), ["Learner", "Rollout"], overrides=overrides)
    assert (tally.ended_right, tally.wrong) == (2, 0), tally.notes


# -- damage and fuzzing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "count"),
    [
        (damage.damaged_checkpoints, 40), (damage.damaged_caches, 60), (damage.damaged_data, 100),
        (damage.fuzzed_settings, 500), (damage.fuzzed_data, 400), (damage.fuzzed_caches, 150),
    ],
)  # fmt: skip
def test_readers_answer_right_or_refuse_in_words(tmp_path, scenario, count):
    """A share of what `make faults` does."""
    tally = scenario(tmp_path / "s", random.Random(f"{os.urandom(4)}"), count)
    assert (tally.injected, tally.wrong) == (count, 0), tally.notes


def test_a_wrong_answer_or_a_traceback_would_be_counted():
    tally = processes.Tally()

    def fails():
        raise KeyError("x")

    def refuses():
        raise ConfigError("row 3: no")

    for action in (lambda: True, lambda: False, fails, refuses):
        damage.tried(tally, "it", action)
    assert (tally.injected, tally.ended_right, tally.clear_error, tally.wrong) == (4, 1, 1, 2)


def test_the_suite_writes_its_summary_and_fails_if_anything_was_wrong(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path / "out"), "--count", "1", "--only", "damaged-data"]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["injected"] == 10 == summary["ended_right"] + summary["clear_error"]
    monkeypatch.setattr(damage, "load_questions", lambda *_: 1 / 0)
    assert main(arguments) == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["wrong"] == 10


def test_a_soak_is_flat_only_if_nothing_grows():
    def look(step, growth):
        driver = {"mib": 100 + growth * step, "files": 10, "pid": 1}
        return {"step": step, "driver": driver, "all": {"processes": 5, "store_mib": 3.0}}

    assert conclude([look(s, 0) for s in range(100)], 100, 0, 1.0)["flat"]
    leaking = conclude([look(s, 1) for s in range(100)], 100, 0, 1.0)
    assert not leaking["flat"]
    assert leaking["grown"]["driver MiB"] > 0.5
    assert not conclude([look(s, 0) for s in range(100)], 100, 1, 1.0)["flat"]
    assert drift([9.0] * 10 + [1.0] * 90) == 0
