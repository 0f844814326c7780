"""Exact match of any model on evaluation problems, in this process and without Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import load_config
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data.prompts import check_judged, load_prompts
from onpolicy_skd.evaluation.evaluate import Evaluation
from onpolicy_skd.evaluation.evaluate import evaluate as judge_answers
from onpolicy_skd.evaluation.record_file import RecordFile
from onpolicy_skd.models.loading import load_tokenizer, weights_digest
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.rollout.engine import RolloutEngine
from onpolicy_skd.run.preflight import check_evaluated
from onpolicy_skd.storage.files import config_beside, write_text
from onpolicy_skd.types import SamplingParams


def evaluate(
    model: str | Path,
    settings: Settings | None = None,
    *,
    problems: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    out: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Generate answers with ``model`` and judge them by exact match.

    ``model`` is a folder, a hub name or ``bundled:NAME``.  ``settings`` give problems, prompts, engine and lengths; the
    default is the config of the run folder that holds the model, else all defaults.  ``problems`` limits their number.
    ``samples`` is the number of answers per problem, at ``temperature`` (default: 0 for one sample, else 1), for avg@N
    and pass@k.  ``out`` is a folder for records.jsonl and result.json: records are written as they come, and those that
    it already holds are kept.

    ``result`` has shares between 0 and 1 with their 95 % intervals: ``result["match"]["share"]``.  Raises ConfigError.
    """
    if samples < 1 or (problems is not None and problems < 1):
        raise ConfigError(f"samples={samples}, problems={problems}: accepted: at least 1")
    if temperature is not None and temperature < 0:
        raise ConfigError(f"temperature={temperature:g}: accepted: 0 or above")
    model = str(model)
    settings = settings or load_config(config_beside(model))
    tokenizer = load_tokenizer(model, settings.student.trust_remote_code)
    check_evaluated(model, settings, tokenizer)
    prompts = load_prompts(settings.data, tokenizer, "eval", problems or settings.eval.problems or None)
    check_judged(prompts, settings.eval.judge)
    sampling = SamplingParams(
        settings.eval.max_tokens or settings.rollout.max_tokens,
        temperature if temperature is not None else float(samples > 1),
        stop=tuple(settings.rollout.stop),
    )
    total = len(prompts) * samples
    provenance = _provenance(model, settings, sampling) if out else {}
    with RecordFile(Path(out), provenance, prompts, samples) if out else nullcontext() as file:
        known = file.known if file else []
        if known:
            log(f"{out}: continues after {len(known)} of {total} answers")
        generate = _engine(model, settings, log).stream if len(known) < total else lambda *_: []
        start = time.perf_counter()
        with ProgressReporter("answers", total, log, completed=len(known)) as progress:

            def on_record(record: dict[str, Any]) -> None:
                progress.advance()
                if file:
                    file.append(record)

            evaluation = judge_answers(
                generate, prompts, tokenizer, sampling, samples, settings.run.seed, known, on_record,
                settings.eval.judge,
            )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        result = {"model": model, "seconds": seconds, "resumed": len(known), **evaluation.result}
        if file:
            file.replace(evaluation.records)
            write_text(file.path.with_name("result.json"), json.dumps(result, indent=2) + "\n")
    return Evaluation(result, evaluation.records)


def _engine(model: str, settings: Settings, log: Callable[[str], None]) -> RolloutEngine:
    log(f"loading {model} into {settings.rollout.engine}")
    return build_engine(model, settings, settings.student.trust_remote_code)


def _provenance(model: str, settings: Settings, sampling: SamplingParams) -> dict[str, Any]:
    """Return everything that an answer depends on, except its problem."""
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
        "judge": settings.eval.judge,
    }
