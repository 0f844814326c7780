"""Measure the learner at the shapes of Qwen3-1.7B <- Qwen3-8B on one GPU: the loss alone, steps, memory, whole runs.

Weights are random and the vocabulary has its real size, so no models are needed: torch and transformers suffice.  TRL
and Liger are compared if they are installed.  ``--run`` adds steps of a shipped config with vLLM and real models.  The
results are written after each section, as a JSON file and as a page with estimates; a failure is recorded with its
error.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.performance.loss import loss_step, make_inputs
from eval.performance.measuring import memory, reset_peak
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.models.split_model import SplitModel, split
from onpolicy_skd.report.metrics_log import read, steps_of
from onpolicy_skd.storage.files import RunPaths, write_text
from onpolicy_skd.teacher.teacher import NoTeacher, RowRequest
from onpolicy_skd.tracing import Span
from onpolicy_skd.types import Trajectory

LOSSES = ("dense", "trl", "liger", "ours_k100", "ours_k20", "ours_k5")
SHARES = {"ours_k100": 1.0, "ours_k20": 0.2, "ours_k5": 0.05}
PROMPT = 128  # tokens of each prompt
MIB = 2**20
# Dense bfloat16 FLOP/s, and bytes/s of memory, by the exact name: PCIe, NVL and GH200 cards have other rates.
NOMINAL = {
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
}
BACKBONE = ("backbone", "backward")  # the backbone's spans: the loss forms its gradients in its forward pass


class Shape(NamedTuple):
    vocabulary: int
    student: int  # hidden size
    teacher: int
    layers: int
    heads: int
    rows: int  # of the loss, when measured alone
    responses: int  # tokens of each response of a step
    tokens: tuple[int, ...]  # sizes of a micro-batch


SHAPES = {
    "qwen3": Shape(151_936, 2048, 4096, 28, 16, 8192, 512, (2048, 8192, 16_384)),
    "toy": Shape(512, 64, 96, 2, 2, 80, 32, (320, 640)),
}


# -- the card --------------------------------------------------------------------------------------------------------


def card(device: str) -> dict[str, Any]:
    """Return the device's name and memory, and the measured rates of a large matrix product and a large copy."""
    size = 8192 if device == "cuda" else 256
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product, copy = seconds_of(lambda: a @ b, device), seconds_of(a.clone, device)
    reached = {"flops": 2 * size**3 / product, "bytes_per_second": 2 * a.numel() * a.element_size() / copy}
    if device != "cuda":
        return {"name": "cpu", "torch": torch.__version__, "reached": reached}
    properties = torch.cuda.get_device_properties(0)
    nominal = NOMINAL.get(properties.name)
    record = {"name": properties.name, "gb": properties.total_memory / 1e9, "torch": torch.__version__}
    record |= {"cuda": torch.version.cuda, "reached": reached}
    return record | ({"nominal": dict(zip(reached, nominal, strict=True))} if nominal else {})


def seconds_of(action: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """Return the seconds of the fastest of ``repeats`` calls after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        start = wall(device)
        action()
        times.append(wall(device) - start)
    return min(times[1:])


def wall(device: str) -> float:
    """Return the time in seconds, once the device has finished all work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(action: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """Return what ``action`` returns and its peak of additional memory in units of 1e9 bytes.

    If it fails, return ``error`` alone, so that the other rows are still measured.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
    before = memory(device, "now")
    result = attempted(action)
    return result if "error" in result else result | {"extra_gb": (memory(device, "peak") - before) * MIB / 1e9}


def attempted(action: Callable[[], Any]) -> Any:
    """Return what ``action`` returns, or a mapping with the first line of its error as ``error``."""
    try:
        return action()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # such as an import of TRL, a Triton kernel, or cuBLAS without memory
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__}


# -- the loss alone --------------------------------------------------------------------------------------------------


def losses(shape: Shape, device: str) -> dict[str, dict[str, Any]]:
    """Measure forward and backward of each loss over the same rows."""
    inputs = make_inputs((shape.vocabulary, shape.student, shape.teacher, shape.rows), device)
    results = {}
    for name in LOSSES:
        package = {"trl": "trl", "liger": "liger_kernel"}.get(name)
        if package and importlib.util.find_spec(package) is None:
            results[name] = {"error": "not installed"}
            continue
        results[name] = measured(lambda name=name: _loss_figures(name, inputs, device), device)
        results[name] |= {"flops": loss_flops(shape, name), "least_bytes": loss_bytes(shape, name)}
        inputs["student_hidden"].grad = inputs["student_head"].grad = None
    return results


def _loss_figures(name: str, inputs: dict[str, Tensor], device: str) -> dict[str, float]:
    variant = "ours" if name in SHARES else name
    step = liger_step(inputs) if name == "liger" else loss_step(variant, inputs, SHARES.get(name, 1.0))
    return {"ms": 1e3 * seconds_of(step, device)}


def liger_step(inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a step of Liger's fused linear JSD at its reverse KL."""
    LigerFusedLinearJSD: Any = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=1.0)
    hidden, head = inputs["student_hidden"], inputs["student_head"]

    def step() -> Tensor:
        hidden.grad = head.grad = None
        value = fused(hidden, head, inputs["teacher_hidden"], inputs["teacher_head"])
        value.backward()
        return value.detach()

    return step


def loss_flops(shape: Shape, name: str) -> float:
    """Return the FLOPs of the matrix products: logits of both models, two gradients, and for k < 1 the entropy pass."""
    rows = SHARES.get(name, 1.0) * shape.rows
    once = 2.0 * shape.vocabulary
    entropy = once * shape.rows * shape.student if SHARES.get(name, 1.0) < 1 else 0.0
    return entropy + once * rows * (3 * shape.student + shape.teacher)


def loss_bytes(shape: Shape, name: str) -> float:
    """Return the least bytes that must move, with products in bfloat16 and logits in float32.

    Counts both heads and the gradient of the student's; the logits of both models and their bfloat16 gradient, each
    written and read once; and for k < 1 the logits of the entropy pass.
    """
    rows, full = SHARES.get(name, 1.0) * shape.rows, shape.rows if SHARES.get(name, 1.0) < 1 else 0
    heads = 2 * shape.vocabulary * (2 * shape.student + shape.teacher)
    return heads + 4 * shape.vocabulary * (2 * full + 5 * rows)


# -- steps of the learner --------------------------------------------------------------------------------------------


class RandomTeacher(NoTeacher):
    """A teacher whose rows are noise: it costs only its LM head and the rows."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.randn(shape.vocabulary, shape.teacher, device=device).to(dtype).div_(shape.teacher**0.5)
        self._head = LMHead(weight)

    def rows(self, request: RowRequest) -> Tensor:
        count = sum(len(positions) for _, positions in request)
        return torch.randn(count, self._head.shape[1], device=self._head.device).to(self._head.dtype)


def random_student(shape: Shape, device: str) -> SplitModel:
    """Return a Qwen3 model of the shape, in float32, with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.student, intermediate_size=3 * shape.student,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=max(1, shape.heads // 2),
        head_dim=shape.student // shape.heads, tie_word_embeddings=True, max_position_embeddings=40_960,
    )  # fmt: skip
    with torch.device(device):
        return split(Qwen3ForCausalLM(config).float(), shape.vocabulary)


def random_batch(shape: Shape, tokens: int, version: int) -> list[Trajectory]:
    """Return trajectories of equal length that fill a micro-batch of ``tokens``."""
    rng, length = np.random.default_rng(version), shape.responses
    prompt = min(PROMPT, length)
    return [
        Trajectory(
            f"t{i}", rng.integers(2, shape.vocabulary, prompt), rng.integers(2, shape.vocabulary, length),
            np.zeros(length, np.float32), "length", version,
        )
        for i in range(max(1, tokens // (prompt + length)))
    ]  # fmt: skip


def learner_step(
    shape: Shape,
    tokens: int,
    device: str,
    k: float = 0.2,
    checkpointing: bool = False,
    dtype: str = "auto",
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure a warm step of the learner with one micro-batch of ``tokens``.

    The backbone's rate is 6 FLOPs per weight and token over the seconds of its forward and backward alone.  The
    ``computed`` rate also counts the second forward of recomputed activations.
    """
    cfg = resolve(
        {
            "data": {"source": "demo"}, "sync": {"max_gap": 1e9}, "positions": {"k": k},
            "run": {"device": device, "timeline": 2}, "student": {"activation_checkpointing": checkpointing},
            "learner": {"compute_dtype": dtype, "tokens_per_micro_batch": max(tokens, 2048), "compile": compiled},
        }
    )  # fmt: skip

    def action() -> dict[str, Any]:
        teacher_type = torch.bfloat16 if device == "cuda" else torch.float32
        student = random_student(shape, device)
        learner = Learner(student, RandomTeacher(shape, device, teacher_type), cfg, 0, 10)
        batches = [random_batch(shape, tokens, version) for version in range(3)]
        parameters = sum(p.numel() for p in student.model.parameters())
        backbone = parameters - student.model.get_input_embeddings().weight.numel()
        seconds = []
        for batch in batches:
            learner.spans.drain()
            start = wall(device)
            learner.step(batch)
            seconds.append(wall(device) - start)
        spans = learner.spans.drain()  # of step 2, whose ends wait for the GPU because of run.timeline
        count = sum(t.length for t in batches[0])
        figures = {"tokens": count, "seconds": min(seconds[1:]), "parameters": parameters}
        return figures | backbone_figures(6 * backbone * count, spans, checkpointing)

    case = {"tokens": tokens, "k": k, "checkpointing": checkpointing, "compiled": compiled}
    return case | measured(action, device)


def backbone_figures(flops: float, spans: Iterable[Span], recomputed: bool) -> dict[str, float]:
    """Return the seconds in ``spans`` of the backbone's forward and backward, and its rates."""
    seconds = sum(s.end - s.start for s in spans if s.name in BACKBONE)
    rate = flops / seconds
    return {
        "backbone_flops": flops,
        "backbone_seconds": seconds,
        "backbone_flops_per_second": rate,
        "computed_flops_per_second": rate * (8 / 6 if recomputed else 1),
    }


def predicted_gb(shape: Shape, tokens: int, k: float, checkpointing: bool) -> float:
    """Estimate the peak memory of a step, in units of 1e9 bytes.

    Counts weights, gradient and moments; both heads in bfloat16; a chunk of logits; activations.
    """
    head, layer = shape.vocabulary * shape.student, 12 * shape.student**2  # grouped attention 3, three MLP matrices 9
    parameters = head + shape.layers * layer
    positions = k * tokens * shape.responses / (shape.responses + min(PROMPT, shape.responses))
    chunk = min(positions, 400e6 / shape.vocabulary) * shape.vocabulary * 16
    kept = 4 * shape.student * tokens * shape.layers + 90 * shape.student * tokens  # inputs of layers, and one layer
    activations = kept if checkpointing else 58 * shape.student * tokens * shape.layers
    return (16 * parameters + 2 * shape.vocabulary * shape.teacher + 2 * head + chunk + activations) / 1e9


def steps(shape: Shape, device: str) -> list[dict[str, Any]]:
    """Measure steps by tokens, by share of positions, with recomputed activations, and with compiled layers."""
    middle = shape.tokens[len(shape.tokens) // 2]
    cases = [(tokens, 0.2, recomputed, False) for tokens in shape.tokens for recomputed in (False, True)]
    cases += [(middle, k, False, False) for k in (0.05, 1.0)]
    cases += [(middle, 0.2, recomputed, True) for recomputed in (False, True)]
    results = []
    for tokens, k, recomputed, compiled in cases:
        result = learner_step(shape, tokens, device, k, recomputed, compiled=compiled)
        results.append(result | {"predicted_gb": predicted_gb(shape, tokens, k, recomputed)})
        print(
            f"step of {tokens} tokens, k={k:g}, activations recomputed: {recomputed}, layers compiled: {compiled}: "
            f"{_line(result)}",
            flush=True,
        )
    return results


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    rate = result["backbone_flops_per_second"] / 1e12
    return f"{result['seconds']:.3g} s, {rate:.3g} TFLOP/s in the backbone, {result['extra_gb']:.3g} GB"


# -- whole runs ------------------------------------------------------------------------------------------------------


def whole_run(config: str, overrides: Sequence[str], count: int = 6) -> dict[str, Any]:
    """Run ``count`` steps of a shipped config with vLLM; return seconds by phase and tokens per second.

    Raises RuntimeError with the last line of its output if the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "--config", config, f"run.dir={folder}", "run.name=bench", f"run.steps={count}", "run.trackers=[]",
            "run.checkpoint_every=0", "run.evaluate_every=0", "eval.before=false", "eval.teacher=false",
            "eval.problems=1", *overrides,
        ]  # fmt: skip
        command = [sys.executable, "-m", "onpolicy_skd.train", *arguments]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            output = (process.stderr or process.stdout).strip()
            print(output[-2000:], file=sys.stderr)
            raise RuntimeError(f"exit code {process.returncode}: {output.rpartition(chr(10))[2]}")
        return run_figures(read(RunPaths(Path(folder) / "bench").metrics))


def run_figures(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return means over all steps of a run but the first: seconds by phase, generated tokens per second, sampler gap.

    Tokens per second are over whole steps: where phases overlap, ``rollout`` is only what the driver waits.  The
    learner's memory is the maximum, in units of 1e9 bytes.
    """
    warm = steps_of(records)[1:]
    phases = {name: float(np.mean([r["seconds"][name] for r in warm])) for name in warm[0]["seconds"]}
    generated = np.mean([r["response_tokens"] * r["generated"] for r in warm])
    gaps = [r["sampler_gap"] for r in warm if r.get("sampler_gap") is not None]
    return {
        "steps": len(warm),
        "seconds": phases,
        "tokens_per_second": float(generated) / phases["step"],
        "learner_memory_gb": max(r.get("learner_memory_mib") or 0.0 for r in warm) * MIB / 1e9,
        "sampler_gap": float(np.mean(gaps)) if gaps else None,
    }


# -- results ---------------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """Return the sections measured so far as Markdown, next to estimates and the device's peak rates."""
    reached = result["card"]["reached"]
    peaks = result["card"].get("nominal", reached)
    lines = [
        f"# {result['shape']} on {result['card']['name']}, torch {result['card']['torch']}", "",
        f"Measured: a large product {reached['flops'] / 1e12:.3g} TFLOP/s, a copy "
        f"{reached['bytes_per_second'] / 1e12:.3g} TB/s. Shares are of "
        f"{peaks['flops'] / 1e12:.3g} TFLOP/s and {peaks['bytes_per_second'] / 1e12:.3g} TB/s.",
    ]  # fmt: skip
    sections = {
        "losses": (f"The loss alone, {result['rows']} rows", lambda rows: _loss_lines(rows, peaks)),
        "steps": ("A step of the learner", lambda rows: _step_lines(rows, peaks)),
        "run": ("Steps of a whole run", _run_lines),
    }
    for name, (title, lines_of) in sections.items():
        if name in result:
            body = [result[name]["error"]] if "error" in result[name] else lines_of(result[name])
            lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _loss_lines(rows: dict[str, dict[str, Any]], peaks: dict[str, float]) -> list[str]:
    lines = ["| loss | ms | extra GB | share of arithmetic | share of bandwidth, at least |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "ms" not in row:
            lines.append(f"| {name} | {row['error']} | | | |")
            continue
        seconds = row["ms"] / 1e3
        arithmetic, moved = row["flops"] / seconds / peaks["flops"], row["least_bytes"] / seconds
        share = moved / peaks["bytes_per_second"]
        lines.append(f"| {name} | {row['ms']:.4g} | {row['extra_gb']:.3g} | {arithmetic:.0%} | {share:.0%} |")
    return lines


def _step_lines(rows: list[dict[str, Any]], peaks: dict[str, float]) -> list[str]:
    lines = [
        "Backbone: forward and backward at 6 FLOPs per weight and token; computed: with the second forward of "
        "recomputed activations.", "",
        "| tokens | k | activations recomputed | layers compiled | seconds | in the backbone | backbone TFLOP/s "
        "| share | computed TFLOP/s | extra GB | estimated GB |", "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        chosen = " | ".join("yes" if row[name] else "no" for name in ("checkpointing", "compiled"))
        first = f"| {row['tokens']} | {row['k']:g} | {chosen} |"
        if "error" in row:
            lines.append(f"{first} {row['error']} | | | | | | {row['predicted_gb']:.3g} |")
            continue
        rate, computed = row["backbone_flops_per_second"], row["computed_flops_per_second"]
        lines.append(
            f"{first} {row['seconds']:.3g} | {row['backbone_seconds']:.3g} | {rate / 1e12:.3g} | "
            f"{rate / peaks['flops']:.0%} | {computed / 1e12:.3g} | {row['extra_gb']:.3g} | {row['predicted_gb']:.3g} |"
        )
    return lines


def _run_lines(run: dict[str, Any]) -> list[str]:
    phases = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in run["seconds"].items())
    return [
        f"{run['config']}, mean of {run['steps']} steps: {phases}; {run['tokens_per_second']:.4g} generated tokens/s; "
        f"learner {run['learner_memory_gb']:.3g} GB; sampler gap {run['sampler_gap']} nats."
    ]


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.gpu_bench") -> int:
    """Measure all sections; return 0, 1 if one failed as a whole, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_bench.json"), help="JSON file; a page next to it")
    parser.add_argument("--run", metavar="CONFIG", help="also measure whole steps of this config: gsm8k_one_gpu")
    parser.add_argument("overrides", nargs="*", help="with --run: settings KEY=VALUE, for example student.model=FOLDER")
    args = parser.parse_intermixed_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"error: --device cuda: torch {torch.__version__} sees no CUDA device; accepted: cpu", file=sys.stderr)
        return 2
    shape = SHAPES[args.shape]
    result: dict[str, Any] = {"card": card(args.device), "shape": args.shape, "rows": shape.rows}
    sections: dict[str, Callable[[], Any]] = {
        "losses": lambda: losses(shape, args.device),
        "steps": lambda: steps(shape, args.device),
    }
    if args.run:
        sections["run"] = lambda: {"config": args.run} | whole_run(args.run, args.overrides)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in sections.items():
        result[name] = attempted(measure)
        write_text(args.out, json.dumps(result, indent=2) + "\n")
        write_text(args.out.with_suffix(".md"), page(result))
    print(page(result))
    return int(any("error" in result[name] for name in sections))


if __name__ == "__main__":
    sys.exit(main())
