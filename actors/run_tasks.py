"""Training runs as Ray tasks: each is a separate process that joins the same cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
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
STOP_TIMEOUT_S = 600.0  # seconds for runs to finish their current step and save a checkpoint
DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True, slots=True)
class Command(Generic[Name]):
    """A run to start: the arguments of ``skd``, and the file for its output."""

    name: Name
    arguments: list[str]
    log: Path
    owns_device: bool = (
        False  # computes in the process of the command, not in actors: needs a GPU if the cluster has any
    )


@ray.remote(num_cpus=0, max_retries=0)
def run_command(arguments: list[str], log: Path, address: str, folder: Path) -> int:
    """Run ``skd`` with ``arguments`` in ``folder``, with its output in ``log``; return the exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"RAY_ADDRESS": address}
    environment.pop("OMP_NUM_THREADS", None)  # Ray sets it for a task of 0 CPUs
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "onpolicy_skd.cli", *arguments],
            cwd=folder,
            stdout=out,
            stderr=out,
            env=environment,
            preexec_fn=_stop_with_parent,  # noqa: PLW1509 (one system call, which needs no lock)
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)  # ray.cancel interrupts Python code, not a blocking system call
        except KeyboardInterrupt:
            process.terminate()
        return process.wait()


def _stop_with_parent() -> None:
    """Make a run whose parent process dies stop with a checkpoint (only on Linux; elsewhere it runs to its end)."""
    if LIBC is not None:
        LIBC.prctl(DIES_WITH_PARENT, signal.SIGTERM)


def parallel_runs(settings: Settings, limit: int | None = None) -> int:
    """Return how many runs like ``settings`` fit into the connected cluster at a time, at most ``limit``.

    Compares total CPUs and GPUs only, not nodes.  Raises ConfigError if none fits.
    """
    total = ray.cluster_resources()
    bundles = plan(settings, total.get("GPU", 0.0)).bundles()
    cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU"))
    count = int(total.get("CPU", 0.0) // cpus)
    if gpus:
        count = min(count, int((total.get("GPU", 0.0) + 1e-9) // gpus))
    if not count:
        raise ConfigError(
            f"the cluster has {total.get('CPU', 0.0):g} CPUs and {total.get('GPU', 0.0):g} GPUs, a run asks for "
            f"{cpus:g} and {gpus:g}"
        )
    return min(count, limit) if limit else count


def run_all(work: Iterable[Command[Name]], count: int) -> Generator[tuple[Name, int], None, None]:
    """Run all commands, ``count`` at a time; yield the name and exit code of each when it ends.

    Closing the generator, or a signal in it, stops the running commands, each of which saves a checkpoint first.
    """
    address, gpus = ray.get_runtime_context().gcs_address, ray.cluster_resources().get("GPU", 0.0)
    waiting: dict[ray.ObjectRef, Name] = {}
    left = iter(work)
    try:
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
            except RayError as error:  # its worker died: this run has failed, but the others continue
                print(f"{cause_of(error)}", file=sys.stderr)
                code = EXIT_FAILED
            yield name, code
    finally:
        _stop(list(waiting))


def _stop(tasks: list[ray.ObjectRef]) -> None:
    """Ask the commands of ``tasks`` to stop with a checkpoint, and wait for them."""
    if not tasks:
        return
    print(f"{len(tasks)} runs save a checkpoint and stop; a second signal exits at once", file=sys.stderr)
    for task in tasks:
        ray.cancel(task)
    ray.wait(tasks, num_returns=len(tasks), timeout=STOP_TIMEOUT_S)
