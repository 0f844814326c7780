"""Measure exact match on GSM8K or data with its answer format.

With ``--out FOLDER`` answers are written as they come, and the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, parse_override
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.evaluate import RULES
from onpolicy_skd.evaluation.record_file import RECORDS
from onpolicy_skd.report.summary import percent
from onpolicy_skd.storage.files import config_beside


def settings_for(model: str, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Return settings with ``model`` as the student; a model in a run folder uses that run's config.yaml."""
    file = config or config_beside(model)
    return build_settings(file, [parse_override(text) for text in [*overrides, f"student.model={model}"]])


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.gsm8k") -> int:
    """Run the command line and return the exit code: 0 for success, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Measure exact match on GSM8K or data with its answer format."
    )
    parser.add_argument("--model", required=True, help="folder (runs/NAME/final), hub name, or bundled:NAME")
    parser.add_argument("--config", type=Path, help="settings file (default: config.yaml next to the model)")
    parser.add_argument("--problems", type=int, default=0, help="only the first N problems (default: all)")
    parser.add_argument(
        "--samples", type=int, default=1, help="answers per problem, for avg@N and pass@k; 1 is greedy (default: 1)"
    )
    parser.add_argument("--temperature", type=float, default=None, help="default: 0 for one sample, else 1")
    parser.add_argument("--out", type=Path, help="folder for records.jsonl and result.json; continues what it holds")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for skd train")
    args = parser.parse_args(argv)
    try:
        if args.samples < 1 or args.problems < 0:
            raise ConfigError("--samples must be at least 1 and --problems at least 0")
        return _run(args, settings_for(args.model, args.config, args.overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, settings: Settings) -> int:
    from onpolicy_skd.run.evaluate import evaluate

    show(
        evaluate(
            args.model, settings, problems=args.problems or None, samples=args.samples, temperature=args.temperature,
            out=args.out, log=functools.partial(print, flush=True),
        ).result
    )  # fmt: skip
    if args.out:
        print(f"records: {args.out / RECORDS}")
    return 0


def show(result: dict[str, Any]) -> None:
    """Print shares with their 95 % intervals: avg@N and pass@k for several samples."""
    samples = result["samples"]
    for rule in RULES:
        print(f"{rule:>6}: {_interval(result[rule])}" + (f"  avg@{samples}" if samples > 1 else ""))
        for k, value in result.get("pass_at", {}).get(rule, {}).items():
            print(f"{'':>6}  {_interval(value)}  pass@{k}")
    print(f"{result['problems']} problems x {samples}, {percent(result['truncated'])} truncated")


def _interval(value: dict[str, Any]) -> str:
    low, high = value["interval"]
    return f"{100 * value['share']:.2f} %  (95 %: {100 * low:.2f} to {100 * high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
