"""Actors that die, hang or run out of memory: telling such faults from errors, and finding out whom they hit."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from onpolicy_skd.run.exits import first_line

FAULTS = (RayActorError, GetTimeoutError, ObjectLostError, ObjectStoreFullError, OutOfDiskError, OutOfMemoryError,
          NodeDiedError, WorkerCrashedError)  # fmt: skip
MEMORY = (MemoryError, torch.OutOfMemoryError)
HUNG = "no answer within faults.deadline_minutes"
DEATHS = {  # what Ray says of an actor's end, and in short
    "running low on memory": "Ray ended its process, for the node was running low on memory",
    "its node has died": "its node is gone",
    "its owner has died": "what it depends on is gone",
    "process has died": "its process ended unexpectedly: killed, out of memory, or crashed",
}
GRACE = 20.0  # seconds that an idle actor may take to answer


class Place(NamedTuple):
    """Where an actor lives."""

    node: str
    pid: int


def place() -> Place:
    """Of the process that asks."""
    return Place(ray.get_runtime_context().get_node_id(), os.getpid())


def fault_of(error: BaseException) -> str | None:
    """In one line, what befell the actors; None for errors that would come again: those that code raised."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, MEMORY) or type(cause).__name__ == "EngineDeadError":  # the latter is vLLM's
            return f"{type(cause).__name__}: {cause}".splitlines()[0]
        return fault_of(cause) if isinstance(cause, RayError) and cause is not error else None
    if isinstance(error, GetTimeoutError):
        return HUNG
    if isinstance(error, ActorDiedError) and getattr(error, "_actor_init_failed", False):
        return "out of memory while it started" if "out of memory" in str(error).lower() else None
    if isinstance(error, FAULTS):
        text = str(error)
        known = (words for part, words in DEATHS.items() if part in text)
        return next(known, f"{type(error).__name__}: {first_line(text)}")
    return None


def faulty_role(error: BaseException) -> str | None:
    """The kind of actor ("Learner", ...) that ran out of memory or whose engine died, though it still answers."""
    kinds = re.findall(r"ray::(\w+)Actor\.", str(error)) if isinstance(error, RayTaskError) else []
    return kinds[-1] if kinds and not isinstance(error, FAULTS) else None


def unresponsive_reason(actors: Sequence[Any], timeout_s: float) -> str | None:
    """Why ``actors`` are no longer of use, or None if all of them answer within ``patience`` seconds."""
    try:
        ray.get([actor.ready.remote() for actor in actors], timeout=timeout_s)
    except RayError as error:
        if (cause := fault_of(error)) is None:
            raise
        return cause
    return None


def kill(actor: Any, where: Place | None) -> None:
    """Kills ``actor``, and a process of it that no longer hears Ray."""
    ray.kill(actor)
    if where is None:
        return
    on_node = NodeAffinitySchedulingStrategy(where.node, soft=False)
    gone = _kill.options(scheduling_strategy=on_node).remote(where.pid)
    ray.wait([gone], timeout=GRACE)  # a node that is gone has no process either


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    """Kills process ``pid`` of this node if it is (still) an actor of Ray's."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if file.read().startswith(b"ray::"):
                os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
