"""What each role asks of the cluster, and the one placement group in which the roles are ranges of bundles."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings

CPUS_PER_ROLE = 0.25  # roles take turns on the processors; a small share lets all of them fit on two cores
TIMEOUT_S = 60  # seconds between two messages
PRIVATE = "onpolicy_skd_private"  # a resource that marks a Ray which ends with its run
FORWARDED = ("HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CUDA_DEVICE_ORDER")
LOOPBACK = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")  # a Ray of our own is on one machine
Bundle = dict[str, float]


class ClusterError(ConfigError):
    """The cluster cannot be reached or has less than the run asks for; the message shows the arithmetic."""


@dataclass(frozen=True, slots=True)
class Role:
    name: str
    count: int
    gpus: float  # of each actor

    def options(self) -> dict[str, Any]:
        """Arguments of ``ActorClass.options``, for an actor anywhere."""
        environment = {"TOKENIZERS_PARALLELISM": "false"} | {n: os.environ[n] for n in FORWARDED if n in os.environ}
        if not self.gpus:
            environment["OMP_NUM_THREADS"] = "1"  # roles share the cores; the learner raises its own share
        if PRIVATE in ray.cluster_resources():
            environment |= LOOPBACK
        return {
            "num_cpus": CPUS_PER_ROLE,
            "num_gpus": self.gpus,
            "runtime_env": {"env_vars": environment},
            "max_restarts": 0,  # Workers.recover restarts them: they need the current weights
            "enable_task_events": False,  # Ray's head keeps a record of every call: 25 KB a step, for days
        }


@dataclass(frozen=True, slots=True)
class Resources:
    learner: Role
    teacher: Role
    rollout: Role
    colocated: bool = False
    together: bool = False  # the learner's ranks in one bundle, and so on one node: they talk most

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.learner, self.teacher, self.rollout)

    def bundles(self) -> list[Bundle]:
        """Split: one for each actor, learner first (its ranks may share one), then teachers, then engines.

        Colocated: a whole GPU for each rank of the learner, which actors of the same number in other roles share.
        """
        if not self.colocated:
            own = [_bundle(CPUS_PER_ROLE, role.gpus) for role in self.roles for _ in range(role.count)]
            ranks = self.learner.count
            return [_bundle(CPUS_PER_ROLE * ranks, self.learner.gpus * ranks), *own[ranks:]] if self.together else own
        sharing = [sum(number < role.count for role in self.roles) for number in range(self.learner.count)]
        return [_bundle(CPUS_PER_ROLE * actors, float(self.learner.gpus > 0)) for actors in sharing]

    def bundle(self, role: str, number: int) -> int:
        """Index of the bundle of actor ``number`` of ``role``."""
        if self.colocated:
            return number
        counts = {r.name: r.count for r in self.roles}
        if self.together:
            number, counts[self.learner.name] = 0 if role == self.learner.name else number, 1
        names = list(counts)
        return sum(counts[name] for name in names[: names.index(role)]) + number


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


class Placement:
    """The bundles of one run, reserved together or not at all."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._group = placement_group(resources.bundles(), strategy="PACK")

    def options(self, role: Role, number: int) -> dict[str, Any]:
        """Arguments of ``ActorClass.options`` for actor ``number`` of ``role``."""
        index = self._resources.bundle(role.name, number)
        return role.options() | {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index)}

    def wait(self, log: Callable[[str], None] = print) -> None:
        """Blocks until there is room for all; says every minute what is free."""
        bundles = self._resources.bundles()
        most = max(bundle.get("GPU", 0.0) for bundle in bundles)
        while not self._group.wait(TIMEOUT_S):
            free = ray.available_resources()
            log(
                f"waiting for room: {len(bundles)} bundles of up to {most:g} GPUs, each on one node; free now: "
                f"{free.get('GPU', 0):g} GPUs, {free.get('CPU', 0):g} CPUs"
            )

    def remove(self) -> None:
        remove_placement_group(self._group)


@dataclass(frozen=True, slots=True)
class Counts:
    """Actors of each role."""

    learner: int
    teacher: int
    rollout: int

    @staticmethod
    def of_training(settings: Settings) -> Counts:
        own_actor = settings.teacher.placement == "actor" and settings.cache.path is None
        own_engines = settings.generates and settings.rollout.placement == "actor"
        teachers = settings.teacher.actors if own_actor else 0
        return Counts(settings.learner.ranks, teachers, settings.rollout.actors if own_engines else 0)


def plan(settings: Settings, available_gpus: float, counts: Counts | None = None) -> Resources:
    """What each role asks for, in training or with ``counts`` of actors.

    run.device=auto means GPUs if the cluster has any; shares of a GPU are then optional, whole GPUs are a demand.
    Raises ClusterError, with the arithmetic, if that is more than ``available_gpus``.
    """
    training, counts = counts is None, counts or Counts.of_training(settings)
    own = settings.cluster
    colocated = own.topology == "colocated" and training
    asked = [own.learner_gpus, own.teacher_gpus, own.rollout_gpus]
    on_gpu = settings.run.device == "cuda" or (
        settings.run.device == "auto" and (available_gpus > 0 or any(a and a >= 1 for a in asked))
    )
    sharing = sum(count > 0 for count in (counts.learner, counts.teacher, counts.rollout)) if colocated else 1
    even = math.floor(1e4 / sharing) / 1e4  # Ray counts GPUs to four digits

    def gpus(setting: float | None, default: float = even) -> float:
        return 0.0 if not on_gpu else default if setting is None else setting

    whole = float(settings.rollout.tensor_parallel)
    resources = Resources(
        learner=Role("learner", counts.learner, gpus(own.learner_gpus)),
        teacher=Role("teacher", counts.teacher, gpus(own.teacher_gpus)),
        rollout=Role("rollout", counts.rollout, gpus(own.rollout_gpus, even if colocated else whole)),
        colocated=colocated,
    )
    terms = " + ".join(f"{r.name} {r.count} x {r.gpus:g}" for r in resources.roles if r.count)
    if counts.learner > 1 and 0 < resources.learner.gpus < 1 and not colocated:
        raise ClusterError(
            f"cluster.learner_gpus={resources.learner.gpus:g}: NCCL takes no two ranks on one GPU; accepted with "
            f"learner.ranks={counts.learner}: 1"
        )
    if colocated and sum(r.gpus for r in resources.roles if r.count) > 1 + 1e-9:
        raise ClusterError(f"cluster.topology=colocated: the roles' shares of one GPU exceed it ({terms}); lower them")
    needed = sum(b.get("GPU", 0.0) for b in resources.bundles())
    if needed > available_gpus + 1e-9:
        raise ClusterError(
            f"the run asks for {needed:g} GPUs ({terms}) but the cluster has {available_gpus:g}; use fewer "
            "(cluster.learner_gpus, cluster.teacher_gpus, cluster.rollout_gpus, learner.ranks, teacher.actors, "
            "rollout.actors, teacher.placement=learner) or run.device=cpu"
        )
    return resources


def fitted(resources: Resources, nodes: Sequence[Mapping[str, float]]) -> Resources:
    """``resources`` with the learner's ranks on one node, if any has room for them.

    Raises ClusterError, with the arithmetic, if processors do not suffice or a bundle fits no node.
    """
    count, available = sum(role.count for role in resources.roles), sum(node.get("CPU", 0.0) for node in nodes)
    if count * CPUS_PER_ROLE > available:
        raise ClusterError(
            f"the run's {count} actors ask for {count} x {CPUS_PER_ROLE:g} = {count * CPUS_PER_ROLE:g} CPUs but the "
            f"cluster has {available:g}; lower learner.ranks, teacher.actors or rollout.actors"
        )
    for bundle in resources.bundles():
        if not _fits(bundle, nodes):
            most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
            raise ClusterError(
                f"one actor needs {bundle.get('GPU', 0.0):g} GPUs and {bundle['CPU']:g} CPUs on one node, but none has "
                f"them (the most GPUs of a node: {most:g}); lower rollout.tensor_parallel or cluster.*_gpus"
            )
    together = dataclasses.replace(resources, together=resources.learner.count > 1 and not resources.colocated)
    return together if _fit_together(together.bundles(), nodes) else resources


def _fit_together(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether all find room, the largest first, each on the first node that has it."""
    left = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda b: (-b.get("GPU", 0.0), -b["CPU"])):
        node = next((n for n in left if _fits(bundle, [n])), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True


def _fits(bundle: Bundle, nodes: Sequence[Mapping[str, float]]) -> bool:
    return any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes)
