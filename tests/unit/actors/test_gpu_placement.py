"""Actors on GPUs: memory given back before an engine restarts next to others, and what their environment gets."""

from types import SimpleNamespace

import pytest
from helpers import tiny_settings

from actors import placement
from actors.groups import ActorGroups
from actors.placement import PRIVATE, ClusterError, Resources, Role, plan
from actors.recovery import FaultRecovery


class Actor:
    def __init__(self, log, name):
        self.free_memory = SimpleNamespace(remote=lambda: log.append(f"{name} frees"))


@pytest.mark.parametrize(
    ("shares", "failed", "expected"),
    [
        (True, ["engine"], ["learner frees", "teacher frees", "replace"]),
        (True, ["engine", "teacher"], ["learner frees", "replace"]),
        (True, ["teacher"], ["replace"]),
        (False, ["engine"], ["replace"]),
    ],
)
def test_a_restarted_engine_finds_the_memory_that_others_only_kept(shares, failed, expected):
    log = []
    actors = {name: Actor(log, name) for name in ("learner", "teacher", "engine")}
    groups = SimpleNamespace(
        settings=tiny_settings(), shares_gpus=shares, learner=[actors["learner"]], engines=[actors["engine"]],
        by_role={"learner": [actors["learner"]], "teacher": [actors["teacher"]]}, get=lambda refs, role: refs,
        replace=lambda _: log.append("replace"), wait_ready=lambda _: None,
    )  # fmt: skip
    weights = SimpleNamespace(forget_engines=lambda: None, connect=lambda: None, sleep=lambda: None)
    recovery = FaultRecovery(groups, weights, lambda path: [])
    recovery._restart({actors[name]: "killed" for name in failed}, None, print)
    assert log == expected


@pytest.mark.parametrize(
    ("gpus", "colocated", "shares"), [(1.0, False, False), (0.3, False, True), (0.33, True, True), (0.0, True, False)]
)
def test_engines_share_a_gpu_by_fractions_or_colocated(gpus, colocated, shares):
    groups = ActorGroups.__new__(ActorGroups)
    roles = (Role(name, 1, gpus) for name in ("learner", "teacher", "rollout"))
    groups._resources = Resources(*roles, colocated=colocated)
    assert groups.shares_gpus is shares


def test_interfaces_and_the_hub_token_reach_actors_of_a_cluster(monkeypatch):
    for name in placement.INTERFACES:
        monkeypatch.setenv(name, "ib0")
    monkeypatch.setenv("HF_TOKEN", "secret")

    def environment(resources):
        monkeypatch.setattr(placement.ray, "cluster_resources", lambda: resources)
        return Role("teacher", 1, 1.0).options()["runtime_env"]["env_vars"]

    cluster = environment({"GPU": 8.0})
    assert {cluster[name] for name in placement.INTERFACES} == {"ib0"}
    assert cluster["HF_TOKEN"] == "secret"
    private = environment({"GPU": 1.0, PRIVATE: 1.0})  # on one machine: loopback, and everything else is inherited
    assert {private[name] for name in placement.INTERFACES} == {"lo"}
    assert "HF_TOKEN" not in private


def test_caches_of_kernels_are_bounded_on_a_cpu_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(placement.ray, "cluster_resources", dict)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1000")
    environment = Role("learner", 1, 0.0).options()["runtime_env"]["env_vars"]
    assert [environment[name] for name in placement.KERNEL_CACHES] == ["1000", "64"]
    assert not set(placement.KERNEL_CACHES) & set(Role("learner", 1, 1.0).options()["runtime_env"]["env_vars"])


def test_a_teacher_in_vllm_takes_a_gpu_for_each_of_its_workers():
    settings = tiny_settings(teacher={"engine": "vllm", "tensor_parallel": 4, "actors": 2})
    resources = plan(settings, 10)
    assert (resources.teacher.gpus, resources.learner.gpus, resources.rollout.gpus) == (4.0, 1.0, 1.0)
    with pytest.raises(ClusterError, match=r"teacher 2 x 4 .*but the cluster has 8"):
        plan(settings, 8)
    on_cpu = tiny_settings(run={"device": "cpu"}, teacher={"engine": "vllm", "tensor_parallel": 4})
    assert plan(on_cpu, 0).teacher.gpus == 0
