"""Checks of whole runs with Ray: the demo, and the run on one GPU, with its engine killed, stopped and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.faults.processes import actors
from eval.gpu_check.report import Report
from onpolicy_skd.report.metrics_log import Event, events_of, read, steps_of
from onpolicy_skd.run.exits import EXIT_OK, EXIT_STOPPED

STEPS, KILL_AFTER, STOP_AFTER = 6, 2, 4
TIMEOUT_S = 600.0
DEMO = ["--config", "demo", "run.steps=20", "eval.problems=100"]
ONE_GPU = [
    "--config", "gsm8k_one_gpu", f"run.steps={STEPS}", "run.checkpoint_every=3", "run.evaluate_every=0",
    "eval.before=false", "eval.problems=32", "data.train_problems=96",
]  # fmt: skip


def check(report: Report, device: str, overrides: Sequence[str] = (), one_gpu: Sequence[str] = ONE_GPU) -> None:
    """Make the runs in a temporary folder; ``overrides`` are settings of the run on one GPU, such as model folders."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [f"run.dir={folder}", "run.trackers=[]", f"run.device={device}"]
        with report.guard("demo"):
            code, output = run([*DEMO, "run.name=demo", *common])
            check_demo(report, code, output, folder / "demo")
        with report.guard("one GPU"):
            arguments = [*one_gpu, "run.name=one", *common, *overrides]
            code, output = run_with_faults(arguments, folder / "one")
            check_stopped(report, code, output, read(folder / "one" / "metrics.jsonl"))
            code, output = run([*arguments, "resume=auto"])
            check_resumed(report, code, output, read(folder / "one" / "metrics.jsonl"))


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "onpolicy_skd.train", *arguments]


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Make a run; return its exit code and the end of its output.  Raises TimeoutExpired."""
    process = subprocess.run(command(arguments), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    return process.returncode, (process.stdout + process.stderr)[-1000:]


def run_with_faults(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    """Make a run, kill its engine after KILL_AFTER steps, and send SIGTERM after STOP_AFTER; return as ``run`` does."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        process = subprocess.Popen(command(arguments), stdout=out, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for_steps(process, folder / "metrics.jsonl", KILL_AFTER)
            for engine in actors(process.pid, "Rollout"):
                engine.kill()
            wait_for_steps(process, folder / "metrics.jsonl", STOP_AFTER)
            process.send_signal(signal.SIGTERM)
            code = process.wait(TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
        out.seek(0)
        return code, out.read()[-1000:]


def wait_for_steps(process: subprocess.Popen[str], metrics: Path, count: int) -> None:
    """Block until ``metrics`` has ``count`` steps or the run has ended.  Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and len(steps_of(read(metrics))) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {count} steps within {TIMEOUT_S:g} s")
        time.sleep(0.5)


def check_demo(report: Report, code: int, output: str, folder: Path) -> None:
    """Check the demo: it ends, engine and learner agree, and the teacher solves its task."""
    report.true("the demo ends", code == EXIT_OK, output.strip()[-200:] if code else "0", "exit code 0")
    if code:
        return
    gaps = [r["sampler_gap"] for r in steps_of(read(folder / "metrics.jsonl"))]
    report.at_most("the demo: largest gap, nats", max(gaps), 1e-3)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    report.at_least("the demo: the teacher's exact match", summary["exact_match"]["teacher"], 0.98)


def check_stopped(report: Report, code: int, output: str, records: Sequence[dict[str, Any]]) -> None:
    """Check the run with faults: it stopped with a checkpoint, the engine was restarted, each step's gap is small."""
    report.true(
        "one GPU: stopped with a checkpoint", code == EXIT_STOPPED, output.strip()[-200:] or str(code), "exit 3"
    )
    steps = steps_of(records)
    if not steps:
        return
    report.at_most("one GPU: largest gap, nats", max(r.get("sampler_gap") or 0.0 for r in steps), 0.03)
    restarted = [role for r in events_of(records, Event.FAULT) for role in r["restarted"]]
    report.true(
        "one GPU: the engine came back", "rollout" in restarted, ", ".join(restarted) or "no", "a rollout restart"
    )
    for name in steps[-1]["seconds"]:
        report.note(f"one GPU: {name}, seconds", steps[-1]["seconds"][name])
    report.note("one GPU: learner, GB", max(r.get("learner_memory_mib") or 0.0 for r in steps) * 2**20 / 1e9)


def check_resumed(report: Report, code: int, output: str, records: Sequence[dict[str, Any]]) -> None:
    """Check that the resumed run ended, and that no step was made twice."""
    report.true("one GPU: resumed to its end", code == EXIT_OK, output.strip()[-200:] if code else "0", "exit code 0")
    steps = [r["step"] for r in steps_of(records)]
    report.true("one GPU: each step once", steps == list(range(STEPS)), str(steps), f"0 to {STEPS - 1}")
