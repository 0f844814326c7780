"""Runs of the bundled pair as real processes, with injected faults."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from onpolicy_skd.report import metrics_log
from onpolicy_skd.report.metrics_log import Event
from onpolicy_skd.storage.files import RunPaths

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config", "demo", "learner.batch_size=4", "data.train_problems=500", "run.trackers=[]",
    "run.evaluate_every=0", "run.checkpoint_every=1", "eval.problems=4", "eval.teacher=false", "eval.before=false",
    "faults.restarts=1000", "faults.backoff_seconds=0", "faults.deadline_minutes=1", "resume=auto",
]  # fmt: skip
COMPARED = ("loss", "grad_norm", "entropy", "positions", "lr")  # metrics of each step that must be equal bit for bit
WITH_EVALUATIONS = [
    "run.checkpoint_every=3",
    "run.evaluate_every=3",
    "eval.before=true",
    "eval.during=4",
    "rollout.actors=2",
]
KINDS = ("Rollout", "Teacher", "Learner")
TIMEOUT_S = 900.0  # seconds after which a run counts as hung


@dataclass
class Tally:
    """Outcomes of the faults of a scenario."""

    injected: int = 0
    ended_right: int = 0
    clear_error: int = 0
    wrong: int = 0
    lost: int = 0  # a checkpoint from before the fault was gone after it
    notes: list[str] = field(default_factory=list)

    def add(self, outcome: str, count: int = 1, note: str = "") -> None:
        self.injected += count
        setattr(self, outcome, getattr(self, outcome) + count)
        if note:
            self.notes.append(note)


@dataclass
class Lab:
    """Folder, engine and random generator for the runs of a scenario."""

    folder: Path
    engine: str
    rng: random.Random
    log: Callable[[str], None] = print

    def command(self, name: str, steps: int, *overrides: str, folder: Path | None = None) -> list[str]:
        identity = [f"run.dir={folder or self.folder}", f"run.name={name}", f"run.steps={steps}"]
        return [
            *(sys.executable, "-m", "onpolicy_skd.train", *SMALL, f"rollout.engine={self.engine}"),
            *identity,
            *overrides,
        ]

    def start(self, command: list[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        env = inherited | {"PYTHONUNBUFFERED": "1"} | environment
        with (self.folder / f"{log}.log").open("ab") as out:
            return subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, command: list[str], log: str, **environment: str) -> int:
        """Run ``command``; return its exit code, or -1 if it hung."""
        return exit_code(self.start(command, log, **environment))

    def log_text(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def steps(self, name: str, folder: Path | None = None) -> dict[int, tuple[float, ...]]:
        """Return the compared metrics of each step and, under the key -1 - step, of each evaluation."""
        values: dict[int, tuple[float, ...]] = {}
        for r in metrics_log.read(RunPaths((folder or self.folder) / name).metrics):
            if "loss" in r:
                values[r["step"]] = tuple(r[k] for k in COMPARED)
            elif r.get("event") == Event.EVALUATION and r["name"] == "during":
                values[-1 - r["step"]] = (r["match"]["share"], r["response_tokens"])
        return values

    def reference(self, steps: int, *overrides: str) -> dict[int, tuple[float, ...]]:
        """Return the metrics of an undisturbed run of ``steps`` steps, which the first call makes.

        Later calls ignore ``overrides``.  Raises RuntimeError if the run fails.
        """
        name = f"reference-{steps}"
        if not RunPaths(self.folder / name).final.exists():
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if self.run(self.command(name, steps, *overrides), name) != 0:
                raise RuntimeError(f"the undisturbed run failed: {self.folder / name}.log")
        return self.steps(name)


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait for a run; return its exit code, or -1 if it hung and was killed."""
    try:
        return process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        return -1


def kill_tree(pid: int) -> None:
    """Kill the process ``pid`` and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)


def actors(driver: int, kind: str) -> list[psutil.Process]:
    """Return the actor processes of ``kind`` in the private Ray of process ``driver``."""
    processes = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                if process.cmdline()[0].startswith(f"ray::{kind}Actor"):
                    processes.append(process)
    return processes


def verdict(lab: Lab, tally: Tally, name: str, steps: int, code: int, count: int) -> None:
    """Count ``count`` faults of a run, which must end with the metrics of the undisturbed run."""
    expected, actual = lab.reference(steps), lab.steps(name)
    if code == 0 and actual == expected and (RunPaths(lab.folder / name).final / "model.safetensors").exists():
        tally.add("ended_right", count)
    elif code not in (0, -1) and one_error(lab.log_text(name)):
        tally.add("clear_error", count, f"{name}: exit {code}")
    else:
        different = sorted(s for s in expected if actual.get(s) != expected[s])
        tally.add("wrong", count, f"{name}: exit {code}, {len(different)} steps differ, the first {different[:1]}")


def one_error(text: str) -> bool:
    return text.count("\nerror: ") == 1 and "Traceback" not in text


def killed_actors(
    lab: Lab, victims: Sequence[str], signal_number: int = signal.SIGKILL, overrides: Sequence[str] = ()
) -> Tally:
    """Kill actors of the kinds ``victims``, in that order, at random times of one run, even while actors start."""
    tally, steps, name = Tally(), 8 * len(victims), "killed"
    lab.reference(steps, *overrides)
    process = lab.start(lab.command(name, steps, *overrides), name)
    done = 0
    for kind in victims:
        time.sleep(lab.rng.uniform(0.2, 6.0 if lab.engine == "transformers" else 12.0))
        done += signal_actor(lab, process, kind, signal_number)
        if process.poll() is not None:
            break
    code = exit_code(process)
    verdict(lab, tally, name, steps, code, done)
    return tally


def signal_actor(lab: Lab, process: subprocess.Popen[bytes], kind: str, signal_number: int) -> bool:
    """Send a signal to an actor of ``kind`` as soon as the run ``process`` has one; return False if it ends first."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if candidates := actors(process.pid, kind):
            with contextlib.suppress(psutil.NoSuchProcess):
                lab.rng.choice(candidates).send_signal(signal_number)
                return True
        time.sleep(0.02)
    return False


def killed_driver(lab: Lab, count: int, steps: int = 60) -> Tally:
    """Kill the driver of a run ``count`` times and resume it; no checkpoint may be lost."""
    tally, name = Tally(), "killed-driver"
    lab.reference(steps)
    lost = done = 0
    code = None
    for _ in range(count):
        before = newest_step(lab.folder / name)
        process = lab.start(lab.command(name, steps), name)
        try:
            code = process.wait(lab.rng.uniform(1.0, 25.0))
        except subprocess.TimeoutExpired:
            process.kill()
            kill_tree(process.pid)
            process.wait()
            done += 1
            lost += newest_step(lab.folder / name) < before
        else:
            break
    if code is None or code != 0:
        code = lab.run(lab.command(name, steps), name)
    verdict(lab, tally, name, steps, code, done - lost)
    if lost:
        tally.add("lost", lost, f"{name}: a checkpoint was gone after a kill")
    return tally


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, folders that are being replaced included; -1 if there is none."""
    names = [p.name.removeprefix(".").removesuffix(".old") for p in RunPaths(run).checkpoints.glob("*step-*")]
    return max((int(n.removeprefix("step-")) for n in names if n.removeprefix("step-").isdigit()), default=-1)


def stopped_while_saving(lab: Lab, count: int, steps: int = 30) -> Tally:
    """Send SIGTERM while a checkpoint is being written, and resume the run; repeat ``count`` times.

    Each stop must give exit code 3.
    """
    tally, name = Tally(), "stopped-while-saving"
    lab.reference(steps)
    codes = []
    for _ in range(count):
        process = lab.start(lab.command(name, steps), name)
        deadline = time.monotonic() + TIMEOUT_S
        first = newest_step(lab.folder / name)
        while process.poll() is None and time.monotonic() < deadline:
            now = newest_step(lab.folder / name)
            if now > first + 1 and list(RunPaths(lab.folder / name).checkpoints.glob(".step-*.tmp")):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.0005)
        codes.append(exit_code(process))
    verdict(lab, tally, name, steps, lab.run(lab.command(name, steps), name), len(codes))
    if wrong := [c for c in codes if c != 3]:
        tally.add("wrong", len(wrong), f"{name}: exit codes {wrong}, expected 3")
    return tally


def full_disk(lab: Lab, count: int, steps: int = 14) -> Tally:
    """Fill a small file system during the run; after space is freed, the run is resumed."""
    tally, mount = Tally(), lab.folder / "disk"
    mount.mkdir(parents=True, exist_ok=True)
    inside = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*inside, f"mount -t tmpfs none {mount}"], capture_output=True, check=False).returncode:
        tally.notes.append("not injected: no permission to mount a small file system")
        return tally
    lab.reference(steps)
    for number in range(count):
        name, left = f"full-disk-{number}", lab.rng.choice((0, 40, 400, 2000))
        when = lab.rng.randrange(2, steps - 3)
        train = " ".join(lab.command("r", steps, folder=mount))
        # A background process fills the disk except for ``left`` KiB once the checkpoint of step ``when`` exists.
        script = f"""
            mount -t tmpfs -o size=24m none {mount}
            ( while [ ! -d {mount}/r/checkpoints/step-{when:08d} ]; do sleep 0.02; done
              dd if=/dev/zero of={mount}/filler bs=1k 2>/dev/null; truncate -s -{left}k {mount}/filler ) &
            {train}; echo "first exit $?"
            ls {mount}/r/checkpoints > {lab.folder}/{name}.kept
            kill %1 2>/dev/null; rm -f {mount}/filler
            {train}; code=$?
            cp -r {mount}/r {lab.folder}/{name}; exit $code
        """
        code = lab.run([*inside, script], name)
        log = lab.log_text(name)
        kept = (lab.folder / f"{name}.kept").read_text().split() if (lab.folder / f"{name}.kept").exists() else []
        if not any(k.startswith("step-") for k in kept):
            tally.add("lost", 1, f"{name}: no checkpoint survived the full disk")
        elif "first exit 0" not in log and not one_error(log):
            tally.add("wrong", 1, f"{name}: no clear error")
        else:
            verdict(lab, tally, name, steps, code, 1)
    return tally


# -- separate clusters ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(cpus: float, *options: str) -> Iterator[tuple[str, Callable[[], subprocess.Popen[bytes]], dict[str, str]]]:
    """Start a Ray head; yield its address, a function that adds a node of 1 CPU, and environment variables for clients.

    Raises RuntimeError if the head does not answer within 90 s.
    """
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray, port = str(Path(sys.executable).parent / "ray"), free_port()
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [ray, "start", "--block", "--node-ip-address", "127.0.0.1", *arguments, *options], env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        nodes.append(process)
        return process

    start("--head", "--port", str(port), "--include-dashboard=false", f"--num-cpus={cpus:g}")
    try:
        deadline = time.monotonic() + 90
        while not _listens(port):
            if time.monotonic() > deadline:
                raise RuntimeError("the Ray head did not come up")
            time.sleep(0.2)
        time.sleep(3)
        token = {name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        yield f"127.0.0.1:{port}", lambda: start(f"--address=127.0.0.1:{port}", "--num-cpus=1"), token
    finally:
        for process in reversed(nodes):
            kill_tree(process.pid)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def lost_node(lab: Lab, count: int) -> Tally:
    """Add a node, then kill the only node that runs actors; repeat ``count`` times."""
    tally, steps, name = Tally(), 8 * count + 8, "lost-node"
    lab.reference(steps)
    with cluster(0) as (address, add_node, token):
        node = add_node()
        lab.run([sys.executable, "-c", AWAIT_CPU, address], "await", **token)
        process = lab.start(lab.command(name, steps, f"cluster.address={address}"), name, **token)
        lost = 0
        while lost < count:
            wait_for(process, lambda node=node: bool(actors(node.pid, "Learner")))
            first = newest_step(lab.folder / name)
            wait_for(process, lambda before=first: newest_step(lab.folder / name) > before)
            time.sleep(lab.rng.uniform(0.0, 2.0))
            spare = add_node()
            time.sleep(10)  # for the node to join; if that is too short, the run waits for it
            if process.poll() is not None:
                break  # the run ended first: only the nodes killed so far count
            kill_tree(node.pid)
            node, lost = spare, lost + 1
        code = exit_code(process)
    verdict(lab, tally, name, steps, code, lost)
    return tally


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


AWAIT_CPU = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
while ray.cluster_resources().get("CPU", 0) < 1:
    time.sleep(0.2)
"""
HOG = """
import sys, time, numpy as np, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
held = []
for _ in range(40):
    held.append(ray.put(np.random.default_rng(0).integers(0, 255, 10 << 20, dtype=np.uint8)))
    time.sleep(0.5)
print("full", flush=True)
time.sleep(600)
"""


def full_object_store(lab: Lab, steps: int = 40) -> Tally:
    """Let another driver on the same cluster hold five times the size of the object store."""
    tally, name = Tally(), "full-object-store"
    lab.reference(steps)
    with cluster(2, "--object-store-memory=80000000") as (address, _, token):
        hog = lab.start([sys.executable, "-c", HOG, address], "hog", **token)
        code = lab.run(lab.command(name, steps, f"cluster.address={address}"), name, **token)
        kill_tree(hog.pid)
    verdict(lab, tally, name, steps, code, 1)
    return tally


def result_of(scenario: Callable[..., Tally], *arguments: Any) -> Tally:
    """Return the outcome of ``scenario``; an exception in it counts as wrong, so that the other scenarios still run."""
    try:
        return scenario(*arguments)
    except Exception as error:
        tally = Tally()
        tally.add("wrong", 1, f"{type(error).__name__}: {error}")
        return tally
