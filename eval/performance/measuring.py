"""Clocks, memory, and variants measured alternately, each in a separate process.

CPU: CPU seconds of one thread, resident memory.  CUDA: device seconds, memory of the allocator.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Runs = dict[str, list[dict[str, Any]]]


def clock(device: str) -> float:
    """Return the seconds since an arbitrary start: wall time on CUDA, this process's CPU time otherwise."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def reset_peak(device: str) -> None:
    """Reset the peak to the memory in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to VmRSS


def memory(device: str, which: str) -> float:
    """Return MiB in use ``now``, or at the ``peak`` since ``reset_peak``."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if which == "peak" else torch.cuda.memory_allocated()) / 2**20
    key = {"now": "VmRSS:", "peak": "VmHWM:"}[which]
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def run_alternately(benchmark: str, variants: Sequence[str], arguments: Sequence[str], rounds: int) -> Runs:
    """Measure the variants alternately for ``rounds`` rounds, so that a drift of the machine's speed affects all.

    Raises RuntimeError with the process's error output if a measurement fails.
    """
    runs: Runs = {v: [] for v in variants}
    for number in range(rounds):
        for variant in variants:
            command = [sys.executable, "-m", "onpolicy_skd.cli", "perf", "measure", benchmark, variant, *arguments]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                raise RuntimeError(f"{benchmark} {variant} failed:\n{process.stderr}")
            figures = json.loads(process.stdout.splitlines()[-1])
            runs[variant].append(figures)
            print(f"{benchmark} {' '.join(arguments)} round {number + 1}/{rounds} {variant}: {figures}", flush=True)
    return runs


def ratio(over: list[dict[str, Any]], under: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Return median, minimum and maximum over rounds of ``over[key] / under[key]``."""
    pairs = [a[key] / b[key] for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
