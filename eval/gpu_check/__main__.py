"""Check the GPU path in about ten minutes; print a table and write a JSON file.

Parts: ``machine`` (driver, compiler, shared memory), ``mathematics`` (loss, steps, checkpoints, kernels, memory; needs
only torch and transformers), ``engine`` (vLLM compared with the learner) and ``runs`` (Ray: the demo; the run on one
GPU, with a killed engine, stopped and resumed).  Each stage is a separate process; the first that fails ends the check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from eval.gpu_check import mathematics
from eval.gpu_check.machine import check as check_machine
from eval.gpu_check.report import FAILED, Report, Result, as_json, table
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, parse_override
from onpolicy_skd.storage.files import write_json

STAGES = ("machine", "mathematics", "engine", "runs")
WITHOUT_VLLM = ("machine", "mathematics")
CONFIG = Path("gsm8k_one_gpu")


def run_stage(stage: str, args: argparse.Namespace) -> list[Result]:
    """Run a stage in this process."""
    report = Report(stage)
    disable_progress_bar()
    print(f"\n{stage}", flush=True)
    with report.guard(stage):
        if stage == "machine":
            check_machine(report, args.device, not args.without_vllm)
        elif stage == "mathematics":
            mathematics.check(report, args.device, args.small)
        elif stage == "engine":
            from eval.gpu_check import engine

            engine.check(report, args.device, args.model, *((12, 4) if args.small else ()))
        else:
            from eval.gpu_check import runs

            runs.check(report, args.device, args.overrides)
    return report.results


def run_separately(stage: str, arguments: Sequence[str]) -> list[Result]:
    """Run a stage in a separate process, which frees the GPU when it ends; a process that dies is a failed check."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stage.json"
        command = [sys.executable, "-m", "eval.gpu_check", *arguments, "--stage", stage, "--json", str(file)]
        process = subprocess.run(command, check=False)
        if not file.exists():
            return [Result(stage, f"the process of {stage}", FAILED, f"exit code {process.returncode}", "it ends")]
        return [Result(**r) for r in json.loads(file.read_text(encoding="utf-8"))["results"]]


def student_model(overrides: Sequence[str]) -> str:
    """Return ``student.model`` of the run on one GPU.  Raises ConfigError for a wrong override."""
    return build_settings(CONFIG, [parse_override(text) for text in overrides]).student.model


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.gpu_check") -> int:
    """Run the checks; return 0 if all passed, 1 if one failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--without-vllm", action="store_true", help=f"only {' and '.join(WITHOUT_VLLM)}")
    parser.add_argument("--stage", choices=STAGES, help="only this stage, in this process")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: what can be checked there")
    parser.add_argument("--small", action="store_true", help="without the shapes of real models")
    parser.add_argument("--model", help="student of the stage engine (default: student.model of the run on one GPU)")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu_check.json"), help="file for all results")
    parser.add_argument(
        "overrides", nargs="*", help="settings KEY=VALUE of the run on one GPU, e.g. student.model=FOLDER"
    )
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_intermixed_args(given)
    try:
        args.model = args.model or student_model(args.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available() and args.stage not in (None, "machine"):
        print(f"error: --device cuda: torch {torch.__version__} sees no CUDA device; accepted: cpu", file=sys.stderr)
        return 2
    results: list[Result] = []
    if args.stage:
        results = run_stage(args.stage, args)
    else:
        for stage in WITHOUT_VLLM if args.without_vllm else STAGES:
            results += run_separately(stage, given)
            if any(r.status == FAILED for r in results):
                break
    write_json(args.json, {"device": args.device, "results": as_json(results)})
    if not args.stage:
        print("\n" + table(results))
    failed = [r.name for r in results if r.status == FAILED]
    print(f"\n{len(failed)} failed: {', '.join(failed)}" if failed else "\nall checks passed", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
