"""Exact match on GSM8K or any set with its answer format: ``python -m eval.gsm8k --model MODEL``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onpolicy_skd.checkpoint import write_text
from onpolicy_skd.command_line import build_settings, parse_override
from onpolicy_skd.config import ConfigError, Settings
from onpolicy_skd.exact_match import score, wilson
from onpolicy_skd.trajectory import Prompt, RolloutRequest, Sampling, Trajectory, seed_of

Generate = Callable[[Sequence[RolloutRequest], Sampling], list[Trajectory]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``result`` is small and goes to metrics and summaries; ``records`` hold every judged answer, ``views`` a few
    rollouts token by token."""

    result: dict[str, Any]
    records: list[dict[str, Any]]
    views: list[dict[str, Any]] = field(default_factory=list)

    def write_records(self, path: Path) -> None:
        """One JSON object a line: the records to ``path``, the views, if there are any, beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, rows in ((path, self.records), (path.with_name(f"tokens-{path.name}"), self.views)):
            if rows:
                write_text(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def evaluate(
    generate: Generate, prompts: Sequence[Prompt], tokenizer: Any, sampling: Sampling, samples: int = 1, seed: int = 0
) -> Evaluation:
    """Answers every prompt ``samples`` times and judges the answers by both rules."""
    requests = [
        RolloutRequest(f"{p.key}/{i}", p.token_ids, seed_of(seed, "evaluation", p.key, i))
        for p in prompts
        for i in range(samples)
    ]
    answers = {t.key: t for t in generate(requests, sampling)}
    records = []
    for prompt in prompts:
        for i in range(samples):
            answered = answers[f"{prompt.key}/{i}"]
            output = tokenizer.decode(answered.response_ids.tolist(), skip_special_tokens=True)
            records.append(
                {
                    "key": answered.key,
                    "question": prompt.question,
                    "reference": prompt.answer,
                    "output": output,
                    "finish": answered.finish,
                    "tokens": len(answered.response_ids),
                    **asdict(score(output, prompt.answer)),
                }
            )
    result = {
        "problems": len(prompts),
        "samples": samples,
        "match": _rate([r["match"] for r in records], samples),
        "strict": _rate([r["strict"] for r in records], samples),
        "truncated": sum(r["finish"] == "length" for r in records) / len(records),
        "response_tokens": sum(r["tokens"] for r in records) / len(records),
    }
    return Evaluation(result, records)


def _rate(right: list[bool], samples: int) -> dict[str, Any]:
    """Share of right answers with its 95 % interval; problems, not samples, are the independent draws."""
    share = sum(right) / len(right)
    if samples == 1:
        return {"share": share, "interval": wilson(sum(right), len(right))}
    means = [sum(right[i : i + samples]) / samples for i in range(0, len(right), samples)]
    half = 1.959964 * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 1.0
    return {"share": share, "interval": (max(0.0, share - half), min(1.0, share + half))}


def settings_for(model: str, config: Path | None, overrides: Sequence[str]) -> Settings:
    """Run settings with ``model`` as the student; a run's checkpoint brings its own config.yaml along."""
    own = Path(model).parent / "config.yaml"
    file = config or (own if own.exists() else None)
    return build_settings(file, [parse_override(text) for text in [*overrides, f"student.model={model}"]])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.gsm8k", description=__doc__)
    parser.add_argument("--model", required=True, help="folder (runs/NAME/final), hub name, or bundled:NAME")
    parser.add_argument("--config", type=Path, help="settings for data.* and rollout.*; default: the run's own")
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
    from onpolicy_skd.models import load_tokenizer
    from onpolicy_skd.rollout import build_engine

    tokenizer = load_tokenizer(args.model, settings.student.trust_remote_code)
    prompts = load_prompts(settings.data, tokenizer, "eval", args.problems or settings.eval.problems or None)
    engine = build_engine(args.model, settings, settings.student.trust_remote_code)
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    sampling = Sampling(settings.eval.max_tokens or settings.rollout.max_tokens, temperature)
    started = time.perf_counter()
    done = evaluate(engine.generate, prompts, tokenizer, sampling, args.samples, settings.run.seed)
    result = {"model": args.model, "seconds": round(time.perf_counter() - started, 1), **done.result}
    for rule in ("match", "strict"):
        low, high = result[rule]["interval"]
        print(f"{rule:>6}: {100 * result[rule]['share']:.2f} %  (95 %: {100 * low:.2f} to {100 * high:.2f})")
    print(f"{result['problems']} problems x {result['samples']}, {100 * result['truncated']:.1f} % truncated")
    if args.out:
        done.write_records(args.out / "records.jsonl")
        write_text(args.out / "result.json", json.dumps(result, indent=2) + "\n")
        print(f"records: {args.out / 'records.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
