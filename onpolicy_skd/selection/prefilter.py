"""The sample filter that runs once, before training: no rollout and no teacher forward is spent on what it drops.

Scores are written to disk, keyed by data and student, and later runs reuse them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data.packed_text import Lazy
from onpolicy_skd.data.prompts import answer_ids
from onpolicy_skd.data.references import of_text
from onpolicy_skd.models.loading import weights_digest
from onpolicy_skd.selection.samples import TEACHER_METRICS, top_share
from onpolicy_skd.storage.files import write_text
from onpolicy_skd.types import Prompt, Trajectory

BATCH = 256  # prompts scored between two progress messages


def kept_prompts(
    settings: Settings,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    rank: Callable[[Sequence[Trajectory]], list[float]],
    roll: Callable[[Sequence[Prompt]], list[Trajectory]],
    log: Callable[[str], None],
) -> Sequence[Prompt]:
    """The top ``samples.keep`` of ``prompts`` under the initial student, in their own order.

    ``rank`` scores trajectories; ``roll`` makes one rollout per prompt, for ``samples.prefilter_text=rollout``.
    """
    own = settings.samples
    path = settings.run.dir / "prefilter" / f"{fingerprint(settings, prompts)}.json"
    if path.exists():
        log(f"prefilter: scores of {len(prompts)} prompts reused from {path}")
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    else:
        scores = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            texts = (
                roll(part)
                if own.prefilter_text == "rollout"
                else [as_text(p, own.prefilter_text, tokenizer) for p in part]
            )
            scores += rank(texts)
            log(f"prefilter: {len(scores)}/{len(prompts)} prompts scored")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"metric": own.metric, "text": own.prefilter_text, "scores": scores}))
    kept = Lazy(prompts.__getitem__, top_share(scores, own.keep))
    log(f"prefilter: {len(kept)} of {len(prompts)} prompts kept by {own.metric} of {own.prefilter_text}")
    return kept


def as_text(prompt: Prompt, text: str, tokenizer: Any) -> Trajectory:
    """A trajectory whose eligible positions are those to score: the prompt's own tokens, or the reference answer's.

    Of packed text: all its tokens, whatever ``text`` says.
    """
    if prompt.documents is not None:
        return of_text(prompt, prompt.key)
    if text == "prompt":
        ids, response = prompt.token_ids[:1], prompt.token_ids[1:]
    else:
        ids, response = prompt.token_ids, answer_ids(prompt.answer, tokenizer)
    zeros = np.zeros(len(response), np.float32)
    return Trajectory(prompt.key, np.asarray(ids), np.asarray(response), zeros, "stop", None)


def fingerprint(settings: Settings, prompts: Sequence[Prompt]) -> str:
    """Changes with the student's weights (the teacher's, if it scores), the prompts, their answers, and the score."""
    own = settings.samples
    digest = hashlib.sha256(
        json.dumps(
            [
                own.metric,
                own.prefilter_text,
                settings.alignment.temperature,
                settings.learner.compute_dtype,
                settings.run.device,
                weights_digest(settings.student.model),
            ]
        ).encode()
    )
    if own.metric in TEACHER_METRICS:
        digest.update(json.dumps([settings.teacher.dtype, weights_digest(settings.teacher.model)]).encode())
    if own.prefilter_text == "rollout" or own.metric == "random":
        digest.update(json.dumps([settings.run.seed, settings.rollout.model_dump(mode="json")]).encode())
    for prompt in prompts:
        parts = [prompt.key, prompt.token_ids, prompt.answer]
        if prompt.documents is not None:
            parts.append(prompt.documents.tolist())
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:24]
