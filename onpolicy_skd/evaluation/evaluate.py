"""Generate answers to a set of problems and score them by exact match."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onpolicy_skd.evaluation.exact_match import Z, wilson
from onpolicy_skd.evaluation.judge import verdict
from onpolicy_skd.evaluation.stop_texts import before_stop
from onpolicy_skd.storage.files import write_text
from onpolicy_skd.types import Prompt, RolloutRequest, SamplingParams, Trajectory, seed_of

Generate = Callable[[Sequence[RolloutRequest], SamplingParams], Iterable[Trajectory]]
RULES = ("match", "strict")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation.

    ``result`` holds the numbers for metrics and summaries, ``records`` a row per answer, ``views`` a few rollouts token
    by token.
    """

    result: dict[str, Any]
    records: list[dict[str, Any]]
    views: list[dict[str, Any]] = field(default_factory=list)

    def write_records(self, path: Path) -> None:
        """Write the records to ``path`` as JSON lines, and the views, if any, next to it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, rows in ((path, self.records), (path.with_name(f"tokens-{path.name}"), self.views)):
            if rows:
                write_text(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    sampling: SamplingParams,
    samples: int = 1,
    seed: int = 0,
    known: Iterable[dict[str, Any]] = (),
    on_record: Callable[[dict[str, Any]], None] = lambda _: None,
    judge: str = "exact_match",
) -> Evaluation:
    """Generate ``samples`` answers to every prompt and judge them by both rules.

    ``known`` are records of an earlier evaluation: their answers are not generated again.  ``on_record`` receives each
    new record when its answer is complete.  ``judge`` judges answers to prompts without a reference (``eval.judge``).
    """
    prompt_of = {f"{p.key}/{i}": p for p in prompts for i in range(samples)}
    records = {r["key"]: r for r in known}
    requests = [
        RolloutRequest(key, p.token_ids, seed_of(seed, "evaluation", key))
        for key, p in prompt_of.items()
        if key not in records
    ]
    for trajectory in generate(requests, sampling) if requests else ():
        record = _record(trajectory, prompt_of[trajectory.key], tokenizer, sampling.stop, judge)
        records[trajectory.key] = record
        on_record(record)
    ordered = [records[key] for key in prompt_of]
    return Evaluation(summarize(ordered, samples), ordered)


def _record(trajectory: Trajectory, prompt: Prompt, tokenizer: Any, stop: Sequence[str], judge: str) -> dict[str, Any]:
    output = before_stop(tokenizer.decode(trajectory.response_ids.tolist(), skip_special_tokens=True), stop)
    return {
        "key": trajectory.key,
        "row": prompt.row,
        "question": prompt.question,
        "reference": prompt.answer,
        "output": output,
        "finish_reason": trajectory.finish_reason,
        "tokens": len(trajectory.response_ids),
        **asdict(verdict(output, prompt.answer, prompt.columns, judge)),
    }


def summarize(records: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """Compute the result of ``records``, which hold ``samples`` consecutive answers per problem.

    ``share`` of a rule is the mean over all answers (avg@samples); ``pass_at`` exists only for several samples.
    """
    counts = {
        rule: [sum(r[rule] for r in records[i : i + samples]) for i in range(0, len(records), samples)]
        for rule in RULES
    }
    result: dict[str, Any] = {"problems": len(records) // samples, "samples": samples}
    for rule in RULES:
        right = counts[rule]
        result[rule] = (
            {"share": right.count(1) / len(right), "interval": wilson(right.count(1), len(right))}
            if samples == 1
            else _mean([c / samples for c in right])
        )
    if samples > 1:
        ks = [2**i for i in range(samples.bit_length())]
        result["pass_at"] = {
            rule: {str(k): _mean([pass_at_k(c, samples, k) for c in counts[rule]]) for k in ks} for rule in RULES
        }
    return result | {
        "truncated": sum(r["finish_reason"] == "length" for r in records) / len(records),
        "response_tokens": sum(r["tokens"] for r in records) / len(records),
    }


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: 1 - C(samples - correct, k) / C(samples, k).

    Chen et al., Evaluating Large Language Models Trained on Code, 2021 (arXiv:2107.03374), Eq. 1.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over problems with its 95 % interval; problems, not samples, are independent."""
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    if not spread:  # equal values are no proof of certainty
        return {"share": mean, "interval": wilson(mean * len(values), len(values))}
    half = Z * statistics.stdev(values) / len(values) ** 0.5
    return {"share": mean, "interval": (max(0.0, mean - half), min(1.0, mean + half))}
