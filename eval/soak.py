"""Run the demo for thousands of steps to see whether anything grows.

Measures the processes of a run from outside: the memory of each (unique set size), their number, their open files, and
the objects in Ray's store.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from eval.faults.processes import Lab, kill_tree
from onpolicy_skd.report import metrics_log
from onpolicy_skd.report.summary import versions
from onpolicy_skd.storage.files import RunPaths, write_text

LONG = ["run.checkpoint_every=100", "run.evaluate_every=200", "eval.during=32", "learner.lr=1e-4", "resume=never"]
INTERVAL_S = 5.0  # seconds between samples
NAMES = ("LearnerActor", "TeacherActor", "RolloutActor", "raylet", "gcs_server")


def measure(driver: psutil.Process) -> dict[str, dict[str, float]]:
    """Return memory (MiB) and open files by kind of process of a run; of several of one kind, the last one counts."""
    sample = {}
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            line = " ".join(process.cmdline())
            name = "driver" if process == driver else next((n for n in NAMES if n in line[:200]), None)
            if name:
                mib = process.memory_full_info().uss / 2**20
                sample[name] = {"mib": mib, "files": process.num_fds(), "pid": process.pid}
    sample["all"] = {"processes": len(driver.children(recursive=True)), "store_mib": _store(driver)}
    return sample


def _store(driver: psutil.Process) -> float:
    """Return the MiB of Ray's object store on this machine: the shared memory of the raylet."""
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "raylet" in process.name():
                return process.memory_info().shared / 2**20
    return 0.0


def drift(series: Sequence[float]) -> float:
    """Return the mean of the last tenth over the mean of the second tenth (after warm-up), minus 1."""
    tenth = max(1, len(series) // 10)
    first = statistics.fmean(series[tenth : 2 * tenth])
    return statistics.fmean(series[-tenth:]) / first - 1.0 if first else 0.0


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.soak") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    lab = Lab(out, args.engine, random.Random(0))
    process = lab.start(lab.command("run", args.steps, *LONG, *args.overrides), "run")
    driver, samples = psutil.Process(process.pid), []
    start = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(INTERVAL_S)
            with contextlib.suppress(psutil.NoSuchProcess):
                steps = len([r for r in metrics_log.read(RunPaths(out / "run").metrics) if "loss" in r])
                if 0 < steps < args.steps:
                    samples.append({"step": steps, "seconds": time.monotonic() - start, **measure(driver)})
    finally:
        kill_tree(process.pid)
    report = conclude(samples, args.steps, process.returncode, time.monotonic() - start)
    write_text(out / "soak.json", json.dumps(report | {"samples": samples}, indent=1) + "\n")
    plot(out / "soak.png", samples)
    print(json.dumps(report, indent=2))
    return int(not report["flat"])


def conclude(samples: Sequence[dict[str, Any]], steps: int, code: int | None, seconds: float) -> dict[str, Any]:
    """Return the growth from the second to the last tenth of ``samples``; flat means at most 5 % in each series."""
    series: defaultdict[str, list[float]] = defaultdict(list)
    pids: defaultdict[str, set[float]] = defaultdict(set)
    for sample in samples:
        for name in ("driver", *NAMES):
            if name in sample:
                series[f"{name} MiB"].append(sample[name]["mib"])
                series[f"{name} files"].append(sample[name]["files"])
                pids[name].add(sample[name]["pid"])
        series["processes"].append(sample["all"]["processes"])
        series["object store MiB"].append(sample["all"]["store_mib"])
    grown = {name: round(drift(values), 4) for name, values in series.items() if len(values) >= 20}
    last = {name: round(values[-1], 1) for name, values in series.items()}
    flat = bool(grown) and all(change <= 0.05 for name, change in grown.items())
    restarts = {name: len(distinct) - 1 for name, distinct in pids.items() if len(distinct) > 1}
    head = {"steps": steps, "exit": code, "seconds": round(seconds), "samples": len(samples)}
    return {**head, "flat": flat and code == 0, "grown": grown, "last": last, "restarts": restarts,
            "versions": versions()}  # fmt: skip


def plot(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in ("driver", *NAMES):
        points = [(s["step"], s[name]["mib"]) for s in samples if name in s]
        if points:
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axis.set(xlabel="step", ylabel="unique set size, MiB", ylim=(0, None))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
