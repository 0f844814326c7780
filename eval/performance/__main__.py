"""Measure the time and memory of the loss, a step and whole runs, compared with TRL in the same run."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.performance import curves, end_to_end, loss, overlap, step
from onpolicy_skd.report.summary import versions
from onpolicy_skd.storage.files import write_text

BENCHMARKS: dict[str, Any] = {
    "loss": loss,
    "step": step,
    "end-to-end": end_to_end,
    "curves": curves,
    "overlap": overlap,
}
HELP = {
    "loss": "the loss alone, forward and backward",
    "step": "an on-policy step by phase, over the work that no step can avoid",
    "curves": "the loss along rows, share of positions, vocabulary; with a plot next to the JSON file",
    "overlap": "steps with sequential and with overlapping phases, over the longest phase",
    "end-to-end": "on-policy steps, generation to optimizer, compared with TRL's DistillationTrainer",
}


def add_pair_arguments(command: argparse.ArgumentParser) -> None:
    """Add ``--pair`` and what it reads."""
    command.add_argument(
        "--pair", nargs=2, metavar=("STUDENT", "TEACHER"), help="pretrained models (folders or hub names) on GSM8K"
    )
    command.add_argument("--data", help="with --pair: folder of train.jsonl and test.jsonl (default: the hub)")
    command.add_argument("--batch", type=int, default=4, help="with --pair: responses per step (default: 4)")
    command.add_argument("--new-tokens", type=int, default=96, help="with --pair: response length (default: 96)")


def pair_of(args: argparse.Namespace) -> end_to_end.Pair:
    """Return the pair that the arguments name; local folders as absolute paths."""
    student, teacher, data = (str(Path(p).resolve()) if p and Path(p).exists() else p for p in (*args.pair, args.data))
    return end_to_end.Pair(student, teacher, data, args.batch, args.new_tokens)


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.performance") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, help=HELP[name])
        command.add_argument("--json", type=Path, help="file for all figures")
        command.add_argument("--shapes", nargs="+", choices=module.SHAPES, default=list(module.DEFAULT))
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        if module is end_to_end:
            add_pair_arguments(command)
    single = commands.add_parser("measure")  # a single measurement, for the subprocesses of the other commands
    for name in ("benchmark", "variant", "shape", "device"):
        single.add_argument(name)
    args = parser.parse_args(argv)
    if args.command == "measure":
        print(json.dumps(BENCHMARKS[args.benchmark].measure(args.variant, args.shape, args.device)))
        return 0
    module = BENCHMARKS[args.command]
    names = [json.dumps(pair_of(args)._asdict())] if getattr(args, "pair", None) else args.shapes
    shapes = {name: module.compare(name, args.device, args.rounds) for name in names}
    first = shapes[names[0]]
    result = {
        "benchmark": args.command,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine() + ", one thread",
        "versions": versions(),
        **{key: first[key] for key in ("ratio_to_trl", "step_over_unavoidable") if key in first},
        "shapes": shapes,
    }
    module.show(shapes)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps(result, indent=2) + "\n")
        if hasattr(module, "plot"):
            module.plot(args.json.with_suffix(".png"), shapes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
