"""Measure exact match on GSM8K or data with its answer format: ``python -m eval.gsm8k --model MODEL``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, parse_override
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.evaluate import evaluate
from onpolicy_skd.storage.files import write_text
from onpolicy_skd.types import SamplingParams


def settings_for(model: str, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Return settings with ``model`` as the student; a model in a run folder uses that run's config.yaml."""
    run_config = Path(model).parent / "config.yaml"
    file = config or (run_config if run_config.exists() else None)
    return build_settings(file, [parse_override(text) for text in [*overrides, f"student.model={model}"]])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.gsm8k", description=__doc__)
    parser.add_argument("--model", required=True, help="folder (runs/NAME/final), hub name, or bundled:NAME")
    parser.add_argument(
        "--config", type=Path, help="settings file (default: config.yaml next to the model)"
    )
    parser.add_argument("--problems", type=int, default=0, help="only the first N problems (default: all)")
    parser.add_argument("--samples", type=int, default=1, help="answers per problem; 1 is greedy (default: 1)")
    parser.add_argument("--temperature", type=float, default=None, help="default: 0 for one sample, else 1")
    parser.add_argument("--out", type=Path, help="folder for records.jsonl and result.json")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for onpolicy_skd.train")
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
    from onpolicy_skd.rollout.build import build_engine

    tokenizer = load_tokenizer(args.model, settings.student.trust_remote_code)
    prompts = load_prompts(settings.data, tokenizer, "eval", args.problems or settings.eval.problems or None)
    engine = build_engine(args.model, settings, settings.student.trust_remote_code)
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    sampling = SamplingParams(settings.eval.max_tokens or settings.rollout.max_tokens, temperature)
    start = time.perf_counter()
    evaluation = evaluate(engine.generate, prompts, tokenizer, sampling, args.samples, settings.run.seed)
    result = {"model": args.model, "seconds": round(time.perf_counter() - start, 1), **evaluation.result}
    for rule in ("match", "strict"):
        low, high = result[rule]["interval"]
        print(f"{rule:>6}: {100 * result[rule]['share']:.2f} %  (95 %: {100 * low:.2f} to {100 * high:.2f})")
    print(f"{result['problems']} problems x {result['samples']}, {100 * result['truncated']:.1f} % truncated")
    if args.out:
        evaluation.write_records(args.out / "records.jsonl")
        write_text(args.out / "result.json", json.dumps(result, indent=2) + "\n")
        print(f"records: {args.out / 'records.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
