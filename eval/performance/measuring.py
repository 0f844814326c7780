"""Clocks, memory, and variants measured in turn, each in processes of its own.

On CPU: CPU seconds (one thread) and resident memory.  On CUDA: device seconds and the allocator's memory.
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
    """Seconds; only differences mean anything."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def reset_peak(device: str) -> None:
    """The peak starts again from what is in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from VmRSS


def memory(device: str, which: str) -> float:
    """MiB in use ``now``, or at the ``peak`` since ``reset_peak``."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if which == "peak" else torch.cuda.memory_allocated()) / 2**20
    key = {"now": "VmRSS:", "peak": "VmHWM:"}[which]
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def in_turn(benchmark: str, variants: Sequence[str], arguments: Sequence[str], rounds: int) -> Runs:
    """Every variant, one after the other, ``rounds`` times: a drift of the machine's speed meets all of them."""
    found: Runs = {v: [] for v in variants}
    for number in range(rounds):
        for variant in variants:
            command = [sys.executable, "-m", "eval.performance", "one", benchmark, variant, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{benchmark} {variant} failed:\n{done.stderr}")
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{benchmark} {' '.join(arguments)} round {number + 1}/{rounds} {variant}: {found[variant][-1]}",
                flush=True,
            )
    return found


def ratio(over: list[dict[str, Any]], under: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Median and spread of the rounds' ratios of ``key``."""
    pairs = [a[key] / b[key] for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
