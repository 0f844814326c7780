"""Distinguish faults of actors (death, no answer, out of memory) from errors in code, and identify the faulty actor."""

from __future__ import annotations

import functools
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import getmembers, isfunction, isgeneratorfunction
from typing import Any, NamedTuple, TypeVar

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

from onpolicy_skd.config.errors import first_line

FAULTS = (RayActorError, GetTimeoutError, ObjectLostError, ObjectStoreFullError, OutOfDiskError, OutOfMemoryError,
          NodeDiedError, WorkerCrashedError)  # fmt: skip
MEMORY = (MemoryError, torch.OutOfMemoryError)
NO_ANSWER = "no answer within faults.deadline_minutes"
DEATHS = {  # part of Ray's message about a dead actor -> what the log says instead
    "running low on memory": "Ray ended its process because the node was running low on memory",
    "its node has died": "its node is gone",
    "its owner has died": "the process that started it is gone",
    "process has died": "its process ended unexpectedly: killed, out of memory, or crashed",
}
LONGEST_REASON = 200  # characters
GRACE = 20.0  # seconds that an idle actor may take to answer
FIRST_NOTICE = 300.0  # seconds until the log first names a role that has not answered; then after 2, 4, 8 times as many
DEATH_S = 1.0  # seconds to wait for the end of a worker process to which the others have lost their connection
_watched: list[Any] = []  # this actor's engines that have worker processes
ActorClass = TypeVar("ActorClass", bound=type)
Log = Callable[[str], None]


class Place(NamedTuple):
    """Node id, process id, Ray's actor id, and the UUID of the actor's GPU if it has exactly one or a share of one."""

    node: str
    pid: int
    actor_id: str
    gpu: str | None = None


class ActorFault(RuntimeError):
    """An out-of-memory error, or a dead engine, in an actor that still answers but must be replaced."""

    def __init__(self, actor_id: str, reason: str) -> None:
        super().__init__(actor_id, reason)
        self.actor_id, self.reason = actor_id, reason

    def __str__(self) -> str:
        return self.reason


def place() -> Place:
    """Return the place of the calling actor."""
    context = ray.get_runtime_context()
    alone = len(ray.get_gpu_ids()) == 1 and torch.cuda.is_available()
    gpu = str(torch.cuda.get_device_properties(0).uuid) if alone else None
    return Place(context.get_node_id(), os.getpid(), str(context.get_actor_id()), gpu)


def reports_faults(actor_class: ActorClass) -> ActorClass:
    """Make every public method of ``actor_class`` raise ActorFault if it runs out of memory or its engine dies."""
    for name, method in getmembers(actor_class, isfunction):
        if not name.startswith("_"):
            setattr(actor_class, name, _reporting(method))
    return actor_class


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with actor_faults():
            return method(*args, **kwargs)

    @functools.wraps(method)
    def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with actor_faults():
            yield from method(*args, **kwargs)

    return generate if isgeneratorfunction(method) else call


@contextmanager
def actor_faults() -> Iterator[None]:
    """Raise ActorFault in place of errors that leave this process unusable."""
    try:
        yield
    except Exception as error:
        if not _is_fault(error):
            raise
        raise ActorFault(place().actor_id, f"{type(error).__name__}: {first_line(error)}") from error


def watch_workers(engine: Any) -> None:
    """Treat the death of a worker process of this actor's vLLM ``engine`` as a fault of the actor.

    When a worker dies, the actor's process exits, because the running call may never return.  A call that fails before
    that raises ActorFault.
    """
    if hasattr(engine, "on_worker_death"):
        _watched.append(engine)
        engine.on_worker_death(functools.partial(os._exit, 1))


def _is_fault(error: Exception) -> bool:
    """Return True if ``error`` leaves this process unusable."""
    if isinstance(error, MEMORY) or type(error).__name__ == "EngineDeadError":  # the latter is vLLM's
        return True
    return any(engine.lost_worker(DEATH_S) for engine in _watched)


def fault_of(error: BaseException) -> str | None:
    """Return one line that says what happened to an actor; None for an error that a new actor would raise again."""
    error = _root(error)
    if isinstance(error, ActorFault):
        return error.reason
    if isinstance(error, GetTimeoutError):
        return NO_ANSWER
    if not isinstance(error, FAULTS) or (isinstance(error, ActorDiedError) and error.actor_init_failed):
        return None
    message = str(error)
    known = (words for key, words in DEATHS.items() if key in message)
    return next(known, textwrap.shorten(f"{type(error).__name__}: {first_line(message)}", LONGEST_REASON))


def faulty_actor(error: BaseException) -> str | None:
    """Return Ray's id of the actor that died or ran out of memory; None if ``error`` does not name one."""
    error = _root(error)
    return error.actor_id if isinstance(error, (ActorFault, RayActorError)) else None


def needs_restart(error: BaseException) -> bool:
    """Return True for an actor that still answers but must be replaced (ActorFault)."""
    return isinstance(_root(error), ActorFault)


def _root(error: BaseException) -> BaseException:
    """Return what an actor raised, without Ray's wrapping."""
    while isinstance(error, RayTaskError) and error.cause is not error:
        error = error.cause
    return error


def get_answers(refs: Any, role: str, timeout_s: float, log: Log = print) -> Any:
    """Return ``ray.get(refs)``; log at growing intervals that ``role`` has not answered.

    Raises the first error of any call, and GetTimeoutError after ``timeout_s`` seconds.
    """
    start, notice = time.monotonic(), min(FIRST_NOTICE, timeout_s / 4)
    while True:
        elapsed = time.monotonic() - start
        try:
            return ray.get(refs, timeout=max(0.0, min(notice, timeout_s) - elapsed))
        except GetTimeoutError as error:
            if isinstance(error, RayTaskError):  # raised inside an actor
                raise
            if notice >= timeout_s:
                raise GetTimeoutError(f"the {role} has not answered for {timeout_s:.0f} s") from None
            log(f"the {role} has not answered for {notice:.0f} s (faults.deadline_minutes allows {timeout_s:.0f} s)")
            notice *= 2


def unresponsive_reason(actors: Sequence[Any], timeout_s: float) -> str | None:
    """Return why ``actors`` must be replaced, or None if all of them answer within ``timeout_s`` seconds."""
    try:
        ray.get([actor.ready.remote() for actor in actors], timeout=timeout_s)
    except RayError as error:
        if (cause := fault_of(error)) is None:
            raise
        return cause
    return None


def kill(actor: Any, where: Place | None) -> None:
    """Kill ``actor``, and its process at ``where`` in case the process no longer responds to Ray."""
    ray.kill(actor)
    if where is None:
        return
    on_node = NodeAffinitySchedulingStrategy(where.node, soft=False)
    killed = _kill.options(scheduling_strategy=on_node).remote(where.pid)
    ray.wait([killed], timeout=GRACE)  # a node that is gone has no process either


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    """Kill process ``pid`` of this node if it is still a Ray actor."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if file.read().startswith(b"ray::"):
                os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
