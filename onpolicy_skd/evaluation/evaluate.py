"""Generate answers to a set of problems and score them by exact match."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onpolicy_skd.evaluation.exact_match import score, wilson
from onpolicy_skd.storage.files import write_text
from onpolicy_skd.types import Prompt, RolloutRequest, SamplingParams, Trajectory, seed_of

Generate = Callable[[Sequence[RolloutRequest], SamplingParams], list[Trajectory]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation.

    ``result`` holds the figures for metrics and summaries, ``records`` a row per answer, ``views`` a few rollouts token
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
) -> Evaluation:
    """Generate ``samples`` answers to every prompt and judge them by both rules."""
    requests = [
        RolloutRequest(f"{p.key}/{i}", p.token_ids, seed_of(seed, "evaluation", p.key, i))
        for p in prompts
        for i in range(samples)
    ]
    answers = {t.key: t for t in generate(requests, sampling)}
    records = []
    for prompt in prompts:
        for i in range(samples):
            trajectory = answers[f"{prompt.key}/{i}"]
            output = tokenizer.decode(trajectory.response_ids.tolist(), skip_special_tokens=True)
            records.append(
                {
                    "key": trajectory.key,
                    "question": prompt.question,
                    "reference": prompt.answer,
                    "output": output,
                    "finish_reason": trajectory.finish_reason,
                    "tokens": len(trajectory.response_ids),
                    **asdict(score(output, prompt.answer)),
                }
            )
    result = {
        "problems": len(prompts),
        "samples": samples,
        "match": _rate([r["match"] for r in records], samples),
        "strict": _rate([r["strict"] for r in records], samples),
        "truncated": sum(r["finish_reason"] == "length" for r in records) / len(records),
        "response_tokens": sum(r["tokens"] for r in records) / len(records),
    }
    return Evaluation(result, records)


def _rate(correct: list[bool], samples: int) -> dict[str, Any]:
    """Return the share of right answers with its 95 % interval; problems, not samples, are independent."""
    share = sum(correct) / len(correct)
    if samples == 1:
        return {"share": share, "interval": wilson(sum(correct), len(correct))}
    means = [sum(correct[i : i + samples]) / samples for i in range(0, len(correct), samples)]
    half = 1.959964 * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 1.0
    return {"share": share, "interval": (max(0.0, share - half), min(1.0, share + half))}
