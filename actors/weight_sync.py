"""Ways to send new weights from the learner to every rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from actors.faults import GRACE, Log, fault_of
from actors.placement import ClusterError, Resources
from actors.rollout_actor import RolloutGroup
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.weight_transfer import WeightSpec


class WeightSync(Protocol):
    """A way to make every rollout engine hold the learner's weights; all ranks of the learner take part."""

    def push(self, version: int, timeout_s: float) -> None:
        """Send the weights of policy ``version``.  Raises GetTimeoutError after ``timeout_s`` seconds."""
        ...


class ObjectStoreSync:
    """Sends through Ray's object store: the learner writes one copy, every engine reads it; works anywhere."""

    def __init__(self, learner: Sequence[Any], rollouts: RolloutGroup) -> None:
        self._learner = learner
        self._rollouts = rollouts

    def push(self, version: int, timeout_s: float) -> None:
        # The weights stay in the object store; the driver holds a ref.  The other ranks help rank 0 to gather them.
        refs = [rank.weights.remote() for rank in self._learner]
        try:
            wait_all([actor.load_weights.remote(refs[0], version) for actor in self._rollouts.actors], timeout_s)
        except RayError:
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)  # let the ranks end the call
            raise


class BroadcastSync:
    """Broadcasts from the learner's rank 0 to all engines' workers, device to device."""

    def __init__(self, learner: Sequence[Any], rollouts: RolloutGroup, tensor_parallel: int) -> None:
        self._learner = learner
        self._rollouts = rollouts
        self._workers_per_engine = tensor_parallel
        self._weight_spec: WeightSpec | None = None

    def push(self, version: int, timeout_s: float) -> None:
        if self._weight_spec is None:
            self._weight_spec = self._form_group(timeout_s)
        received = [actor.receive.remote(self._weight_spec, version) for actor in self._rollouts.actors]
        wait_all([*received, *(rank.send.remote(received) for rank in self._learner)], timeout_s)

    def _form_group(self, timeout_s: float) -> WeightSpec:
        first, engines = self._learner[0], self._rollouts.actors
        workers = self._workers_per_engine
        count = 1 + len(engines) * workers
        address, weight_spec = ray.get(first.open_group.remote(), timeout=timeout_s)
        joined = [actor.init_process_group.remote(address, 1 + i * workers, count) for i, actor in enumerate(engines)]
        wait_all([first.init_process_group.remote(count), *joined], timeout_s)
        return weight_spec


class SharedMemorySync:
    """Lets each engine map (CUDA IPC) the copy of the weights that the learner rank on the same GPU makes."""

    def __init__(self, learner: Sequence[Any], rollouts: RolloutGroup, ranks: Sequence[int]) -> None:
        """Pair each engine with the learner rank on its GPU; ``ranks``: for each engine, the number of that rank."""
        self._learner = learner
        self._rollouts = rollouts
        self._ranks = ranks
        self._ready = False

    def push(self, version: int, timeout_s: float) -> None:
        engines = self._rollouts.actors
        if not self._ready:
            wait_all([actor.init_process_group.remote(("", 0), 0, 0) for actor in engines], timeout_s)
            self._ready = True
        specs = [rank.export_weights.remote() for rank in self._learner]
        try:
            pairs = zip(engines, self._ranks, strict=True)
            wait_all([actor.receive.remote(specs[rank], version) for actor, rank in pairs], timeout_s)
        finally:
            dropped = [rank.drop_export.remote() for rank in self._learner]
        wait_all(dropped, timeout_s)


def sync_method(settings: Settings, resources: Resources) -> str:
    """Return the method that ``sync.method`` asks for or, for auto, the fastest one that ``resources`` allow.

    GPU shares that would fit on one GPU may be placed on two; ``build_sync`` checks where they are.  Raises
    ClusterError for a method that the resources do not allow.
    """
    method, learner, rollout = settings.sync.method, resources.learner, resources.rollout
    on_gpus = learner.gpus > 0 and rollout.gpus > 0
    may_share = on_gpus and (resources.colocated or learner.gpus + rollout.gpus <= 1 + 1e-9)
    if method == "broadcast" and on_gpus and min(learner.gpus, rollout.gpus) < 1:
        raise ClusterError("sync.method=broadcast: NCCL allows one process of a group on a GPU; accepted: object_store")
    if method == "ipc" and not on_gpus:
        raise ClusterError("sync.method=ipc: maps the memory of a GPU, and this run has none; accepted: object_store")
    if method == "ipc" and not may_share:
        raise ClusterError(
            f"sync.method=ipc: learner and engine do not fit one GPU ({learner.gpus:g} + {rollout.gpus:g}); accepted: "
            "auto, broadcast, object_store, cluster.topology=colocated, or shares (cluster.*_gpus)"
        )
    if method != "auto":
        return method
    if not on_gpus or settings.rollout.engine != "vllm":
        return "object_store"
    if may_share:
        return "ipc"
    # NCCL allows only one process of a group per GPU.
    return "broadcast" if min(learner.gpus, rollout.gpus) >= 1 else "object_store"


def build_sync(
    settings: Settings, learner: Sequence[Any], rollouts: RolloutGroup, gpu_of: Callable[[Any], str | None], log: Log
) -> WeightSync:
    """Return the WeightSync of ``settings.sync.method``, which must not be auto; it is valid for these actors only.

    ``gpu_of`` returns the UUID of an actor's GPU.  With ipc, all engines read the object store if any engine has no
    learner rank on its GPU.
    """
    if settings.sync.method == "broadcast":
        return BroadcastSync(learner, rollouts, settings.rollout.tensor_parallel)
    if settings.sync.method == "ipc":
        rank_on = {gpu: number for number, rank in enumerate(learner) if (gpu := gpu_of(rank)) is not None}
        ranks = [rank_on[gpu] for engine in rollouts.actors if (gpu := gpu_of(engine)) in rank_on]
        if len(ranks) == len(rollouts.actors):
            return SharedMemorySync(learner, rollouts, ranks)
        log("weights travel through the object store: not every engine is on the GPU of a learner rank")
    return ObjectStoreSync(learner, rollouts)


def wait_all(refs: Sequence[ray.ObjectRef], timeout_s: float) -> None:
    """Wait for all ``refs``; if several calls fail, raise a fault of an actor in preference to other errors.

    When an actor dies, the actors that exchange data with it fail as well, each with a different error.
    """
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
