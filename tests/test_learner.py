"""The update of one optimizer step, without Ray: invariances, limits, guards, resuming."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, make_trajectories, tiny_model, tiny_settings

from onpolicy_skd import checkpoint
from onpolicy_skd.learner import Learner, SamplerGapError, learning_rate
from onpolicy_skd.lm_head import row_statistics
from onpolicy_skd.models import split
from onpolicy_skd.selection.positions import quota
from onpolicy_skd.teacher import Teacher
from onpolicy_skd.trajectory import collate

LENGTHS = [(5, 9), (3, 20), (12, 4), (7, 1), (2, 15), (9, 11), (4, 6), (6, 17)]
FAMILIES = [(f, tied) for f in ("qwen3", "llama", "gpt_neox") for tied in (True, False)]


def build(family="qwen3", tied=False, teacher=None, budget=10_000, steps=100, **sections):
    """A learner and its (encoded) teacher; the teacher is wider than the student unless one is given."""
    settings = tiny_settings(**sections)
    settings = settings.model_copy(
        update={"learner": settings.learner.model_copy(update={"tokens_per_micro_batch": budget})}
    )
    student = split(tiny_model(family, tied), VOCABULARY)
    other = Teacher(split(teacher or tiny_model("qwen3", False, hidden=48, seed=1), VOCABULARY), 10_000, 0)
    return Learner(student, other, settings, pad_id=0, steps=steps), other


def gradients(learner, teacher, batch):
    teacher.encode(batch)
    learner.optimizer.zero_grad()
    learner.accumulate(batch)
    return {n: p.grad.clone() for n, p in learner.named.items()}


def relative(found, expected):
    squares = sum((found[n] - expected[n]).double().square().sum() for n in expected)
    return (squares / sum(g.double().square().sum() for g in expected.values())).sqrt().item()


def dense_gradients(model, teacher_model, batch, k):
    """Float64, one sample at a time, full logits: the objective of docs/method.md, section 3, spelled out."""
    model, teacher_model = copy.deepcopy(model).double(), copy.deepcopy(teacher_model).double()
    total = 0.0
    for t in batch:
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        first = len(t.prompt_ids) - 1
        log_q = model(input_ids=ids).logits[0, first:-1].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher_model(input_ids=ids).logits[0, first:-1].log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1).detach()
        chosen = entropy.topk(quota(k, len(entropy))).indices
        rows = (log_q.exp() * (log_q - log_p)).sum(-1)[chosen]
        total = total + rows.mean() / len(batch)
    total.backward()
    return total.item(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("k", [0.2, 1.0])
def test_gradient_equals_the_spelled_out_objective(family, tied, k):
    learner, teacher = build(family, tied, positions={"k": k})
    batch = make_trajectories(LENGTHS)
    loss, expected = dense_gradients(learner.student.model, teacher._model.model, batch, k)
    found = gradients(learner, teacher, batch)
    assert found.keys() == expected.keys()
    assert relative(found, expected) < 1e-5
    assert learner.accumulate(batch).sums["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 90, 10_000])
@pytest.mark.parametrize("order", ["as is", "reversed", "shuffled"])
def test_gradient_does_not_depend_on_the_cut_or_the_order(budget, order):
    batch = make_trajectories(LENGTHS)
    expected = gradients(*build(), batch)
    places = {"as is": range(8), "reversed": range(7, -1, -1), "shuffled": [3, 0, 7, 5, 1, 6, 2, 4]}[order]
    found = gradients(*build(budget=budget), [batch[i] for i in places])
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_gradient_does_not_depend_on_the_padding_side(family, tied, monkeypatch):
    batch = make_trajectories(LENGTHS)
    expected = gradients(*build(family, tied), batch)
    monkeypatch.setattr(Learner, "_collate", lambda self, members: collate(members, self._pad_id, padding_side="left"))
    assert relative(gradients(*build(family, tied), batch), expected) < 1e-5


def test_activation_checkpointing_changes_nothing():
    batch = make_trajectories(LENGTHS)
    learner, teacher = build(student={"activation_checkpointing": True})
    passes = []
    learner.student.trunk.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    saved = gradients(learner, teacher, batch)
    assert len(passes) == 2  # forward, and again in backward
    assert relative(saved, gradients(*build(), batch)) < 1e-6


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_teacher_equal_to_student_gives_no_divergence_and_no_update(family, tied):
    learner, teacher = build(family, tied, teacher=tiny_model(family, tied), positions={"k": 1.0})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    found = learner.step(batch)
    assert found["divergence_selected"] < 1e-6
    assert found["grad_norm"] < 1e-5


def test_a_vocabulary_padded_in_the_teacher_is_cut():
    """The teacher's head has rows the student's lacks; they take no part, exactly as if they were not there."""
    padded = tiny_model("qwen3", False, vocabulary=VOCABULARY + 7, hidden=48, seed=1)
    plain = tiny_model("qwen3", False, vocabulary=VOCABULARY, hidden=48, seed=1)
    state = padded.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:VOCABULARY]
    plain.load_state_dict(state)
    batch = make_trajectories(LENGTHS)
    assert relative(gradients(*build(teacher=padded), batch), gradients(*build(teacher=plain), batch)) < 1e-6


def test_training_lowers_the_divergence_and_counts_versions():
    learner, teacher = build(learner={"lr": 1e-2, "warmup_steps": 0}, positions={"k": 1.0})
    values = []
    for version in range(30):
        batch = make_trajectories(LENGTHS, version=version)
        teacher.encode(batch)
        values.append(learner.step(batch)["divergence_selected"])
    assert learner.version == 30
    assert values[-1] < 0.5 * values[0]
    assert learner.divergence(batch) == pytest.approx(values[-1], rel=0.3)


def test_a_gap_between_sampler_and_learner_stops_the_run_before_the_update():
    learner, teacher = build(sync={"max_gap": 0.01})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    before = {n: p.clone() for n, p in learner.named.items()}
    with pytest.raises(SamplerGapError, match=r"sync\.max_gap=0\.01"):
        learner.step(batch)
    assert all(torch.equal(p, before[n]) for n, p in learner.named.items())
    model = learner.student
    agreeing = []
    for t in batch:
        one = collate([t], 0)
        with torch.no_grad():
            _, logprob = row_statistics(model.hidden(one), model.head_VH, one.targets)
        agreeing.append(dataclasses.replace(t, sampler_logprobs=logprob.numpy()))
    assert learner.step(agreeing)["sampler_gap"] < 1e-5


def test_trajectories_of_another_policy_are_refused():
    learner, teacher = build()
    batch = make_trajectories(LENGTHS, version=1)
    teacher.encode(batch)
    with pytest.raises(RuntimeError, match="policy version 1"):
        learner.step(batch)


def test_sample_filter_ranks_by_mean_entropy_and_counts():
    learner, _ = build(samples={"keep": 0.25})
    batch = make_trajectories(LENGTHS)
    batch[2] = dataclasses.replace(batch[2], finish="length")
    report = learner.filter(batch)
    scores = dict(zip([t.key for t in batch], learner.mean_entropy(batch), strict=True))
    valid = [t.key for t in batch if t.finish == "stop"]
    assert set(report.kept) == set(sorted(valid, key=scores.get, reverse=True)[:2])
    assert report.dropped == {"truncated": 1, "not_selected": 5}
    empty = learner.filter([dataclasses.replace(t, finish="length") for t in batch])
    assert empty.kept == []
    assert empty.dropped == {"truncated": 8}


def test_mean_entropy_is_the_mean_over_the_response():
    learner, _ = build(budget=60)
    batch = make_trajectories(LENGTHS)
    for t, score in zip(batch, learner.mean_entropy(batch), strict=True):
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        log_q = learner.student.model(input_ids=ids).logits[0, len(t.prompt_ids) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(-(log_q.exp() * log_q).sum(-1).mean().item(), rel=1e-4)


def test_resuming_from_a_checkpoint_continues_the_same_losses(tmp_path):
    def run(learner, teacher, versions):
        losses = []
        for version in versions:
            batch = make_trajectories(LENGTHS, seed=version, version=version)
            teacher.encode(batch)
            losses.append(learner.step(batch)["loss"])
        return losses

    options = {"learner": {"lr": 1e-3, "weight_decay": 0.1}}
    whole = run(*build(**options), range(6))
    learner, teacher = build(**options)
    first = run(learner, teacher, range(3))
    checkpoint.save(tmp_path, 3, {}, learner.tensors(), keep=1)
    resumed, teacher = build(**options)
    resumed.restore(checkpoint.newest(tmp_path).tensors, 3)
    assert first + run(resumed, teacher, range(3, 6)) == whole


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    learner, _ = build()
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        learner.restore({"model/other": torch.zeros(1)}, 0)


def test_masters_must_be_float32():
    student = split(tiny_model("qwen3", True).bfloat16(), VOCABULARY)
    with pytest.raises(ValueError, match="masters must be float32"):
        Learner(student, build()[1], tiny_settings(), 0, 10)


def test_bfloat16_compute_keeps_float32_masters_and_points_the_same_way():
    batch = make_trajectories(LENGTHS)
    coarse = gradients(*build(learner={"compute_dtype": "bfloat16"}, positions={"k": 1.0}), batch)
    fine = gradients(*build(positions={"k": 1.0}), batch)
    assert all(g.dtype == torch.float32 for g in coarse.values())
    assert relative(coarse, fine) < 0.1


def test_learning_rate_warms_up_and_falls():
    own = tiny_settings(learner={"lr": 1.0, "warmup_steps": 3, "min_lr_ratio": 0.1}).learner
    rates = [learning_rate(own, s, 103) for s in range(103)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
    linear = own.model_copy(update={"schedule": "linear"})
    assert learning_rate(linear, 53, 103) == pytest.approx(0.55)
    assert learning_rate(own.model_copy(update={"schedule": "constant"}), 90, 103) == 1.0
