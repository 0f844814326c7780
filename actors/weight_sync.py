"""New weights from the learner to every rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from actors.faults import GRACE, fault_of
from actors.placement import ClusterError, Resources
from actors.rollout_actor import RolloutGroup
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.weight_transfer import WeightSpec


class WeightSync(Protocol):
    """Makes every rollout engine hold the weights of the learner, all of whose ranks take part."""

    def push(self, version: int, timeout_s: float) -> None:
        """``version``: of the policy.  Raises GetTimeoutError after ``patience`` seconds."""
        ...


class ObjectStoreSync:
    """Through Ray's object store: one copy out of the learner, read by every engine; works anywhere."""

    def __init__(self, learner: Sequence[Any], rollouts: RolloutGroup) -> None:
        self._learner = learner
        self._rollouts = rollouts

    def push(self, version: int, timeout_s: float) -> None:
        # Stays in the object store: the driver holds the reference alone.  The other ranks help rank 0 to gather it.
        parts = [rank.weights.remote() for rank in self._learner]
        try:
            all_of([actor.load_weights.remote(parts[0], version) for actor in self._rollouts.actors], timeout_s)
        except RayError:
            ray.wait(parts, num_returns=len(parts), timeout=timeout_s, fetch_local=False)  # ranks end what they began
            raise


class BroadcastSync:
    """From the learner's rank 0 to all engines' workers at once, device to device, nothing through the host."""

    def __init__(self, learner: Sequence[Any], rollouts: RolloutGroup, tensor_parallel: int) -> None:
        self._learner = learner
        self._rollouts = rollouts
        self._workers = tensor_parallel  # of one engine
        self._weight_spec: WeightSpec | None = None

    def push(self, version: int, timeout_s: float) -> None:
        if self._weight_spec is None:
            self._weight_spec = self._meet(timeout_s)
        received = [actor.receive.remote(self._weight_spec, version) for actor in self._rollouts.actors]
        all_of([*received, *(rank.send.remote() for rank in self._learner)], timeout_s)

    def _meet(self, timeout_s: float) -> WeightSpec:
        first, engines = self._learner[0], self._rollouts.actors
        count = 1 + len(engines) * self._workers
        address, weight_spec = ray.get(first.open_group.remote(), timeout=timeout_s)
        joined = [actor.join_group.remote(address, 1 + i * self._workers, count) for i, actor in enumerate(engines)]
        all_of([first.join_group.remote(count), *joined], timeout_s)
        return weight_spec


class SharedMemorySync:
    """Between each rank of the learner and the engine on its own GPU: the engine maps the learner's copy (CUDA IPC)."""

    def __init__(self, learner: Sequence[Any], rollouts: RolloutGroup) -> None:
        self._learner = learner
        self._rollouts = rollouts
        self._ready = False

    def push(self, version: int, timeout_s: float) -> None:
        engines = self._rollouts.actors
        if not self._ready:
            all_of([actor.join_group.remote(("", 0), 0, 0) for actor in engines], timeout_s)
            self._ready = True
        weight_spec = [rank.export_weights.remote() for rank in self._learner]
        try:
            read = [actor.receive.remote(own, version) for actor, own in zip(engines, weight_spec, strict=False)]
            all_of(read, timeout_s)
        finally:
            dropped = [rank.drop_export.remote() for rank in self._learner]
        all_of(dropped, timeout_s)


def sync_method(settings: Settings, resources: Resources) -> str:
    """What ``sync.method=auto`` comes to.  Raises ClusterError for a method that these resources do not allow."""
    own, learner, rollout = settings.sync.method, resources.learner, resources.rollout
    on_gpus = learner.gpus > 0 and rollout.gpus > 0
    if own == "broadcast" and on_gpus and min(learner.gpus, rollout.gpus) < 1:
        raise ClusterError("sync.method=broadcast: NCCL takes no two of a group on one GPU; accepted: object_store")
    if own == "ipc" and not on_gpus:
        raise ClusterError("sync.method=ipc: maps the memory of a GPU, and this run has none; accepted: object_store")
    if own != "auto":
        return own
    if not on_gpus or settings.rollout.engine != "vllm":
        return "object_store"
    if resources.colocated:
        return "ipc"
    alone = min(learner.gpus, rollout.gpus) >= 1  # NCCL takes no two of a group on one GPU
    return "broadcast" if alone else "object_store"


def build_sync(settings: Settings, learner: Sequence[Any], rollouts: RolloutGroup) -> WeightSync:
    """For ``settings`` whose ``sync.method`` is settled; a new one whenever an actor is."""
    if settings.sync.method == "broadcast":
        return BroadcastSync(learner, rollouts, settings.rollout.tensor_parallel)
    if settings.sync.method == "ipc":
        return SharedMemorySync(learner, rollouts)
    return ObjectStoreSync(learner, rollouts)


def all_of(refs: Sequence[ray.ObjectRef], timeout_s: float) -> None:
    """Waits for all.  Of several errors the one that is a fault counts: when an actor dies, those that were exchanging
    something with it fail as well, each in its own words."""
    try:
        ray.get(list(refs), timeout=timeout_s)
    except RayError as error:
        if fault_of(error) is None:
            done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=GRACE)
            for ref in done:
                _raise_fault(ref, error)
        raise


def _raise_fault(ref: ray.ObjectRef, instead_of: RayError) -> None:
    try:
        ray.get(ref)
    except RayError as other:
        if fault_of(other) is not None:
            raise other from instead_of
