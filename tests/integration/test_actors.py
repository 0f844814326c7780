"""Placement, tensors through Ray, colocated engines, and the teacher as an actor."""

import os
import socket
import threading
import time
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import ray
import torch
from helpers import make_trajectories, tiny_settings
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError

from actors.cluster import connect, running_here
from actors.engine_weights import EngineWeights
from actors.faults import Place
from actors.groups import ActorGroups
from actors.learner_weights import on_failure
from actors.placement import ClusterError, Placement, fitted, plan
from actors.serialization import pack, pack_named, unpack, unpack_named
from actors.teacher_actor import RemoteTeacher, TeacherActor, build_teacher
from actors.weight_sync import sync_method, wait_all
from actors.workers import Workers
from onpolicy_skd.config.schema import ClassSettings
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.teacher.teacher import PrefetchingTeacher
from onpolicy_skd.types import Trajectory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_survive_the_wire(dtype):
    tensor = torch.randn(5, 3).to(dtype)
    assert torch.equal(unpack(pack(tensor)), tensor)
    named = dict(unpack_named(pack_named([("a", tensor), ("b", tensor.T)])))
    assert torch.equal(named["b"], tensor.T)
    array, _ = pack(tensor)
    array.flags.writeable = False  # as from the object store
    unpack((array, str(dtype).removeprefix("torch."))).add_(1)


def test_roles_use_gpus_when_the_cluster_has_any():
    assert [r.gpus for r in plan(tiny_settings(), 0).roles] == [0, 0, 0]
    assert [r.gpus for r in plan(tiny_settings(), 3).roles] == [1, 1, 1]
    assert [r.gpus for r in plan(tiny_settings(run={"device": "cpu"}), 8).roles] == [0, 0, 0]
    assert [r.count for r in plan(tiny_settings(rollout={"actors": 2}), 4).roles] == [1, 1, 2]
    assert [r.gpus for r in plan(tiny_settings(cluster={"learner_gpus": 0.5}), 0).roles] == [0, 0, 0]
    shares = tiny_settings(cluster={"learner_gpus": 0.5, "teacher_gpus": 0.25, "rollout_gpus": 0.25})
    assert [r.gpus for r in plan(shares, 1).roles] == [0.5, 0.25, 0.25]
    counts = plan(tiny_settings(teacher={"actors": 3}, learner={"ranks": 4}), 8)
    assert [(r.name, r.count) for r in counts.roles] == [("learner", 4), ("teacher", 3), ("rollout", 1)]
    alone = plan(tiny_settings(teacher={"placement": "learner"}), 2)
    assert alone.teacher.count == 0


def test_too_few_gpus_or_cpus_are_said_with_the_arithmetic():
    with pytest.raises(
        ClusterError, match=r"asks for 3 GPUs .learner 1 x 1 \+ teacher 1 x 1 \+ rollout 1 x 1. but .* has 2"
    ):
        plan(tiny_settings(), 2)
    with pytest.raises(ClusterError, match=r"asks for 2 GPUs .* has 0"):
        plan(tiny_settings(cluster={"learner_gpus": 0, "teacher_gpus": 0, "rollout_gpus": 2}), 0)
    many = plan(tiny_settings(rollout={"actors": 20}), 0)
    with pytest.raises(ClusterError, match=r"22 actors ask for 22 x 0\.25 = 5\.5 CPUs but the cluster has 2"):
        fitted(many, [{"CPU": 1}, {"CPU": 1}])
    wide = plan(tiny_settings(rollout={"tensor_parallel": 4}), 8)
    with pytest.raises(ClusterError, match=r"needs 4 GPUs .* on one node, .* most GPUs of a node: 2.*tensor_parallel"):
        fitted(wide, [{"CPU": 8, "GPU": 2}] * 4)
    fitted(wide, [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}])


def test_colocated_roles_share_whole_gpus():
    sections = {"cluster": {"topology": "colocated"}, "learner": {"ranks": 2}, "rollout": {"actors": 2}}
    shared = plan(tiny_settings(**sections), 2)
    assert [(r.count, r.gpus) for r in shared.roles] == [(2, 0.3333), (1, 0.3333), (2, 0.3333)]
    assert shared.bundles() == [{"CPU": 0.75, "GPU": 1.0}, {"CPU": 0.5, "GPU": 1.0}]
    assert plan(tiny_settings(**sections), 0).bundles() == [{"CPU": 0.75}, {"CPU": 0.5}]
    with pytest.raises(ClusterError, match=r"asks for 2 GPUs .* has 1"):
        plan(tiny_settings(**sections), 1)
    sections["cluster"] |= {"learner_gpus": 0.7, "rollout_gpus": 0.5}
    with pytest.raises(ClusterError, match="shares of one GPU exceed it"):
        plan(tiny_settings(**sections), 2)


@pytest.mark.parametrize(
    ("sections", "gpus", "expected"),
    [
        ({}, 0, "object_store"),
        ({}, 3, "broadcast"),
        ({"rollout": {"tensor_parallel": 2}}, 4, "broadcast"),
        ({"cluster": {"topology": "colocated"}}, 1, "ipc"),
        ({"cluster": {"learner_gpus": 0.5, "teacher_gpus": 0.2, "rollout_gpus": 0.3}}, 1, "ipc"),
        ({"cluster": {"learner_gpus": 0.6, "teacher_gpus": 0.4, "rollout_gpus": 0.6}}, 2, "object_store"),
        ({"rollout": {"engine": "transformers"}}, 3, "object_store"),
        ({"sync": {"method": "object_store"}}, 3, "object_store"),
        ({"sync": {"method": "broadcast"}}, 0, "broadcast"),
    ],
)
def test_weights_take_the_shortest_way_that_is_possible(sections, gpus, expected):
    settings = tiny_settings(**sections)
    assert sync_method(settings, plan(settings, gpus)) == expected


def test_ways_that_are_not_possible_are_refused():
    shares = {"learner_gpus": 0.5, "teacher_gpus": 0.2, "rollout_gpus": 0.3}
    half = tiny_settings(cluster=shares, sync={"method": "broadcast"})
    with pytest.raises(ClusterError, match=r"sync.method=broadcast: NCCL"):
        sync_method(half, plan(half, 1))
    apart = tiny_settings(sync={"method": "ipc"})
    with pytest.raises(ClusterError, match=r"sync.method=ipc: learner and engine do not fit one GPU \(1 \+ 1\)"):
        sync_method(apart, plan(apart, 3))
    no_gpu = tiny_settings(cluster={"topology": "colocated"}, sync={"method": "ipc"})
    with pytest.raises(ClusterError, match=r"sync.method=ipc.*accepted: object_store"):
        sync_method(no_gpu, plan(no_gpu, 0))


@pytest.mark.slow
def test_the_learners_ranks_are_on_one_node_where_one_has_room():
    sections = {"learner": {"ranks": 4}, "teacher": {"actors": 2}, "rollout": {"tensor_parallel": 2}}
    planned, pairs = plan(tiny_settings(**sections), 8), {"actors": 2, "tensor_parallel": 2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 4})
    try:
        cluster.add_node(num_cpus=2, num_gpus=4)
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = [node["Resources"] for node in ray.nodes()]
        resources = fitted(planned, nodes)
        assert [b["GPU"] for b in resources.bundles()] == [4, 1, 1, 2]
        assert [resources.bundle(r.name, 0) for r in resources.roles] == [0, 1, 3]
        assert {resources.bundle("learner", rank) for rank in range(4)} == {0}
        placement = Placement(resources)
        placement.wait()
        where = ray.util.placement_group_table(placement._group)["bundles_to_node_id"]
        assert where[1] == where[2] == where[3] != where[0]
        assert len(fitted(planned, [{"CPU": 8, "GPU": 2}] * 4).bundles()) == 7  # no node has room for all ranks
        odd = plan(tiny_settings(learner={"ranks": 2}, teacher={"placement": "learner"}, rollout=pairs), 6)
        assert len(fitted(odd, [{"CPU": 8, "GPU": 3}] * 2).bundles()) == 4  # or the second engine would find none
    finally:
        ray.shutdown()
        cluster.shutdown()
    with pytest.raises(ClusterError, match=r"learner_gpus=0.5.*one rank on a GPU"):
        plan(tiny_settings(learner={"ranks": 2}, cluster={"learner_gpus": 0.5}), 8)


@pytest.mark.slow
def test_a_placement_group_puts_those_who_share_on_one_gpu(local_ray):
    @ray.remote
    class Where:
        def gpus(self):
            return ray.get_gpu_ids()

    sections = {"learner": {"ranks": 2}, "rollout": {"actors": 2}, "teacher": {"actors": 2}}
    resources = plan(tiny_settings(cluster={"topology": "colocated"}, **sections), 4)
    placement = Placement(resources)
    gpus = {
        role.name: [
            ray.get(Where.options(**placement.options(role, number)).remote().gpus.remote())
            for number in range(role.count)
        ]
        for role in resources.roles
    }
    assert gpus["learner"] == gpus["teacher"] == gpus["rollout"]
    assert gpus["learner"][0] != gpus["learner"][1]
    placement.remove()
    apart = plan(tiny_settings(rollout={"tensor_parallel": 2}), 4)
    placement = Placement(apart)
    actors = [Where.options(**placement.options(role, 0)).remote() for role in apart.roles]
    ids = ray.get([actor.gpus.remote() for actor in actors])
    assert [len(gpus) for gpus in ids] == [1, 1, 2]
    assert len({i for gpus in ids for i in gpus}) == 4
    placement.remove()


class Calls:
    """Stands for an actor, or anything: every call is written down and answered at once."""

    def __init__(self, log, name):
        self._log, self._name = log, name

    def __getattr__(self, method):
        def call(*arguments, **named):
            self._log.append(f"{self._name}.{method}")
            return ray.put((self._name, method))

        return SimpleNamespace(remote=call)


def test_colocated_engines_sleep_whenever_the_learner_works(local_ray):
    log = []
    colocated = tiny_settings(sync={"method": "ipc"}, cluster={"topology": "colocated"})
    groups = ActorGroups.__new__(ActorGroups)
    groups.settings, groups.log, groups._engines_in_learner = colocated, print, False
    groups.learner, groups.rollouts = [Calls(log, "learner")], SimpleNamespace(actors=[Calls(log, "engine")])
    groups._places = dict.fromkeys([*groups.learner, *groups.engines], Place("node", 1, "actor", gpu="GPU-1"))
    workers = Workers.__new__(Workers)
    workers._groups, workers._weights = groups, EngineWeights(groups, colocated=True, vocabulary=512)
    workers._weights._proved = True
    workers._weights.connect()
    ways = ["learner.export_weights", "engine.receive", "learner.drop_export"]
    workers.engines()
    assert log == []  # they start awake, with the weights of the learner's model
    workers.wait_for([ray.put(0)])
    assert log.pop() == "engine.sleep"
    workers.score_samples([])
    workers.engines()
    assert log == ["learner.score_samples", "engine.init_process_group", *ways]
    workers.engines()
    log.clear()
    workers.score_samples([])
    workers.score_samples([])
    workers.engines()
    assert log == ["engine.sleep", "learner.score_samples", "learner.score_samples", *ways]


def test_trajectories_to_score_are_serialized_once_for_all_ranks(local_ray):
    class Rank:
        def __init__(self):
            self.received = []
            self.score_samples = SimpleNamespace(remote=lambda shared: self.received.append(shared) or ray.put([0.5]))

    workers = Workers.__new__(Workers)
    groups = ActorGroups.__new__(ActorGroups)
    groups.settings, groups.log, groups.learner = tiny_settings(), print, [Rank(), Rank()]
    workers._groups, workers._weights = groups, EngineWeights(groups, colocated=False, vocabulary=512)
    batch = make_trajectories([(2, 3)])
    assert workers.score_samples(batch) == [0.5]
    (first,), (second,) = (rank.received for rank in groups.learner)
    assert isinstance(first, ray.ObjectRef)
    assert first == second
    assert [t.key for t in ray.get(first)] == ["t0"]


def test_of_several_errors_the_fault_counts(local_ray):
    @ray.remote
    def fails(error):
        raise error

    @ray.remote
    class Dies:
        def die(self):
            time.sleep(0.5)
            os._exit(1)

    actor = Dies.options(max_restarts=0).remote()
    with pytest.raises(ActorDiedError):
        wait_all([fails.remote(RuntimeError("Connection closed by peer")), actor.die.remote()], 30)
    with pytest.raises(RuntimeError, match="no such tensor"):
        wait_all([fails.remote(RuntimeError("no such tensor"))], 30)


def test_an_engine_that_fails_ends_what_waits_for_it(local_ray):
    @ray.remote
    class Engine:
        def receive(self, how):
            time.sleep(0.5)
            if how == "dies":
                os._exit(1)
            if how == "raises":
                raise RuntimeError("no such tensor")

    for how, expected in (("dies", True), ("raises", True), ("loads", False)):
        engines, aborted = [Engine.remote() for _ in range(2)], threading.Event()
        with on_failure([engines[0].receive.remote("loads"), engines[1].receive.remote(how)], aborted.set):
            assert aborted.wait(20 if expected else 2) == expected
    engine, aborted = Engine.remote(), threading.Event()
    with on_failure([engine.receive.remote("dies")], aborted.set):
        pass
    assert not aborted.wait(2)  # nothing waits any more


def test_the_record_of_a_killed_ray_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert running_here() is None
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        record.write_text(address)
        assert running_here() == address
    assert running_here() is None  # nobody listens any more
    record.write_text("no address")
    assert running_here() is None
    start = time.monotonic()
    with (
        pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"),
        connect(tiny_settings(cluster={"address": address})),
    ):
        pass
    assert time.monotonic() - start < 60


@pytest.fixture(scope="module")
def local_ray():
    """With GPUs that it only counts."""
    ray.init(address="local", num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_teacher_actors_give_what_the_plain_teacher_gives(local_ray, count):
    settings = tiny_settings()
    tokenizer = load_tokenizer("bundled:demo_teacher")
    ids = torch.tensor(tokenizer("Now Zoe has <<22*2=44>>44 coins.")["input_ids"]).numpy()
    members = [
        Trajectory(f"t{cut}", ids[:cut], ids[cut:], torch.zeros(len(ids) - cut).numpy(), "stop", 0) for cut in (3, 6)
    ]
    plain = build_teacher(settings, 512, 0)
    plain.encode(members)
    actors = [TeacherActor.remote(settings, 512, 0, number, count) for number in range(count)]
    remote = RemoteTeacher(actors, "cpu")
    remote.expect([actor.encode.remote(members) for actor in actors], members)
    wanted = [("t6", [2, 0]), ("t3", [4])]
    assert torch.allclose(remote.rows(wanted), plain.rows(wanted), atol=1e-5)
    assert torch.equal(remote.head().weight_VH, plain.head().weight_VH)
    for got, expected in zip(
        remote.entropy_and_logprob(["t6", "t3"]), plain.entropy_and_logprob(["t6", "t3"]), strict=True
    ):
        assert torch.allclose(got, expected, atol=1e-5)
    drawn = (wanted, [5, 6], ClassSettings(sampler="rs_kd", draws=9))
    for got, expected in zip(astuple(remote.classes(*drawn)), astuple(plain.classes(*drawn)), strict=True):
        assert got == expected if isinstance(got, str) else torch.allclose(got, expected, atol=1e-5)
    if count == 2:  # each knows its share alone
        with pytest.raises(KeyError, match="t3"):
            ray.get(actors[1].rows.remote([("t3", [0])]))
    remote.release(["t3"])
    with pytest.raises(KeyError, match="t3"):
        remote.rows([("t3", [0])])
    for actor in actors:
        ray.kill(actor)


@pytest.mark.slow
def test_a_prefetched_answer_is_used_once_and_lost_with_its_actor(local_ray):
    settings, options = tiny_settings(), ClassSettings(sampler="rs_kd", draws=9)
    members = make_trajectories([(5, 9), (3, 20), (7, 4)])
    plain = build_teacher(settings, 512, 0)
    plain.encode(members)
    actors = [TeacherActor.remote(settings, 512, 0, number, 2) for number in range(2)]
    remote = RemoteTeacher(actors, "cpu")
    assert isinstance(remote, PrefetchingTeacher)
    remote.encode(members)
    wanted, other = [("t2", [2, 0]), ("t1", [4]), ("t0", [8])], [("t1", [0])]
    for request in (wanted, other):  # the second time another answer than the prefetched one
        remote.prefetch_rows(wanted)
        assert torch.allclose(remote.rows(request), plain.rows(request), atol=1e-5)
        assert remote._prefetched is None
    remote.prefetch_classes(wanted, [5, 6, 7], options)
    prefetched, asked = (astuple(remote.classes(wanted, [5, 6, 7], options)) for _ in range(2))
    for got, expected in zip(prefetched, asked, strict=True):
        assert got == expected if isinstance(got, str) else torch.equal(got, expected)
    remote.prefetch_rows(wanted)
    remote.forget([t.key for t in members])  # as after a step that failed
    assert remote._prefetched is None
    remote.encode(members)
    remote.prefetch_rows(wanted)
    ray.kill(actors[1])
    with pytest.raises(ActorDiedError):
        remote.rows(wanted)
    actors[1] = TeacherActor.remote(settings, 512, 0, 1, 2)
    remote.replace(actors)
    remote.encode(members)
    assert torch.allclose(remote.rows(wanted), plain.rows(wanted), atol=1e-5)
    for actor in actors:
        ray.kill(actor)


@pytest.mark.slow
def test_a_prefetched_answer_that_an_actor_died_with_can_be_forgotten(local_ray):
    actor = TeacherActor.remote(tiny_settings(), 512, 0)
    remote = RemoteTeacher([actor], "cpu")
    members = make_trajectories([(5, 9)])
    ray.get(actor.ready.remote())
    remote.expect([], members)  # never encoded: the answer is never sent
    remote.prefetch_rows([("t0", [1])])
    ray.kill(actor)
    remote.forget(["t0"])
    with pytest.raises(KeyError, match="t0"):
        remote.rows([("t0", [1])])
