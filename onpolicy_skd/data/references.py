"""References: answers of the data or of a file, or rollouts of the teacher or the initial student.

Filter, teacher, learner and evaluation treat references like the student's rollouts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data.chat import conversation, naming
from onpolicy_skd.data.prompts import answer_ids
from onpolicy_skd.data.rows import read_jsonl, text_columns
from onpolicy_skd.models.loading import weights_digest
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.storage.files import RunPaths, write_text
from onpolicy_skd.types import FinishReason, Prompt, RolloutRequest, Trajectory, id_array, seed_of

ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations: <<48/2=24>>
BATCH = 256  # prompts that a model answers between writes to disk


@dataclass(frozen=True, slots=True)
class Response:
    """A reference response to a prompt."""

    ids: list[int]  # end of sequence included, if there is one; in a conversation the prompt too
    finish_reason: FinishReason = "stop"
    mask: np.ndarray | None = None  # of a conversation: bool, True at the assistant's tokens


Responses = Mapping[str, Sequence[Response]]  # by prompt key, at least one for each


def trajectory(prompt: Prompt, response: Response, key: str, supervise: str) -> Trajectory:
    """Return ``response`` as a trajectory; ``supervise="all"``: the question's tokens are targets too."""
    ids = np.asarray([*(() if response.mask is not None else prompt.token_ids), *response.ids], dtype=np.int64)
    supervised = None
    if supervise == "all":
        start = 1
    elif response.mask is None:
        start = len(prompt.token_ids)
    else:
        start = int(response.mask.argmax())  # the first token of the assistant
        supervised = None if response.mask[start:].all() else response.mask[start:]
    count = len(ids) - start if supervised is None else int(supervised.sum())
    zeros, teacher_ids = np.zeros(count, np.float32), id_array(prompt.teacher_ids)
    return Trajectory(
        key, ids[:start], ids[start:], zeros, response.finish_reason, None, supervised=supervised,
        teacher_prompt_ids=teacher_ids, teacher=prompt.teacher,
    )  # fmt: skip


def of_data(prompt: Prompt, tokenizer: Any, supervise: str = "response", annotations: str = "keep") -> Response:
    """Return the response to ``prompt`` in the data.  Raises DataError, naming the row, if it is unusable."""
    if prompt.chat is None:
        return _of_answer(prompt.answer, tokenizer, annotations)
    with naming(prompt.row):
        ids, mask = conversation(prompt.chat, tokenizer, last=supervise == "last")
    return Response(ids, mask=mask)


def _of_answer(answer: str, tokenizer: Any, annotations: str) -> Response:
    return Response(answer_ids(ANNOTATION.sub("", answer) if annotations == "strip" else answer, tokenizer))


def of_text(prompt: Prompt, key: str) -> Trajectory:
    """Return a sample of packed text as a trajectory; all tokens after the first are supervised."""
    ids = np.asarray(prompt.token_ids, dtype=np.int64)
    return Trajectory(
        key, ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), "stop", None, documents=prompt.documents
    )


def from_text(settings: Settings, prompts: Sequence[Prompt], tokenizer: Any) -> tuple[list[Prompt], Responses]:
    """Return the prompts that have a response of at most ``rollout.max_tokens``, and their responses.

    Raises ConfigError for a prompt without one, or with longer ones only, unless ``data.overlong=drop``.
    """
    cfg, limit = settings.references, settings.rollout.max_tokens
    of_prompt = _reader(settings, prompts, tokenizer)
    kept, responses = [], {}
    for prompt in prompts:
        candidates = of_prompt(prompt)
        lengths = [len(r.ids) - (0 if r.mask is None else len(prompt.token_ids)) for r in candidates]
        fitting = [r for r, length in zip(candidates, lengths, strict=True) if length <= limit]
        if fitting:
            kept.append(prompt)
            responses[prompt.key] = fitting
        elif settings.data.overlong == "error":
            if lengths:
                why = f"its reference answer has {lengths[0]} tokens, rollout.max_tokens={limit}"
            elif cfg.source == "file":
                why = f"its reference answer has no row in {cfg.file}"
            else:
                why = "has no reference answer"
            raise ConfigError(f"{prompt.row}: {why}; correct that or set data.overlong=drop")
    if not kept:
        raise ConfigError(
            f"mode={settings.mode}: no prompt has a reference answer of rollout.max_tokens={limit} or less"
        )
    return kept, responses


def _reader(settings: Settings, prompts: Sequence[Prompt], tokenizer: Any) -> Callable[[Prompt], list[Response]]:
    """Return a function from a prompt to its responses in the data or in ``references.file``."""
    cfg = settings.references
    answers = _from_file(settings, prompts) if cfg.source == "file" else {}

    def read(prompt: Prompt) -> list[Response]:
        if prompt.chat:
            return [of_data(prompt, tokenizer, cfg.supervise)]
        texts = answers.get(prompt.key, []) if cfg.source == "file" else [prompt.answer] if prompt.answer else []
        return [_of_answer(text, tokenizer, cfg.annotations) for text in texts]

    return read


def _from_file(settings: Settings, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """Return the answers of ``references.file`` by prompt key; its rows name their question."""
    columns, file = (settings.data.question_column, settings.data.answer_column), settings.references.file
    assert file is not None  # validation.py requires it
    keys: defaultdict[str, list[str]] = defaultdict(list)
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        keys[prompt.question].append(prompt.key)
    for number, row in enumerate(read_jsonl(file), 1):
        question, answer = text_columns(row, columns, f"{file} row {number}")
        for key in keys.get(question, ()):
            answers[key].append(answer)
    return answers


def generated_responses(
    settings: Settings,
    prompts: Sequence[Prompt],
    roll: Callable[[Sequence[RolloutRequest]], Sequence[Trajectory]],
    log: Callable[[str], None],
) -> tuple[list[Prompt], Responses]:
    """Return the prompts that the model of ``references.source`` answered, and its answers.

    Answers of the teacher give sequence-level KD (Kim and Rush, 2016), those of the initial student offline on-policy
    distillation (arXiv 2604.13010).  ``roll`` generates them once; all runs with the same model, prompts and sampling
    reuse them, and a run continues where a killed one stopped.  Truncated answers are left out with
    ``samples.truncated=drop``.  Raises ConfigError if no answer is left, or the file of answers is damaged.
    """
    source = settings.references.source
    path = RunPaths(settings.run.folder).references / f"{_fingerprint(settings, prompts)}.jsonl"
    partial = path.with_suffix(".partial.jsonl")
    rows = _read_rows(path) if path.exists() else _read_rows(partial)
    if path.exists():
        log(f"references: answers of the {source} to {len(prompts)} prompts reused from {path}")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ProgressReporter("references", len(prompts), log, completed=len(rows)) as progress:
            for start in range(0, len(prompts), BATCH):
                missing = [p for p in prompts[start : start + BATCH] if p.key not in rows]
                for t in roll([_request(settings, p, i) for p in missing for i in range(settings.references.samples)]):
                    rows.setdefault(t.prompt_key, []).append(Response(t.response_ids.tolist(), t.finish_reason))
                write_text(partial, _text_of(rows))
                progress.advance(len(missing))
        log(f"references: the {source} has answered {len(rows)}/{len(prompts)} prompts")
        partial.replace(path)
    usable = {
        key: [r for r in answers if r.ids and (r.finish_reason == "stop" or settings.samples.truncated == "keep")]
        for key, answers in rows.items()
    }
    kept = [p for p in prompts if usable.get(p.key)]
    log(f"references: {len(kept)} of {len(prompts)} prompts have an answer of the {source}")
    if not kept:
        raise ConfigError(f"references.source={source}: every answer is truncated; raise rollout.max_tokens")
    return kept, usable


def _request(settings: Settings, prompt: Prompt, number: int) -> RolloutRequest:
    seed = seed_of(settings.run.seed, settings.references.source, prompt.key, number)
    return RolloutRequest(f"{prompt.key}/{number}", prompt.token_ids, seed)


def _text_of(rows: Responses) -> str:
    lines = (
        {"key": key, "ids": [r.ids for r in answers], "finish_reason": [r.finish_reason for r in answers]}
        for key, answers in rows.items()
    )
    return "".join(json.dumps(line) + "\n" for line in lines)


def _read_rows(path: Path) -> dict[str, list[Response]]:
    if not path.exists():
        return {}
    try:
        return {
            row["key"]: [Response(ids, reason) for ids, reason in zip(row["ids"], row["finish_reason"], strict=True)]
            for row in read_jsonl(path)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: damaged ({error}); remove it, and it is generated again") from None


def _fingerprint(settings: Settings, prompts: Sequence[Prompt]) -> str:
    """Return a digest that changes with the model's weights, the prompts, and the settings of sampling."""
    cfg, rollout = settings.references, settings.rollout
    model, also = (settings.student, ["student"]) if cfg.source == "student" else (settings.teacher_model, [])
    digest = hashlib.sha256(
        json.dumps(
            [
                weights_digest(model.model), settings.run.seed, cfg.samples, cfg.temperature,
                rollout.max_tokens, rollout.top_p, rollout.engine, rollout.dtype, settings.run.device, *rollout.stop,
                *also,
            ]
        ).encode()
    )  # fmt: skip
    for prompt in prompts:
        digest.update(json.dumps([prompt.key, prompt.token_ids]).encode())
    return digest.hexdigest()[:24]
