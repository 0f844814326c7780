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
from eval.gpu_bench import SHAPES, predicted_gb
from eval.gpu_check.report import Report
from onpolicy_skd.config.loading import load_settings
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models import loading
from onpolicy_skd.report.metrics_log import Event, events_of, read, steps_of
from onpolicy_skd.run.exits import EXIT_OK, EXIT_STOPPED
from onpolicy_skd.storage.files import RunPaths

STEPS, KILL_AFTER, STOP_AFTER = 6, 2, 4
TIMEOUT_S = 600.0
SYNC_S = 5.0  # seconds of a weight update through the GPU's memory; less than one is usual at 1.7B
FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]  # of a model, for transformers and vLLM
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
            check_demo(report, code, output, RunPaths(folder / "demo"))
        with report.guard("one GPU"):
            arguments, metrics = [*one_gpu, "run.name=one", *common, *overrides], RunPaths(folder / "one").metrics
            cfg = load_settings(arguments)
            for model in (cfg.student.model, cfg.teacher.model):
                fetch(model)
            code, output = run_with_faults(arguments, metrics)
            check_stopped(report, code, output, read(metrics))
            if device == "cuda":
                check_costs(report, read(metrics), memory_bound(cfg))
            code, output = run([*arguments, "resume=auto"])
            check_resumed(report, code, output, read(metrics))


def fetch(model: str) -> None:
    """Check that the folder ``model`` has weights, or download the hub model.  Raises ModelError."""
    loading.check_weights(model)
    if Path(loading.resolve_path(model)).is_dir():
        return
    from huggingface_hub import snapshot_download

    print(f"{model}: fetching what the Hugging Face cache lacks, without a time limit", flush=True)
    snapshot_download(model, allow_patterns=FILES)


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "onpolicy_skd.train", *arguments]


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Make a run; return its exit code and the end of its output.  Raises TimeoutExpired."""
    process = subprocess.run(command(arguments), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    return process.returncode, (process.stdout + process.stderr)[-1000:]


def run_with_faults(arguments: Sequence[str], metrics: Path) -> tuple[int, str]:
    """Make a run, kill its engine after KILL_AFTER steps, and send SIGTERM after STOP_AFTER; return as ``run`` does."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        process = subprocess.Popen(command(arguments), stdout=out, stderr=subprocess.STDOUT, text=True)
        try:
            wait_for_steps(process, metrics, KILL_AFTER)
            for engine in actors(process.pid, "Rollout"):
                engine.kill()
            wait_for_steps(process, metrics, STOP_AFTER)
            process.send_signal(signal.SIGTERM)
            code = process.wait(TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
        out.seek(0)
        return code, out.read()[-1000:]


def wait_for_steps(process: subprocess.Popen[Any], metrics: Path, count: int) -> None:
    """Block until ``metrics`` has ``count`` steps or the run has ended.  Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and len(steps_of(read(metrics))) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {count} steps within {TIMEOUT_S:g} s, models on disk")
        time.sleep(0.5)


def check_demo(report: Report, code: int, output: str, paths: RunPaths) -> None:
    """Check the demo: it ends, engine and learner agree, and the teacher solves its task."""
    report.true("the demo ends", code == EXIT_OK, output.strip()[-200:] if code else "0", "exit code 0")
    if code:
        return
    gaps = [r["sampler_gap"] for r in steps_of(read(paths.metrics))]
    bound = load_settings(DEMO).sync.max_gap  # attention of float32 on a GPU multiplies in TF32
    report.at_most("the demo: largest gap, nats", max(gaps), bound)
    summary = json.loads(paths.summary.read_text(encoding="utf-8"))
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


def memory_bound(cfg: Settings) -> float | None:
    """Return the most GB that the learner of a run should take; None unless the student has Qwen3-1.7B's shape."""
    shape, student = SHAPES["qwen3"], loading.load_config(cfg.student.model).get_text_config()
    if (student.vocab_size, student.hidden_size, student.num_hidden_layers) != (
        shape.vocabulary, shape.student, shape.layers,
    ):  # fmt: skip
        return None
    tokens, recomputed = cfg.learner.tokens_per_micro_batch, cfg.student.activation_checkpointing
    return predicted_gb(shape, tokens, cfg.positions.k, recomputed) + 3


def check_costs(report: Report, records: Sequence[dict[str, Any]], bound: float | None) -> None:
    """Check the learner's peak memory and the seconds of a weight update, on a GPU."""
    steps = steps_of(records)
    if not steps:
        return
    peak = max(r.get("learner_memory_mib") or 0.0 for r in steps) * 2**20 / 1e9
    if bound is None:
        report.note("one GPU: learner, GB", peak)
    else:
        report.at_most("one GPU: learner, GB", peak, bound)
    if updates := [r["seconds"]["sync"] for r in steps[1:]]:  # the engine started with the first step's weights
        report.at_most("one GPU: fastest weight update, seconds", min(updates), SYNC_S)


def check_resumed(report: Report, code: int, output: str, records: Sequence[dict[str, Any]]) -> None:
    """Check that the resumed run ended, and that no step was made twice."""
    report.true("one GPU: resumed to its end", code == EXIT_OK, output.strip()[-200:] if code else "0", "exit code 0")
    steps = [r["step"] for r in steps_of(records)]
    report.true("one GPU: each step once", steps == list(range(STEPS)), str(steps), f"0 to {STEPS - 1}")
