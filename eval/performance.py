"""What the pieces cost, side by side with their peers in one run: ``python -m eval.performance loss --json FILE``.

Each variant runs in processes of its own, in turn with the others, round after round, so that a drift of the machine's
speed meets all of them.  On CPU: CPU seconds on one thread, and peak memory above what inputs and weights take.
On CUDA: device seconds and the allocator's peak, likewise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onpolicy_skd.checkpoint import write_text
from onpolicy_skd.report.summary import versions

VARIANTS = ("dense", "trl", "ours_k100", "ours_k20")
MEANING = {
    "dense": "full [N, V] logits, torch autograd",
    "trl": "TRL's chunked divergence (DistillationTrainer)",
    "ours_k100": "this project, all rows, no entropy pass",
    "ours_k20": "this project, entropy pass over all rows, loss on 20 %",
}
SHAPES = {  # name -> vocabulary, student hidden, teacher hidden, rows
    "small": (151_936, 256, 512, 512),
    "large": (151_936, 2048, 4096, 1024),
    "tiny": (600, 16, 24, 40),  # for tests
}
SEQUENCES = 8  # the rows are this many responses, for the per-sequence selection


def loss_step(variant: str, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A function that does forward and backward of reverse KL once and returns the loss."""
    hidden, head = inputs["student_hidden"], inputs["student_head"]
    other, other_head, targets = inputs["teacher_hidden"], inputs["teacher_head"], inputs["targets"]
    rows = len(hidden)

    def dense() -> Tensor:
        log_q = torch.log_softmax((hidden @ head.T).float(), -1)
        with torch.no_grad():
            log_p = torch.log_softmax((other @ other_head.T).float(), -1)
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean()

    def trl() -> Tensor:
        mask = torch.ones(1, rows, device=hidden.device)
        return chunked(hidden[None], other[None], head, other_head, mask, 1.0)[0]

    def ours(k: float) -> Tensor:
        counts = [rows // SEQUENCES] * SEQUENCES
        chosen = torch.arange(rows, device=hidden.device)
        if k < 1:
            entropy = row_statistics(hidden.detach(), head.detach(), targets).entropy_N
            chosen = top_k(entropy, counts, Context(k)).indices_K
        weights = torch.full((len(chosen),), 1 / len(chosen), device=hidden.device)
        teacher = HiddenRows(other[chosen], other_head)
        return distillation_loss(hidden[chosen], head, teacher, Rows(weights, targets[chosen]), Alignment())[0]

    if variant == "trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss as chunked
    from onpolicy_skd.divergence import Alignment, HiddenRows, Rows, distillation_loss
    from onpolicy_skd.lm_head import row_statistics
    from onpolicy_skd.selection.positions import Context, top_k

    forward = {"dense": dense, "trl": trl, "ours_k100": lambda: ours(1.0), "ours_k20": lambda: ours(0.2)}[variant]

    def step() -> Tensor:
        hidden.grad = head.grad = None
        value = forward()
        value.backward()
        return value.detach()

    return step


def make_inputs(shape: Sequence[int], device: str) -> dict[str, Tensor]:
    vocabulary, student, teacher, rows = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(dtype)

    return {
        "student_hidden": draw(rows, student).requires_grad_(),
        "student_head": draw(vocabulary, student, scale=student**-0.5).requires_grad_(),
        "teacher_hidden": draw(rows, teacher),
        "teacher_head": draw(vocabulary, teacher, scale=teacher**-0.5),
        "targets": torch.randint(0, vocabulary, (rows,), generator=generator, device=device),
    }


def measure(variant: str, shape: Sequence[int], device: str) -> dict[str, float]:
    """Seconds of one warm step and peak extra MiB, in this process."""
    torch.set_num_threads(1)
    step = loss_step(variant, make_inputs(shape, device))
    _reset_peak(device)
    resident = _memory(device, "now")
    step()  # also the warm-up; its peak is that of every later step
    peak = _memory(device, "peak")
    started = _clock(device)
    value = step()
    seconds = _clock(device) - started
    return {"seconds": seconds, "extra_mib": (peak - resident) / 2**20, "loss": value.item()}


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from VmRSS


def _memory(device: str, which: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if which == "peak" else torch.cuda.memory_allocated()
    key = {"now": "VmRSS:", "peak": "VmHWM:"}[which]
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """All variants of one shape, ``rounds`` times in turn, each in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {v: [] for v in VARIANTS}
    for number in range(rounds):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "eval.performance", "one", variant, shape, device]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{shape} round {number + 1}/{rounds} {variant}: {found[variant][-1]}", flush=True)

    def ratios(ours: str, key: str) -> dict[str, float]:
        pairs = [a[key] / b[key] for a, b in zip(found["trl"], found[ours], strict=True)]
        return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}

    spread = {
        "time_k100": ratios("ours_k100", "seconds"),
        "time_k20": ratios("ours_k20", "seconds"),
        "memory_k100": ratios("ours_k100", "extra_mib"),
        "memory_k20": ratios("ours_k20", "extra_mib"),
    }
    return {
        "shape": dict(zip(("vocabulary", "student_hidden", "teacher_hidden", "rows"), SHAPES[shape], strict=True)),
        "runs": found,
        "ratio_to_trl": {name: value["median"] for name, value in spread.items()},
        "ratio_to_trl_spread": spread,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.performance", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="the loss alone, forward and backward")
    loss.add_argument("--json", type=Path, help="file for all figures")
    loss.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "large"])
    loss.add_argument("--rounds", type=int, default=3)
    loss.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    one = commands.add_parser("one")  # one measurement, for the processes that `loss` starts
    one.add_argument("variant", choices=VARIANTS)
    one.add_argument("shape", choices=SHAPES)
    one.add_argument("device")
    args = parser.parse_args(argv)
    if args.command == "one":
        print(json.dumps(measure(args.variant, SHAPES[args.shape], args.device)))
        return 0
    shapes = {name: compare(name, args.device, args.rounds) for name in args.shapes}
    first = shapes[args.shapes[0]]
    result = {
        "benchmark": "loss",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine() + ", one thread",
        "versions": versions(),
        "ratio_to_trl": first["ratio_to_trl"],  # of the first shape; every shape's stand below
        "shapes": shapes,
    }
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']}")
        for variant in VARIANTS:
            seconds, memory = (
                statistics.median(r[key] for r in figures["runs"][variant]) for key in ("seconds", "extra_mib")
            )
            print(f"  {variant:>9}  {seconds:8.3f} s  {memory:8.0f} MiB extra   {MEANING[variant]}")
        print("  TRL's figure over ours: " + ", ".join(f"{k} {v:.2f}" for k, v in figures["ratio_to_trl"].items()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
