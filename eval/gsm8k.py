"""Measure exact match on GSM8K or data with its answer format.

With ``--out FOLDER`` answers are written as they come, and the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.record_file import RecordFile
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, parse_override
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.evaluate import RULES, evaluate
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.report.summary import percent
from onpolicy_skd.storage.files import RunPaths, write_text
from onpolicy_skd.types import SamplingParams

if TYPE_CHECKING:
    from onpolicy_skd.rollout.engine import RolloutEngine


def settings_for(model: str, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Return settings with ``model`` as the student; a model in a run folder uses that run's config.yaml."""
    run_config = RunPaths(Path(model).parent).config
    file = config or (run_config if run_config.exists() else None)
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
        settings = settings_for(args.model, args.config, args.overrides)
        return _run(args, settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, settings: Settings) -> int:
    from onpolicy_skd.data.prompts import load_prompts
    from onpolicy_skd.models.loading import load_tokenizer

    tokenizer = load_tokenizer(args.model, settings.student.trust_remote_code)
    prompts = load_prompts(settings.data, tokenizer, "eval", args.problems or settings.eval.problems or None)
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    max_tokens = settings.eval.max_tokens or settings.rollout.max_tokens
    sampling = SamplingParams(max_tokens, temperature, stop=tuple(settings.rollout.stop))

    total = len(prompts) * args.samples
    described = _describe(args.model, settings, sampling)
    with RecordFile(args.out, described, prompts, args.samples) if args.out else nullcontext() as file:
        known = file.known if file else []
        if known:
            print(f"{args.out}: continues after {len(known)} of {total} answers")
        generate = _engine(args.model, settings).stream if len(known) < total else lambda *_: []
        start = time.perf_counter()
        with ProgressReporter("answers", total, completed=len(known)) as progress:

            def on_record(record: dict[str, Any]) -> None:
                progress.advance()
                if file:
                    file.append(record)

            evaluation = evaluate(
                generate, prompts, tokenizer, sampling, args.samples, settings.run.seed, known, on_record
            )
        seconds = round(time.perf_counter() - start, 1)
        result = {"model": args.model, "seconds": seconds, "resumed": len(known), **evaluation.result}
        show(result)
        if file:
            file.replace(evaluation.records)
            write_text(args.out / "result.json", json.dumps(result, indent=2) + "\n")
            print(f"records: {file.path}")
    return 0


def _engine(model: str, settings: Settings) -> RolloutEngine:
    from onpolicy_skd.rollout.build import build_engine

    print(f"loading {model} into {settings.rollout.engine}", flush=True)
    return build_engine(model, settings, settings.student.trust_remote_code)


def _describe(model: str, settings: Settings, sampling: SamplingParams) -> dict[str, Any]:
    """Return what an answer depends on, apart from its problem."""
    from onpolicy_skd.models.loading import weights_digest

    return {
        "model": weights_digest(model),
        "data": settings.data.model_dump(mode="json"),
        "engine": settings.rollout.engine,
        "dtype": settings.rollout.dtype,
        "device": settings.run.device,
        "seed": settings.run.seed,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "stop": list(sampling.stop),
    }


def show(result: dict[str, Any]) -> None:
    """Print shares with their intervals: avg@N and pass@k for several samples."""
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
