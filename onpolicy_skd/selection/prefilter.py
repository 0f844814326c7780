"""The sample filter that runs once, before training: dropped prompts cost no rollout and no teacher forward.

Scores are written to disk, keyed by ``fingerprint``, and reused by later runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data import references
from onpolicy_skd.data.packed_text import Lazy
from onpolicy_skd.models.loading import weights_digest
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.selection.samples import TEACHER_METRICS, top_share
from onpolicy_skd.storage.files import RunPaths, write_text
from onpolicy_skd.types import Prompt, Trajectory

BATCH = 256  # prompts per progress report


def kept_prompts(
    settings: Settings,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    score: Callable[[Sequence[Trajectory]], list[float]],
    generate: Callable[[Sequence[Prompt]], list[Trajectory]],
    log: Callable[[str], None],
) -> Sequence[Prompt]:
    """Return the top ``samples.keep`` of ``prompts`` under the initial student, in their order.

    ``score`` scores trajectories; ``generate`` samples a rollout per prompt, for ``samples.prefilter_text=rollout``.
    """
    samples_cfg = settings.samples
    path = RunPaths(settings.run.folder).prefilter / f"{fingerprint(settings, prompts)}.json"
    if path.exists():
        log(f"prefilter: scores of {len(prompts)} prompts reused from {path}")
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    else:
        scores = []
        with ProgressReporter("prefilter", len(prompts), log) as progress:
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                if samples_cfg.prefilter_text == "rollout":
                    texts = generate(batch)
                else:
                    annotations = settings.references.annotations
                    texts = [as_text(p, samples_cfg.prefilter_text, tokenizer, annotations) for p in batch]
                scores += score(texts)
                progress.advance(len(batch))
        log(f"prefilter: {len(scores)}/{len(prompts)} prompts scored")
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"metric": samples_cfg.metric, "text": samples_cfg.prefilter_text, "scores": scores}
        write_text(path, json.dumps(record))
    kept = Lazy(prompts.__getitem__, top_share(scores, samples_cfg.keep))
    log(
        f"prefilter: {len(kept)} of {len(prompts)} prompts kept by {samples_cfg.metric} of {samples_cfg.prefilter_text}"
    )
    return kept


def as_text(prompt: Prompt, text: str, tokenizer: Any, annotations: str = "keep") -> Trajectory:
    """Return a trajectory whose eligible positions are those to score: the prompt's tokens, or the reference answer's.

    The first token of a prompt or of packed text is not scored; for packed text ``text`` has no effect.
    ``annotations="strip"``: an answer is scored without its calculator annotations.
    """
    if prompt.documents is not None:
        return references.of_text(prompt, prompt.key)
    if text == "prompt+answer":
        response = references.of_data(prompt, tokenizer, annotations=annotations)
        return references.trajectory(prompt, response, prompt.key, "response")
    ids, response = prompt.token_ids[:1], prompt.token_ids[1:]
    zeros = np.zeros(len(response), np.float32)
    return Trajectory(prompt.key, np.asarray(ids), np.asarray(response), zeros, "stop", None, teacher=prompt.teacher)


def fingerprint(settings: Settings, prompts: Sequence[Prompt]) -> str:
    """Return a digest of the student's weights (and the teacher's, if it scores), prompts, answers and sample score."""
    samples_cfg = settings.samples
    digest = hashlib.sha256(
        json.dumps(
            [
                samples_cfg.metric,
                samples_cfg.prefilter_text,
                settings.alignment.temperature,
                settings.learner.compute_dtype,
                settings.run.device,
                weights_digest(settings.student.model),
            ]
        ).encode()
    )
    if samples_cfg.metric in TEACHER_METRICS:
        teacher = settings.teacher
        loaded = [teacher.dtype, teacher.engine, teacher.quantization, weights_digest(settings.teacher_model.model)]
        digest.update(json.dumps(loaded).encode())
    if samples_cfg.prefilter_text == "rollout" or samples_cfg.metric == "random":
        digest.update(json.dumps([settings.run.seed, settings.rollout.model_dump(mode="json")]).encode())
    if samples_cfg.prefilter_text == "prompt+answer" and settings.references.annotations == "strip":
        digest.update(b"strip")
    for prompt in prompts:
        fields = [prompt.key, prompt.token_ids, prompt.answer, *(prompt.chat.messages if prompt.chat else [])]
        if prompt.documents is not None:
            fields.append(prompt.documents.tolist())
        if samples_cfg.metric in TEACHER_METRICS and prompt.teacher_ids is not None:
            fields.append(prompt.teacher_ids)
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:24]
