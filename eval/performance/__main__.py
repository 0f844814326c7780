"""Measure the time and memory of the loss, a step and whole runs, compared with TRL in the same run."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.performance import curves, end_to_end, loss, overlap, step
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.report.summary import versions
from onpolicy_skd.run.exits import run_cli
from onpolicy_skd.run.preflight import preflight
from onpolicy_skd.storage.files import write_json

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
    """Add ``--pair`` and the arguments that go with it."""
    command.add_argument(
        "--pair", nargs=2, metavar=("STUDENT", "TEACHER"), help="pretrained models (folders or hub names) on GSM8K"
    )
    command.add_argument("--data", help="with --pair: folder of train.jsonl and test.jsonl (default: the hub)")
    command.add_argument("--batch", type=int, help="with --pair: responses per step (default: 4)")
    command.add_argument("--new-tokens", type=int, help="with --pair: response length (default: 96)")


def pair_of(args: argparse.Namespace) -> end_to_end.Pair | None:
    """Return the pair that the arguments name, local folders as absolute paths; None without ``--pair``.

    Raises ConfigError for arguments that need ``--pair``, and for models or data that cannot be read.
    """
    sizes = {
        name: value for name in ("data", "batch", "new_tokens") if (value := getattr(args, name, None)) is not None
    }
    if getattr(args, "pair", None) is None:
        if sizes:
            raise ConfigError(f"--{next(iter(sizes)).replace('_', '-')} is only for --pair")
        return None
    paths = (*args.pair, args.data)
    student, teacher, data = (str(Path(p).resolve()) if p and Path(p).exists() else p for p in paths)
    pair = end_to_end.Pair(student, teacher, data, sizes.get("batch", 4), sizes.get("new_tokens", 96))
    preflight(end_to_end.settings_for(Path(tempfile.gettempdir()), pair, args.device, 1.0))
    return pair


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.performance") -> int:
    return run_cli(lambda: benchmark(argv, prog))


def benchmark(argv: Sequence[str] | None, prog: str) -> int:
    """Run one benchmark and print its figures."""
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
    pair = pair_of(args)
    names = [json.dumps(pair._asdict())] if pair else args.shapes
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
        write_json(args.json, result)
        if hasattr(module, "plot"):
            module.plot(args.json.with_suffix(".png"), shapes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
