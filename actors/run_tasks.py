"""Whole training runs as Ray tasks: each is a process of its own that joins the same cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import ray
from ray.exceptions import RayError

from actors.placement import plan
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.run.exits import EXIT_FAILED, cause_of

Name = TypeVar("Name")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True, slots=True)
class Command(Generic[Name]):
    """A run as ``python -m`` with ``arguments``, its output in ``log``."""

    name: Name
    arguments: list[str]
    log: Path
    owns_device: bool = False  # computes in its own process, and so needs a GPU of its own where there are any


@ray.remote(num_cpus=0, max_retries=0)
def run_command(arguments: list[str], log: Path, address: str, folder: Path) -> int:
    """The exit code of ``python -m`` with ``arguments`` in ``folder``, whose output goes to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"RAY_ADDRESS": address}
    environment.pop("OMP_NUM_THREADS", None)  # which Ray sets for a task of no processors
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            stdout=out,
            stderr=out,
            env=environment,
            preexec_fn=_stop_with_parent,  # noqa: PLW1509 (one system call, nothing that another thread could hold)
        )
        return process.wait()


def _stop_with_parent() -> None:
    """A run whose comparison was killed stops with a checkpoint (Linux only; elsewhere it runs on to its end)."""
    if LIBC is not None:
        LIBC.prctl(DIES_WITH_PARENT, signal.SIGTERM)


def at_once(settings: Settings, limit: int | None = None) -> int:
    """How many runs like ``settings`` the connected cluster has room for, at most ``limit``.

    Raises ConfigError if there is room for none.
    """
    total = ray.cluster_resources()
    bundles = plan(settings, total.get("GPU", 0.0)).bundles()
    cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU"))
    room = int(total.get("CPU", 0.0) // cpus)
    if gpus:
        room = min(room, int((total.get("GPU", 0.0) + 1e-9) // gpus))
    if not room:
        raise ConfigError(f"the cluster has {total.get('CPU', 0.0):g} CPUs, one run asks for {cpus:g}")
    return min(room, limit) if limit else room


def run_all(work: Iterable[Command[Name]], count: int) -> Iterator[tuple[Name, int]]:
    """Runs every command, ``count`` at a time; yields names with exit codes as they end."""
    address, gpus = ray.get_runtime_context().gcs_address, ray.cluster_resources().get("GPU", 0.0)
    waiting: dict[ray.ObjectRef, Name] = {}
    left = iter(work)
    while True:
        while len(waiting) < count and (item := next(left, None)) is not None:
            task = run_command.options(num_gpus=1.0 if item.owns_device and gpus else 0.0)
            waiting[task.remote(item.arguments, item.log.absolute(), address, Path.cwd())] = item.name
        if not waiting:
            return
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        name = waiting.pop(done)
        try:
            code: int = ray.get(done)
        except RayError as error:  # its worker died: this run has failed, the others go on
            print(f"{cause_of(error)}", file=sys.stderr)
            code = EXIT_FAILED
        yield name, code
