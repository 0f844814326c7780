"""Ray itself: connecting, and what each role asks of the cluster."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError

from actors.faults import Place
from onpolicy_skd.config import ConfigError, Settings

CPUS_PER_ROLE = 0.25  # roles take turns on the processors; a small share lets all of them fit on two cores
PRIVATE = "onpolicy_skd_private"  # a resource that marks a Ray which ends with its run
PATIENCE = 60.0  # seconds between two messages while actors start
FORWARDED = ("HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CUDA_DEVICE_ORDER")
log = logging.getLogger(__name__)


class ClusterError(ConfigError):
    """The cluster cannot be reached or has less than the run asks for; the message shows the arithmetic."""


@dataclass(frozen=True, slots=True)
class Role:
    name: str
    count: int
    gpus: float  # of each actor

    def options(self) -> dict[str, Any]:
        """Arguments of ``ActorClass.options``."""
        environment = {"TOKENIZERS_PARALLELISM": "false"} | {n: os.environ[n] for n in FORWARDED if n in os.environ}
        if not self.gpus:
            environment["OMP_NUM_THREADS"] = "1"  # roles share the cores; the learner raises its own share
        return {
            "num_cpus": CPUS_PER_ROLE,
            "num_gpus": self.gpus,
            "runtime_env": {"env_vars": environment},
            "max_restarts": 0,  # Roles.recover restarts them: they need the current weights
            "enable_task_events": False,  # Ray's head keeps a record of every call: 25 KB a step, for days
        }


@dataclass(frozen=True, slots=True)
class Resources:
    learner: Role
    teacher: Role
    rollout: Role

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.learner, self.teacher, self.rollout)


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
    counts = counts or Counts.of_training(settings)
    own = settings.cluster
    asked = [own.learner_gpus, own.teacher_gpus, own.rollout_gpus]
    on_gpu = settings.run.device == "cuda" or (
        settings.run.device == "auto" and (available_gpus > 0 or any(a and a >= 1 for a in asked))
    )

    def gpus(setting: float | None, default: float) -> float:
        return 0.0 if not on_gpu else default if setting is None else setting

    resources = Resources(
        learner=Role("learner", counts.learner, gpus(own.learner_gpus, 1.0)),
        teacher=Role("teacher", counts.teacher, gpus(own.teacher_gpus, 1.0)),
        rollout=Role("rollout", counts.rollout, gpus(own.rollout_gpus, 1.0)),
    )
    needed = sum(role.count * role.gpus for role in resources.roles)
    if needed > available_gpus + 1e-9:
        terms = " + ".join(f"{r.name} {r.count} x {r.gpus:g}" for r in resources.roles if r.count)
        raise ClusterError(
            f"the run asks for {needed:g} GPUs ({terms}) but the cluster has {available_gpus:g}; use fewer "
            "(cluster.learner_gpus, cluster.teacher_gpus, cluster.rollout_gpus, learner.ranks, teacher.actors, "
            "rollout.actors, cache.builders, teacher.placement=learner) or run.device=cpu"
        )
    return resources


def check_cpus(resources: Resources, available_cpus: float) -> None:
    """Raises ClusterError, with the arithmetic, if the roles' processor shares do not fit."""
    count = sum(role.count for role in resources.roles)
    if count * CPUS_PER_ROLE > available_cpus:
        raise ClusterError(
            f"the run's {count} actors ask for {count} x {CPUS_PER_ROLE:g} = {count * CPUS_PER_ROLE:g} CPUs but the "
            f"cluster has {available_cpus:g}; lower learner.ranks, teacher.actors, rollout.actors or cache.builders"
        )


class Refusal:
    """``with Refusal() as refusal:`` in an actor's constructor keeps a ConfigError for ``repeat`` to raise.

    An error that leaves a constructor reaches the driver as a dead actor and a traceback; from a method, as itself.
    """

    def __init__(self) -> None:
        self._error: ConfigError | None = None

    def __enter__(self) -> Refusal:
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> bool:
        if isinstance(error, ConfigError):
            self._error = error
            return True
        return False

    def repeat(self) -> None:
        if self._error:
            raise self._error


def wait_ready(
    actors: Sequence[Any],
    say: Callable[[str], None] = print,
    patience: float = math.inf,
    places: dict[Any, Place] | None = None,
) -> None:
    """Blocks until every actor is up; fills ``places`` with where each one lives.

    Says every minute what it is waiting for.  Raises what a start refused, and GetTimeoutError after ``patience``
    seconds.
    """
    waiting = {actor.ready.remote(): actor for actor in actors}
    deadline = time.monotonic() + patience
    while waiting:
        left = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=min(PATIENCE, left))
        for ref in done:
            where: Any = ray.get(ref)
            actor = waiting.pop(ref)
            if places is not None:
                places[actor] = where
        if waiting and time.monotonic() >= deadline:
            raise GetTimeoutError(f"{len(waiting)} of {len(actors)} actors did not start within {patience:.0f} s")
        if waiting:
            free = ray.available_resources()
            say(
                f"waiting for {len(waiting)} of {len(actors)} actors: loading, or no room on any one node (free now: "
                f"{free.get('GPU', 0):g} GPUs, {free.get('CPU', 0):g} CPUs)"
            )


def located(settings: Settings) -> Settings:
    """``settings`` for actors, whose working directory is another one: paths that exist here become absolute."""
    changed: dict[str, Any] = {}
    for section, name in (("student", "model"), ("teacher", "model"), ("cache", "path")):
        group = getattr(settings, section)
        value = getattr(group, name)
        if value is not None and Path(value).exists():
            path = Path(value).absolute()
            changed[section] = group.model_copy(update={name: path if name == "path" else str(path)})
    return settings.model_copy(update=changed)


@contextmanager
def connect(settings: Settings, counts: Counts | None = None) -> Iterator[Resources]:
    """Uses the running cluster (``cluster.address``, the job's, or this machine's), else starts a local one.

    Yields what each role asks for; disconnects, and stops a Ray that it started, on leaving.  Raises ClusterError.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what matters is asked for, and then raised
    _join_or_start(settings.cluster.address or os.environ.get("RAY_ADDRESS"))
    try:
        total = ray.cluster_resources()
        resources = plan(settings, total.get("GPU", 0.0), counts)
        check_cpus(resources, total.get("CPU", 0.0))
        yield resources
    finally:
        ray.shutdown()


def _join_or_start(address: str | None) -> None:
    """Joins the cluster at ``address`` or the one on this machine; starts a private one where there is none."""
    if address and ":" in address and "://" not in address and not answers(address):
        raise ClusterError(f"no Ray cluster answers at {address}; leave cluster.address empty for a local one")
    found = address or running_here()
    if found:
        _init(address=found)
        if address or PRIVATE not in ray.cluster_resources():
            return
        ray.shutdown()  # another run's private Ray would end with that run
    _init(address="local", include_dashboard=False, resources={PRIVATE: 1.0})


def _init(address: str, **options: Any) -> None:
    """``ray.init``; a Ray of our own listens on loopback alone, which ray.init has no public way to say."""
    ray_constants.ENABLE_RAY_CLUSTER = address != "local"
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)


def running_here() -> str | None:
    """Address of the Ray that was last started on this machine, if it still answers.

    ``ray.init(address="auto")`` reads the same record but waits for minutes where a killed Ray has left it behind.
    """
    record = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address = record.read_text(encoding="utf-8").strip() if record.exists() else ""
    return address if answers(address) else None


def answers(address: str) -> bool:
    """Whether anything listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True
