"""The sample filter before training: what is scored, reused scores, and what the fingerprint covers."""

import dataclasses

import numpy as np
import pytest
from helpers import tiny_settings

from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.selection.prefilter import as_text, fingerprint, kept_prompts
from onpolicy_skd.types import Prompt, Trajectory

PROMPTS = [Prompt(f"p{i}", [5, 6 + i, 7], "question", "#### 1") for i in range(5)]


def prefilter_settings(folder, **samples):
    return tiny_settings(run={"dir": folder}, samples={"keep": 0.4, "when": "prefilter", **samples})


def rollout(prompt):
    return Trajectory(prompt.key, np.array(prompt.token_ids), np.array([9, 1]), np.zeros(2, np.float32), "stop", 0)


@pytest.mark.parametrize("text", ["prompt", "prompt+answer", "rollout"])
def test_the_top_share_is_kept_in_order_and_its_scores_are_reused(text, tmp_path):
    settings, tokenizer = prefilter_settings(tmp_path, prefilter_text=text), load_tokenizer("bundled:demo_student")
    scored, log = [], []

    def score(trajectories):
        scored.extend(trajectories)
        return [float(t.key[1:] in "31") for t in trajectories]

    def generate(prompts):
        return [rollout(p) for p in prompts]

    kept = kept_prompts(settings, PROMPTS, tokenizer, score, generate, log.append)
    assert [p.key for p in kept] == ["p1", "p3"]
    responses = {"prompt": 2, "rollout": 2}
    assert all(len(t.response_ids) == responses.get(text, len(t.response_ids)) > 0 for t in scored)
    assert log == ["prefilter: 5/5 prompts scored", f"prefilter: 2 of 5 prompts kept by student_entropy of {text}"]
    again = kept_prompts(settings, PROMPTS, tokenizer, None, None, log.append)  # neither may be called
    assert [p.key for p in again] == ["p1", "p3"]
    assert log[2].startswith("prefilter: scores of 5 prompts reused from ")


def test_answers_are_scored_as_they_are_trained_on(tmp_path):
    """Without the calculator's annotations if ``references.annotations=strip``."""
    tokenizer, scores = load_tokenizer("bundled:demo_student"), {}
    prompts = [dataclasses.replace(p, answer="2*3=<<2*3=6>>6\n#### 6") for p in PROMPTS]
    for annotations in ("keep", "strip"):
        settings = tiny_settings(
            mode="off_policy", run={"dir": tmp_path}, samples={"keep": 0.4, "when": "prefilter"},
            references={"annotations": annotations},
        )  # fmt: skip
        texts = []
        kept_prompts(settings, prompts, tokenizer, lambda b: [texts.append(t) or 0.0 for t in b], None, print)  # noqa: B023
        assert len(texts) == len(prompts)  # the scores of other texts are not reused
        scores[annotations] = tokenizer.decode(texts[0].response_ids, skip_special_tokens=True)
    assert scores == {"keep": prompts[0].answer, "strip": "2*3=6\n#### 6"}


def test_packed_text_is_scored_at_all_its_tokens():
    packed = dataclasses.replace(PROMPTS[0], documents=np.array([2]))
    assert as_text(packed, "prompt+answer", None).documents.tolist() == [2]


def test_the_fingerprint_changes_with_what_the_scores_depend_on(tmp_path):
    def of(prompts=PROMPTS, teacher="bundled:demo_teacher", seed=0, quantization=None, **samples):
        settings = prefilter_settings(tmp_path, **samples)
        settings = settings.model_copy(
            update={
                "teacher": settings.teacher.model_copy(update={"model": teacher, "quantization": quantization}),
                "run": settings.run.model_copy(update={"seed": seed}),
            }
        )
        return fingerprint(settings, prompts)

    assert of() == of(keep=0.2) == of(teacher="bundled:demo_student") == of(seed=1)
    packed = [dataclasses.replace(PROMPTS[0], documents=np.array([2])), *PROMPTS[1:]]
    other_view = [dataclasses.replace(PROMPTS[0], teacher_ids=[5, 8]), *PROMPTS[1:]]
    assert of(other_view) == of()  # the teacher does not score
    different = [of(other_view, metric="kl"), of(), of(PROMPTS[1:]), of(packed),
                 of(metric="kl"), of(metric="kl", teacher="bundled:demo_student"), of(metric="kl", quantization="fp8"),
                 of(metric="random"), of(metric="random", seed=1), of(prefilter_text="rollout")]  # fmt: skip
    assert len(set(different)) == len(different)
