"""Stop texts in both engines and in training: a response ends where its text first contains one."""

import dataclasses

import pytest
import torch
from helpers import tiny_settings

from onpolicy_skd.evaluation.judge import with_correctness
from onpolicy_skd.evaluation.stop_texts import stop_length
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.loading import load_model, load_tokenizer
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.teacher.teacher import Teacher

STOP = ("####", "zzz")
TOKENIZER = load_tokenizer("bundled:demo_teacher")


def setting(tmp_path, engine="transformers", **sections):
    return tiny_settings(
        run={"trackers": [], "device": "cpu", "dir": str(tmp_path), "steps": 1},
        rollout={"max_tokens": 96, "dtype": "float32", "engine": engine, "stop": list(STOP)},
        learner={"compute_dtype": "float32", "batch_size": 4},
        **sections,
    )


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_response_is_the_shortest_prefix_with_a_stop_text(tmp_path, engine, temperature):
    settings = setting(tmp_path, engine)
    run = prepare(settings, lambda _: None)
    built = build_engine("bundled:demo_teacher", settings)
    sampling = dataclasses.replace(run.sampling, temperature=temperature)
    assert sampling.stop == run.greedy.stop == STOP
    requests = run.requests(run.train, 0)
    free = built.generate(requests, dataclasses.replace(sampling, stop=()))
    stopped = built.generate(requests, sampling)
    cut = 0
    for before, after in zip(free, stopped, strict=True):
        ids = before.response_ids.tolist()
        length = stop_length(ids, STOP, decode)
        cut += length is not None
        assert after.response_ids.tolist() == ids[:length]
        assert after.sampler_logprobs == pytest.approx(before.sampler_logprobs[:length], abs=1e-4)
        assert after.finish_reason == ("stop" if length is not None else before.finish_reason)
    assert cut > 0  # the bundled teacher writes "#### NUMBER" at the end


def test_training_uses_the_tokens_up_to_the_stop_text_and_judges_what_precedes_it(tmp_path):
    settings = setting(tmp_path, samples={"truncated": "drop"})
    run = prepare(settings, lambda _: None)
    student, teacher = (
        split(load_model(f"bundled:demo_{who}", torch.float32, "cpu"), run.vocabulary) for who in ("student", "teacher")
    )
    pad_id = run.tokenizer.pad_token_id
    scorer = Teacher(teacher, 10_000, pad_id)
    learner = Learner(student, scorer, settings, pad_id, 1)
    requests = [dataclasses.replace(r, answer="#### 7") for r in run.requests(run.train, 0)]
    batch = build_engine("bundled:demo_teacher", settings).generate(requests, run.greedy)
    stopped = [t for t in batch if decode(t.response_ids.tolist()).endswith("####")]
    assert stopped
    assert all(t.response_ids[-1] != run.tokenizer.eos_token_id for t in stopped)  # none is appended
    report, kept = learner.scorer.filter([dataclasses.replace(t, policy_version=0) for t in stopped])
    assert report.dropped == {}
    scorer.encode(kept)
    record = learner.step(kept)
    assert record.positions == sum(len(t.response_ids) for t in stopped)
    assert record.teacher_ending is None  # these ends are no end-of-sequence tokens
    answered = [
        dataclasses.replace(stopped[0], response_ids=TOKENIZER("7 #### 8", return_tensors="np")["input_ids"][0])
    ]
    assert with_correctness(answered, requests[:1], TOKENIZER, STOP)[0].correct
    assert not with_correctness(answered, requests[:1], TOKENIZER)[0].correct
