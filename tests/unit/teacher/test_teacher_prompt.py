"""A teacher that reads another prompt than the student, and the student as its own teacher."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model, tiny_settings
from learner_helpers import LENGTHS, gradients, relative

from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.lora import add_lora
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.transformers_engine import Response
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.storage.trajectories import trajectories_from_tensors, trajectories_to_tensors
from onpolicy_skd.teacher.teacher import Teacher
from onpolicy_skd.types import RolloutRequest

EMA = {"model": "student", "ema_decay": 0.75, "placement": "learner"}


def with_prompts(trajectories, seed=3):
    """Give the teacher a prompt of another length for all but the first."""
    rng = np.random.default_rng(seed)
    return trajectories[:1] + [
        dataclasses.replace(t, teacher_prompt_ids=rng.integers(2, VOCABULARY, 1 + 4 * i))
        for i, t in enumerate(trajectories[1:])
    ]


def own_teacher(lora=0, packed=False, **sections):
    """Return a learner whose teacher has the student's initial weights, and that teacher."""
    settings = tiny_settings(**{"teacher": {"model": "student"}, "pipeline": {"packing": packed}, **sections})
    model = tiny_model("qwen3", True)
    student = split(add_lora(model, lora, 2 * lora, seed=0) if lora else model, VOCABULARY)
    teacher = Teacher(split(tiny_model("qwen3", True), VOCABULARY), 10_000, 0, packed=packed)
    return Learner(student, teacher, settings, pad_id=0, steps=100), teacher


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_rows_are_those_of_the_response_after_the_teachers_prompt(packed, budget):
    """Token by token: the row of y_t is the state of the token before y_t in the sequence that the teacher reads."""
    model = tiny_model("qwen3", False, hidden=48, seed=1)
    teacher = Teacher(split(model, VOCABULARY), budget, 0, packed=packed)
    batch = with_prompts(make_trajectories(LENGTHS))
    teacher.encode(batch)
    for t in batch:
        prompt = t.prompt_ids if t.teacher_prompt_ids is None else t.teacher_prompt_ids
        ids = torch.as_tensor(np.concatenate([prompt, t.response_ids]))[None]
        states = model.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        assert len(states) == len(t.response_ids)
        rows = teacher.rows([(t.key, range(len(t.response_ids)))])
        torch.testing.assert_close(rows, states, rtol=1e-4, atol=1e-4)
        log_p = (states @ model.get_output_embeddings().weight.T).log_softmax(-1)
        expected = log_p.gather(1, torch.as_tensor(t.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(teacher.entropy_and_logprob([t.key])[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_a_student_that_reads_what_its_teacher_reads_has_nothing_to_learn(packed):
    learner, teacher = own_teacher(packed=packed)
    batch = make_trajectories(LENGTHS)
    same = [dataclasses.replace(t, teacher_prompt_ids=t.prompt_ids.copy()) for t in batch]
    teacher.encode(same)
    assert learner.scorer.divergence(same) == pytest.approx(0.0, abs=1e-6)
    teacher.release([t.key for t in same])
    record = learner.step(encoded(teacher, same))
    assert record.grad_norm < 1e-4
    assert record.divergence_selected == pytest.approx(0.0, abs=1e-6)
    teacher.release([t.key for t in same])
    other = with_prompts([dataclasses.replace(t, policy_version=1) for t in batch])
    assert learner.scorer.divergence(encoded(teacher, other)) > 0.05


def encoded(teacher, batch):
    teacher.encode(batch)
    return batch


def test_packing_does_not_change_the_gradient_of_a_second_prompt():
    batch = with_prompts(make_trajectories(LENGTHS))
    padded, packed = (gradients(*own_teacher(packed=packed), batch) for packed in (False, True))
    assert relative(packed, padded) < 1e-4


def test_another_prompt_is_another_text_and_survives_a_checkpoint():
    batch = with_prompts(make_trajectories(LENGTHS[:3]))
    plain = [dataclasses.replace(t, teacher_prompt_ids=None) for t in batch]
    assert [t.digest == p.digest for t, p in zip(batch, plain, strict=True)] == [True, False, False]
    restored = trajectories_from_tensors(*trajectories_to_tensors(batch))
    assert [t.digest for t in restored] == [t.digest for t in batch]
    assert restored[0].teacher_prompt_ids is None


def test_a_rollout_takes_over_the_teachers_prompt():
    response = Response(RolloutRequest("k/0", [5, 6], 1, teacher_prompt_ids=[5, 9, 6]))
    response.add([1], np.array([7, 1, 0]), np.zeros(3))
    t = response.trajectory(0)
    assert t.prompt_ids.tolist() == [5, 6]
    assert t.teacher_prompt_ids.tolist() == [5, 9, 6]
    assert t.as_teacher_reads().prompt_ids.tolist() == [5, 9, 6]
    assert t.as_teacher_reads().response_ids.tolist() == [7, 1]


@pytest.mark.parametrize("lora", [0, 4])
def test_a_moving_teacher_is_the_average_of_the_student(lora):
    learner, teacher = own_teacher(lora=lora, teacher=EMA, learner={"lr": 1e-2, "warmup_steps": 0})
    mean = {n: p.clone() for n, p in teacher.model.model.named_parameters()}
    for version in range(3):
        batch = with_prompts(make_trajectories(LENGTHS, seed=version, version=version))
        learner.step(encoded(teacher, batch))
        teacher.release([t.key for t in batch])
        new = dict(learner.state.weights(torch.float32))
        assert new.keys() == mean.keys()
        mean = {n: 0.75 * p + 0.25 * new[n] for n, p in mean.items()}
    for name, actual in teacher.model.model.named_parameters():
        torch.testing.assert_close(actual, mean[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(new[n], mean[n]) for n in new)


def test_a_teacher_without_memory_is_the_student():
    learner, teacher = own_teacher(teacher=EMA | {"ema_decay": 0.0}, learner={"lr": 1e-2, "warmup_steps": 0})
    learner.step(encoded(teacher, with_prompts(make_trajectories(LENGTHS))))
    later = make_trajectories(LENGTHS, seed=1, version=1)
    teacher.release([t.key for t in later])
    assert learner.scorer.divergence(encoded(teacher, later)) == pytest.approx(0.0, abs=1e-6)
    _, initial = own_teacher()
    assert gap(teacher, initial, later) > 1e-3


def gap(teacher, other, batch):
    keys = [t.key for t in batch]
    other.encode(batch)
    return (teacher.entropy_and_logprob(keys)[1] - other.entropy_and_logprob(keys)[1]).abs().mean().item()


@pytest.mark.parametrize("ema_weight", [0.0, 0.5])
def test_a_moving_teacher_resumes_with_the_losses_of_an_uninterrupted_run(ema_weight, tmp_path):
    def run(learner, teacher, versions):
        losses = []
        for version in versions:
            batch = with_prompts(make_trajectories(LENGTHS, seed=version, version=version), seed=version)
            losses.append(learner.step(encoded(teacher, batch)).loss)
            teacher.release([t.key for t in batch])
        return losses

    options = {"teacher": EMA, "learner": {"lr": 1e-2}, "alignment": {"ema_weight": ema_weight}}
    uninterrupted = run(*own_teacher(**options), range(6))
    learner, teacher = own_teacher(**options)
    first = run(learner, teacher, range(3))
    checkpoint.save(tmp_path, 3, {}, learner.state.tensors(), keep=1)
    resumed, teacher = own_teacher(**options)
    resumed.state.restore(checkpoint.newest(tmp_path).tensors, 3)
    assert first + run(resumed, teacher, range(3, 6)) == uninterrupted
    frozen = run(*own_teacher(**options | {"teacher": {"model": "student"}}), range(6))
    assert frozen[0] == uninterrupted[0]
    assert frozen[5] != uninterrupted[5]
