"""Connect to Ray, and wait for actors."""

from __future__ import annotations

import functools
import ipaddress
import logging
import math
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.exceptions import GetTimeoutError

from actors.faults import ActorFault, Place, actor_faults
from actors.placement import PRIVATE, TIMEOUT_S, ClusterError, Counts, Resources, fitted, plan
from onpolicy_skd import siblings
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.run.machine import check_machine

logger = logging.getLogger(__name__)
# Its warning says that a private cluster has token authentication, which is intended.
AUTHENTICATION_LOGGER = logging.getLogger("ray._private.authentication.authentication_token_setup")


class DeferredInitError:
    """A ConfigError or ActorFault raised in an actor's constructor, kept until a method calls ``raise_if_failed``.

    Ray reports an exception in a constructor as a dead actor with a traceback; an exception in a method keeps its type.
    """

    def __init__(self) -> None:
        self._error: ConfigError | ActorFault | None = None

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep a ConfigError or ActorFault that the block raises."""
        try:
            with actor_faults():
                yield
        except (ConfigError, ActorFault) as error:
            self._error = error

    def raise_if_failed(self) -> None:
        if self._error:
            raise self._error


def wait_ready(
    actors: Mapping[str, Sequence[Any]],
    log: Callable[[str], None] = print,
    timeout_s: float = math.inf,
    places: dict[Any, Place] | None = None,
) -> None:
    """Block until all ``actors``, given by role, are up; record in ``places`` where each of them runs.

    Logs every minute which roles are not up yet.  Raises what an actor's constructor raised, and GetTimeoutError after
    ``timeout_s`` seconds.
    """
    pending = {actor.ready.remote(): (role, actor) for role, group in actors.items() for actor in group}
    start = time.monotonic()
    while pending:
        remaining = max(0.0, start + timeout_s - time.monotonic())
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=min(TIMEOUT_S, remaining))
        for ref in done:
            where: Any = ray.get(ref)
            _, actor = pending.pop(ref)
            if places is not None:
                places[actor] = where
        if not pending:
            return
        elapsed = time.monotonic() - start
        roles = ", ".join(f"{count} x {role}" for role, count in Counter(role for role, _ in pending.values()).items())
        if elapsed >= timeout_s:
            raise GetTimeoutError(f"{roles} did not start within {timeout_s:.0f} s")
        free = ray.available_resources()
        log(
            f"waiting for {roles} for {elapsed:.0f} s: still loading, or no node has the resources (free now: "
            f"{free.get('GPU', 0):g} GPUs, {free.get('CPU', 0):g} CPUs)"
        )


def with_absolute_paths(settings: Settings) -> Settings:
    """Return ``settings`` with existing paths made absolute, because actors have a different working directory."""
    changed: dict[str, Any] = {}
    for section, name in (("student", "model"), ("teacher", "model"), ("cache", "path")):
        group = getattr(settings, section)
        value = getattr(group, name)
        if value is not None and (section, value) != ("teacher", "student") and Path(value).exists():
            path = Path(value).absolute()
            changed[section] = group.model_copy(update={name: path if name == "path" else str(path)})
    if settings.teachers:
        each = {name: with_absolute_paths(settings.of_teacher(name)).teacher for name in settings.teachers}
        changed["teachers"] = each
    return settings.model_copy(update=changed)


@contextmanager
def connect(settings: Settings, counts: Counts | None = None) -> Iterator[Resources]:
    """Connect to the cluster at ``cluster.address``, $RAY_ADDRESS or on this machine; else start a local one.

    Yields the resources of each role.  Disconnects at the end, and stops Ray if this call started it.  Raises
    ClusterError if the address does not answer or the cluster has too few resources, and ConfigError if Ray would have
    to start here and ``check_machine`` finds that this machine cannot run the settings.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the driver fetches every result that matters
    _join_or_start(settings.cluster.address or os.environ.get("RAY_ADDRESS"), settings)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield fitted(plan(settings, sum(node.get("GPU", 0.0) for node in nodes), counts), nodes)
    finally:
        ray.shutdown()


def _join_or_start(address: str | None, settings: Settings) -> None:
    """Join the cluster at ``address`` or the one on this machine; start a private one where there is none."""
    if address and ":" in address and "://" not in address and not answers(address):
        raise ClusterError(f"no Ray cluster answers at {address}; leave cluster.address empty for a local one")
    running = address or running_here()
    if running:
        _init(address=running)
        if address or PRIVATE not in ray.cluster_resources():
            return
        ray.shutdown()  # this Ray is private to another run and ends with that run
    check_machine(settings)
    _init(address="local", include_dashboard=False, resources={PRIVATE: 1.0})


def _init(address: str, **options: Any) -> None:
    """Call ``ray.init`` such that loopback addresses stay as they are and a private Ray listens on loopback only.

    ray.init has no public option for either: it would replace a loopback address with the host's, where nothing
    listens.  A setup hook makes workers import this project's ``actors`` and ``eval`` even if the working directory
    contains packages of the same names.
    """
    if siblings.hidden_in(Path.cwd()):
        options["runtime_env"] = {"worker_process_setup_hook": siblings.worker_setup()}
    private = address == "local"
    ray_constants.ENABLE_RAY_CLUSTER = not (private or is_loopback(address))
    AUTHENTICATION_LOGGER.setLevel(logging.ERROR if private else logging.NOTSET)
    with _separate_session() if private else nullcontext():
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)


@contextmanager
def _separate_session() -> Iterator[None]:
    """Start Ray's processes in a separate session, which signals to the driver's process group do not reach.

    Ctrl-C in a terminal, ``timeout`` and schedulers signal the whole group, but saving a checkpoint needs the actors.
    """
    popen = services.ConsolePopen
    if sys.platform == "linux":  # elsewhere Ray ends its processes through the driver's process group
        services.ConsolePopen = functools.partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def is_loopback(address: str) -> bool:
    """Return whether ``host:port`` names this machine's loopback interface."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def running_here() -> str | None:
    """Return the address of the Ray that was last started on this machine; None if it no longer answers.

    ``ray.init(address="auto")`` reads the same record but waits for minutes if a killed Ray has left it behind.
    """
    record = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address = record.read_text(encoding="utf-8").strip() if record.exists() else ""
    return address if answers(address) else None


def answers(address: str) -> bool:
    """Return True if anything listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True
