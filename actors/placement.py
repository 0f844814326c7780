"""Resources of each role, and the placement group that reserves them."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.loading import pick_device

CPUS_PER_ROLE = 0.25  # per actor; roles compute alternately, so a small share lets all of them fit on two cores
TIMEOUT_S = 60  # seconds between two log messages while waiting for resources or actors
PRIVATE = "onpolicy_skd_private"  # custom resource that marks a Ray that ends with its run
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
FORWARDED = (
    "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CUDA_DEVICE_ORDER", "VLLM_BATCH_INVARIANT", *INTERFACES,
)  # fmt: skip
TOKEN = "HF_TOKEN"  # forwarded on a cluster, where actors on other nodes load gated models
LOOPBACK = dict.fromkeys(INTERFACES, "lo")  # a private Ray is on one machine
# torch and oneDNN each cache 1024 bfloat16 kernels of 0.3 to 0.6 MB; every number of tokens needs another kernel.
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KERNELS = "64"  # kernels in each cache; a forward and backward pass need about 20
Bundle = dict[str, float]


class ClusterError(ConfigError):
    """Error: the cluster cannot be reached, or has less than the run asks for; the message shows the arithmetic."""


@dataclass(frozen=True, slots=True)
class Role:
    """A role's number of actors and the GPUs of each."""

    name: str
    count: int
    gpus: float  # of each actor

    def on_device(self, settings: Settings) -> Settings:
        """Return ``settings`` for an actor of this role, with run.device=auto replaced by cuda or cpu.

        An actor must use the GPU that Ray assigns to it and no other.  With auto, an actor with a GPU would fall back
        to the CPU if torch could not use the GPU, and an actor without one could take a GPU that is not assigned to it.
        """
        if settings.run.device != "auto":
            return settings
        run = settings.run.model_copy(update={"device": "cuda" if self.gpus else "cpu"})
        return settings.model_copy(update={"run": run})

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``ActorClass.options`` for an actor anywhere in the cluster."""
        environment = {"TOKENIZERS_PARALLELISM": "false"} | {n: os.environ[n] for n in FORWARDED if n in os.environ}
        if not self.gpus:
            environment["OMP_NUM_THREADS"] = "1"  # until the actor calls ``use_cores``
            environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin while idle would slow the other roles
            environment |= {name: os.environ.get(name, KERNELS) for name in KERNEL_CACHES}
        if PRIVATE in ray.cluster_resources():
            environment |= LOOPBACK  # actors of a private Ray inherit the rest from the driver
        elif TOKEN in os.environ:
            environment[TOKEN] = os.environ[TOKEN]
        return {
            "num_cpus": CPUS_PER_ROLE,
            "num_gpus": self.gpus,
            "runtime_env": {"env_vars": environment},
            "max_restarts": 0,  # Workers.recover replaces them: they need the current weights
            "enable_task_events": False,  # else Ray's head keeps a record of every call, 25 KB per step
        }


@dataclass(frozen=True, slots=True)
class Resources:
    """The roles of a run and how they share GPUs and nodes."""

    learner: Role
    teacher: Role
    rollout: Role
    colocated: bool = False
    together: bool = False  # the learner's ranks in one bundle, and so on one node: they exchange the most data

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.learner, self.teacher, self.rollout)

    def bundles(self) -> list[Bundle]:
        """Return the bundles of the placement group.

        Split: one for each actor, learner first (its ranks may share one), then teachers, then engines.
        Colocated: a GPU for each rank of the learner, shared with the actors of the same number in other roles.
        """
        if not self.colocated:
            bundles = [_bundle(CPUS_PER_ROLE, role.gpus) for role in self.roles for _ in range(role.count)]
            if not self.together:
                return bundles
            ranks = self.learner.count
            return [_bundle(CPUS_PER_ROLE * ranks, self.learner.gpus * ranks), *bundles[ranks:]]
        sharing = [sum(number < role.count for role in self.roles) for number in range(self.learner.count)]
        return [_bundle(CPUS_PER_ROLE * actors, float(self.learner.gpus > 0)) for actors in sharing]

    def bundle(self, role: str, number: int) -> int:
        """Return the index of the bundle of actor ``number`` of ``role``."""
        if self.colocated:
            return number
        counts = {r.name: r.count for r in self.roles}
        if self.together:
            number, counts[self.learner.name] = 0 if role == self.learner.name else number, 1
        names = list(counts)
        return sum(counts[name] for name in names[: names.index(role)]) + number


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def use_cores(threads: int | None, actors: int, settings: Settings) -> None:
    """Make the calling actor, one of ``actors`` of its role, compute with ``threads``, by default its share of cores.

    Does nothing on a GPU.  The share is one core with pipeline.streaming or pipeline.max_staleness, because the roles
    then work at the same time.
    """
    if pick_device(settings.run.device) != "cpu":
        return
    if threads is None:
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        here = nodes[ray.get_runtime_context().get_node_id()]
        cores = min(len(os.sched_getaffinity(0)), int(here.get("CPU", 1)))
        threads = 1 if settings.pipeline.overlaps else max(1, cores // math.ceil(actors / len(nodes)))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for processes that vLLM starts
    torch.set_num_threads(threads)


def free_gpu_memory() -> None:
    """Free the unused memory that this process's CUDA caching allocator holds."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


class Placement:
    """The placement group of one run: Ray reserves all of its bundles or none."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._group = placement_group(resources.bundles(), strategy="PACK")

    def options(self, role: Role, number: int) -> dict[str, Any]:
        """Return the arguments of ``ActorClass.options`` for actor ``number`` of ``role``."""
        index = self._resources.bundle(role.name, number)
        return role.options() | {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, index)}

    def wait(self, log: Callable[[str], None] = print) -> None:
        """Block, without a time limit, until the cluster has room for all bundles; log every minute what is free."""
        bundles = self._resources.bundles()
        most = max(bundle.get("GPU", 0.0) for bundle in bundles)
        while not self._group.wait(TIMEOUT_S):
            free = ray.available_resources()
            log(
                f"waiting for resources: {len(bundles)} bundles of up to {most:g} GPUs, each on one node; free now: "
                f"{free.get('GPU', 0):g} GPUs, {free.get('CPU', 0):g} CPUs"
            )

    def remove(self) -> None:
        remove_placement_group(self._group)


@dataclass(frozen=True, slots=True)
class Counts:
    """Number of actors of each role."""

    learner: int
    teacher: int
    rollout: int

    @staticmethod
    def of_training(settings: Settings) -> Counts:
        teacher_actors = settings.teacher.placement == "actor" and settings.cache.path is None
        rollout_actors = settings.needs_engines and settings.rollout.placement == "actor"
        teachers = sum(each.teacher.actors for each in settings.by_teacher)
        return Counts(
            settings.learner.ranks,
            teachers if teacher_actors else 0,
            settings.rollout.actors if rollout_actors else 0,
        )


def plan(settings: Settings, available_gpus: float, counts: Counts | None = None) -> Resources:
    """Return the resources of each role, for training or for the given ``counts`` of actors.

    run.device=auto means GPUs if the cluster has any, or if a setting cluster.*_gpus asks for at least one.
    Raises ClusterError, with the arithmetic, if the GPUs are more than ``available_gpus`` or cannot be shared as set.
    """
    training, counts = counts is None, counts or Counts.of_training(settings)
    cluster = settings.cluster
    colocated = cluster.topology == "colocated" and training
    asked = [cluster.learner_gpus, cluster.teacher_gpus, cluster.rollout_gpus]
    on_gpu = settings.run.device == "cuda" or (
        settings.run.device == "auto" and (available_gpus > 0 or any(a and a >= 1 for a in asked))
    )
    sharing = sum(count > 0 for count in (counts.learner, counts.teacher, counts.rollout)) if colocated else 1
    even = math.floor(1e4 / sharing) / 1e4  # Ray counts GPUs to four digits

    def gpus(setting: float | None, default: float = even) -> float:
        return 0.0 if not on_gpu else default if setting is None else setting

    tensor_parallel = float(settings.rollout.tensor_parallel)
    engines = [float(s.teacher.tensor_parallel) for s in settings.by_teacher if s.teacher.engine == "vllm"]
    of_teacher = engines[0] if engines else even  # several teachers have the same
    resources = Resources(
        learner=Role("learner", counts.learner, gpus(cluster.learner_gpus)),
        teacher=Role("teacher", counts.teacher, gpus(cluster.teacher_gpus, of_teacher)),
        rollout=Role("rollout", counts.rollout, gpus(cluster.rollout_gpus, even if colocated else tensor_parallel)),
        colocated=colocated,
    )
    terms = " + ".join(f"{r.name} {r.count} x {r.gpus:g}" for r in resources.roles if r.count)
    if counts.learner > 1 and 0 < resources.learner.gpus < 1 and not colocated:
        raise ClusterError(
            f"cluster.learner_gpus={resources.learner.gpus:g}: NCCL allows one rank on a GPU; accepted with "
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
    """Return ``resources`` with the learner's ranks on one node, if a node has room for them.

    Raises ClusterError, with the arithmetic, if the CPUs are too few or a bundle fits on no node.
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
                f"them (the most GPUs of a node: {most:g}); lower rollout.tensor_parallel, "
                f"teacher.tensor_parallel or cluster.*_gpus"
            )
    together = dataclasses.replace(resources, together=resources.learner.count > 1 and not resources.colocated)
    return together if _fit_together(together.bundles(), nodes) else resources


def _fit_together(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Return True if all bundles fit when placed largest first, each on the first node that has room."""
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
