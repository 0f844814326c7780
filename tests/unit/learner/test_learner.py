"""The update of one optimizer step, without Ray: invariances, limits, guards, resuming."""

import copy
import dataclasses
import functools
import itertools
import math
import time

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model, tiny_settings
from learner_helpers import FAMILIES, LENGTHS, build, gradients, relative

from onpolicy_skd.config.loading import resolve
from onpolicy_skd.evaluation import diagnostics
from onpolicy_skd.learner import forward, micro_batch
from onpolicy_skd.learner.learner import Learner, NonFiniteLossError, SamplerGapError
from onpolicy_skd.learner.optimizer import learner_threads, learning_rate
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.lm_head import row_statistics
from onpolicy_skd.models.loading import load_model, load_tokenizer
from onpolicy_skd.models.split_model import split
from onpolicy_skd.selection.positions import num_selected
from onpolicy_skd.storage import checkpoint


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
        chosen = entropy.topk(num_selected(k, len(entropy))).indices
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
    actual = gradients(learner, teacher, batch)
    assert actual.keys() == expected.keys()
    assert relative(actual, expected) < 1e-5
    assert learner.accumulate(batch).loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 90, 10_000])
@pytest.mark.parametrize("order", ["as is", "reversed", "shuffled"])
def test_gradient_does_not_depend_on_the_cut_or_the_order(budget, order):
    batch = make_trajectories(LENGTHS)
    expected = gradients(*build(), batch)
    places = {"as is": range(8), "reversed": range(7, -1, -1), "shuffled": [3, 0, 7, 5, 1, 6, 2, 4]}[order]
    actual = gradients(*build(budget=budget), [batch[i] for i in places])
    assert relative(actual, expected) < 1e-5


@pytest.mark.parametrize("expected_weight", [8.0, 13.0])
def test_a_step_whose_trajectories_arrive_in_batches_is_the_same_step(expected_weight):
    """Fewer trajectories than expected may arrive."""
    (learner, teacher), (streaming, other) = build(learner={"lr": 1e-2}), build(learner={"lr": 1e-2})
    for _ in range(3):
        batch = make_trajectories(LENGTHS, version=learner.version)
        teacher.encode(batch)
        expected = learner.step(batch).as_dict()
        other.encode(batch)
        streaming.begin_step(expected_weight)
        for arrived in (batch[:1], batch[1:5], batch[5:]):
            streaming.add_trajectories(arrived)
        record = streaming.end_step().as_dict()
        assert record.keys() == expected.keys()
        for key in expected.keys() - {"learner_seconds", "teacher_wait_seconds", "padding_share"}:
            assert record[key] == pytest.approx(expected[key], rel=1e-4), key
    for a, b in zip(learner.state.named.values(), streaming.state.named.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_gradient_does_not_depend_on_the_padding_side(family, tied, monkeypatch):
    batch = make_trajectories(LENGTHS)
    expected = gradients(*build(family, tied), batch)
    monkeypatch.setattr(forward, "collate", functools.partial(collate, padding_side="left"))
    assert relative(gradients(*build(family, tied), batch), expected) < 1e-5


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_lora_trains_its_adapters_and_leaves_a_plain_model(family, tied, tmp_path):
    """The merged weights are the model that was trained, under the names of a checkpoint, in engines and on disk."""
    batch = make_trajectories(LENGTHS)
    learner, teacher = build(family, tied, lora=4, learner={"lr": 1e-2, "warmup_steps": 0})
    before = tiny_model(family, tied)
    assert learner.state.named
    assert all(".lora_" in name for name in learner.state.named)
    assert sum(p.numel() for p in learner.state.named.values()) < 0.5 * sum(p.numel() for p in before.parameters())
    teacher.encode(batch)
    assert dict(learner.state.weights()).keys() == dict(before.named_parameters()).keys()
    for name, weight in learner.state.weights():
        assert torch.equal(weight, before.get_parameter(name)), name  # they begin with nothing
    losses = []
    for _ in range(15):
        losses.append(learner.step([dataclasses.replace(t, policy_version=learner.version) for t in batch]).loss)
    assert losses[-1] < 0.8 * losses[0]
    learner.state.save_pretrained(tmp_path / "m", load_tokenizer("bundled:demo_student"))
    plain, collated = load_model(str(tmp_path / "m"), torch.float32, "cpu").eval(), collate(batch, 0)
    with torch.no_grad():
        trained = learner.student.hidden(collated)
        assert torch.allclose(split(plain, VOCABULARY).hidden(collated), trained, atol=1e-4)
        moved = sum(not torch.equal(w, before.get_parameter(n)) for n, w in plain.named_parameters())
        assert 0 < moved < len(list(plain.parameters()))
    kept = {n: t.clone() for n, t in learner.state.tensors().items()}
    assert all(".lora_" in name for name in kept if name.startswith("model/"))
    again, _ = build(family, tied, lora=4, learner={"lr": 1e-2})
    again.state.restore(kept, learner.version)
    assert torch.equal(again.student.hidden(collated), learner.student.hidden(collated))


def test_activation_checkpointing_changes_nothing():
    batch = make_trajectories(LENGTHS)
    learner, teacher = build(student={"activation_checkpointing": True})
    passes = []
    learner.student.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    saved = gradients(learner, teacher, batch)
    assert len(passes) == 2  # forward, and again in backward
    assert relative(saved, gradients(*build(), batch)) < 1e-6


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_teacher_equal_to_student_gives_no_divergence_and_no_update(family, tied):
    learner, teacher = build(family, tied, teacher=tiny_model(family, tied), positions={"k": 1.0})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    record = learner.step(batch)
    assert record.divergence_selected < 1e-6
    assert record.grad_norm < 1e-5


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
        values.append(learner.step(batch).divergence_selected)
    assert learner.version == 30
    assert values[-1] < 0.5 * values[0]
    assert learner.scorer.divergence(batch) == pytest.approx(values[-1], rel=0.3)


def test_a_gap_between_sampler_and_learner_stops_the_run_before_the_update():
    learner, teacher = build(sync={"max_gap": 0.01})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    before = {n: p.clone() for n, p in learner.state.named.items()}
    with pytest.raises(SamplerGapError, match=r"sync\.max_gap=0\.01"):
        learner.step(batch)
    assert all(torch.equal(p, before[n]) for n, p in learner.state.named.items())
    model = learner.student
    agreeing = []
    for t in batch:
        single = collate([t], 0)
        with torch.no_grad():
            logprob = row_statistics(model.hidden(single), model.head_VH, single.targets).raw_logprob_N
        agreeing.append(dataclasses.replace(t, sampler_logprobs=logprob.numpy()))
    assert learner.step(agreeing).sampler_gap < 1e-5


def test_a_loss_that_is_not_finite_is_no_update_and_names_its_samples():
    learner, teacher = build(budget=40)
    batch = make_trajectories(LENGTHS)
    before = {n: p.clone() for n, p in learner.state.named.items()}
    teacher.encode(batch)
    teacher._hidden["t3"] = torch.full_like(teacher._hidden["t3"], math.nan)
    with pytest.raises(NonFiniteLossError, match=r"loss nan.*from 1 samples \(t3\)") as caught:
        learner.step(batch)
    assert caught.value.samples == ["t3"]
    assert learner.version == 0
    assert all(torch.equal(p, before[n]) for n, p in learner.state.named.items())
    assert not any(p.grad is not None for p in learner.state.named.values())
    assert not learner.state.optimizer.state
    teacher.release(["t3"])
    teacher.encode(batch)
    assert math.isfinite(learner.step(batch).loss)  # the next step is not affected


def test_a_gradient_that_overflows_is_no_update():
    learner, teacher = build()
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    name, parameter = next((n, p) for n, p in learner.state.named.items() if "embed" not in n)
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    before = parameter.clone()
    with pytest.raises(NonFiniteLossError, match=f"gradient norm (nan|inf), from {len(batch)} samples"):
        learner.step(batch)
    handle.remove()
    assert torch.equal(learner.state.named[name], before)


def test_trajectories_of_another_policy_are_refused():
    learner, teacher = build()
    batch = make_trajectories(LENGTHS, version=1)
    teacher.encode(batch)
    with pytest.raises(RuntimeError, match="policy version 1"):
        learner.step(batch)


def test_one_step_of_staleness_is_trained_on_if_allowed_and_not_an_error_of_the_engine():
    learner, teacher = build(pipeline={"max_staleness": 1}, sync={"max_gap": 0.01})
    learner.state.version = 1
    batch = recorded(learner, make_trajectories(LENGTHS))  # of version 0
    far = [dataclasses.replace(t, sampler_logprobs=t.sampler_logprobs - 0.3, sampler_entropy=None) for t in batch]
    teacher.encode(far)
    record = learner.step(far)
    assert record.staleness == 1
    assert record.policy_gap == pytest.approx(0.3, abs=1e-4)
    assert record.sampler_gap is None
    teacher.encode(far)
    with pytest.raises(RuntimeError, match="at most 1 steps of staleness"):
        learner.step(far)


def recorded(learner, trajectories):
    """Return ``trajectories`` as an engine of the same weights would record them."""
    result = []
    for t in trajectories:
        batch = collate([t], 0)
        with torch.no_grad():
            stats = row_statistics(learner.student.hidden(batch), learner.student.head_VH, batch.targets)
        fields = {"sampler_logprobs": stats.raw_logprob_N.numpy(), "sampler_entropy": stats.entropy_N.numpy()}
        result.append(dataclasses.replace(t, **fields))
    return result


@pytest.mark.parametrize("positions", [{"k": 0.3}, {"policy": "full"}, {"metric": "student_ce", "k": 0.5}])
def test_entropies_of_the_engine_give_the_same_step_without_a_pass_over_the_learners_head(positions, monkeypatch):
    plain, plain_teacher = build(positions=positions)
    fed, teacher = build(positions=positions, rollout={"entropy": "engine"})
    batch = make_trajectories(LENGTHS)
    batch = recorded(plain, batch)
    without = [dataclasses.replace(t, sampler_entropy=None) for t in batch]
    assert fed.scorer.score_samples(batch) == pytest.approx(plain.scorer.score_samples(without), rel=1e-5)
    plain_teacher.encode(without)
    expected = plain.step(without)
    monkeypatch.setattr(micro_batch, "row_statistics", None)  # would raise if it were called
    teacher.encode(batch)
    record = fed.step(batch)
    for name in ("loss", "grad_norm", "entropy", "entropy_selected", "student_logprob", "positions_selected"):
        assert getattr(record, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert record.entropy_gap < 1e-5
    assert record.sampler_gap < 1e-5
    for a, b in zip(plain.state.named.values(), fed.state.named.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_all_positions_need_one_pass_over_the_head(monkeypatch):
    learner, teacher = build(positions={"policy": "full"})
    monkeypatch.setattr(micro_batch, "row_statistics", None)
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    assert learner.step(batch).entropy > 0


def test_sample_filter_ranks_by_mean_entropy_and_counts():
    learner, _ = build(samples={"keep": 0.25})
    batch = make_trajectories(LENGTHS)
    batch[2] = dataclasses.replace(batch[2], finish_reason="length")
    report, kept = learner.scorer.filter(batch)
    assert [t.key for t in kept] == report.kept
    scores = dict(zip([t.key for t in batch], learner.scorer.score_samples(batch), strict=True))
    valid = [t.key for t in batch if t.finish_reason == "stop"]
    assert set(report.kept) == set(sorted(valid, key=scores.get, reverse=True)[:2])
    assert report.dropped == {"truncated": 1, "not_selected": 5}
    empty, _ = learner.scorer.filter([dataclasses.replace(t, finish_reason="length") for t in batch])
    assert empty.kept == []
    assert empty.dropped == {"truncated": 8}


@pytest.mark.parametrize("truncated", ["drop", "keep"])
def test_what_a_growing_limit_cuts_is_not_truncated(truncated):
    """Lengths 4 to 20: the limit of this step is 11, rollout.max_tokens 15."""
    rollout = {"max_tokens": 15, "max_tokens_start": 2}
    learner, _ = build(rollout=rollout, samples={"truncated": truncated})
    batch = [dataclasses.replace(t, finish_reason="length") for t in make_trajectories(LENGTHS)]
    report, kept = learner.scorer.filter(batch)
    long = [t.key for t in batch if len(t.response_ids) >= 15]
    assert len(long) == report.truncated == 3
    assert report.dropped == ({"truncated": 3} if truncated == "drop" else {})
    assert {t.key for t in kept} == {t.key for t in batch} - set(long if truncated == "drop" else [])


def test_mean_entropy_is_the_mean_over_the_response():
    learner, _ = build(budget=60)
    batch = make_trajectories(LENGTHS)
    for t, score in zip(batch, learner.scorer.score_samples(batch), strict=True):
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        log_q = learner.student.model(input_ids=ids).logits[0, len(t.prompt_ids) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(-(log_q.exp() * log_q).sum(-1).mean().item(), rel=1e-4)


# Every variant of selection, alignment and class axis: what all of them must keep.
FORWARD = {"divergence": "forward_kl"}
VARIANTS = {
    "top_k": {"student": {"activation_checkpointing": True}},
    "teacher_entropy": {"positions": {"metric": "teacher_entropy"}},
    "kl": {"positions": {"metric": "kl"}},
    "ce_ratio_plus_entropy": {"positions": {"metric": "ce_ratio_plus_entropy"}},
    "tip_soft_or": {"positions": {"metric": "tip_soft_or"}},
    "ta_opd": {"positions": {"metric": "ta_opd", "top_classes": 5}},
    "teacher_mass": {"positions": {"metric": "teacher_mass", "k": 0.4}},
    "margin": {"positions": {"metric": "margin", "top_classes": 5}},
    "overlap": {"positions": {"metric": "overlap", "top_classes": 5, "k": 0.4}},
    "random": {"positions": {"metric": "random"}},
    "gls": {"positions": {"policy": "gls", "k": 0.3, "queue": 90}},
    "curriculum": {"positions": {"policy": "curriculum", "curriculum_steps": 5}},
    "sampled": {"positions": {"policy": "sampled", "k": 0.5}},
    "sampled_unbiased": {"positions": {"policy": "sampled_unbiased", "k": 0.5, "coverage": 0.5}},
    "weighted": {"positions": {"policy": "weighted"}},
    "budget_schedule": {"positions": {"k_start": 0.1, "k": 0.9, "schedule_steps": 4}},
    "bandit": {"positions": {"policy": "bandit", "arms": ["reverse_kl", "tip_soft_or", "random"]}},
    "topk_tail": {"alignment": {"estimator": "topk_tail", "top_k": 5}},
    "student_topk_tail": {"alignment": {"estimator": "student_topk_tail", "top_k": 5}},
    "sampled_token": {"alignment": {"estimator": "sampled"}},
    "eopd": {"alignment": {"mixture": {"gate": "eopd", "teacher_threshold": 2.0, "skew": 0.1}}},
    "zones": {
        "alignment": {
            "mixture": {
                "gate": "zones",
                "student_threshold": 2.0,
                "teacher_threshold": 2.0,
                "start": [0.0, 1.0],
                "schedule": "cosine",
                "steps": 5,
            }
        }
    },
    "iw": {"positions": {"weighting": "iw", "k": 0.5}},
    "ramp": {
        "positions": {
            "weighting": "ramp",
            "weighting_gamma": -0.9,
            "metric": "tip_q3",
            "mask_tokens": [*range(40, 60), "special"],
        }
    },
    "masked": {"positions": {"policy": "gls", "k": 0.3, "queue": 90, "mask_tokens": list(range(50))}},
    "skewed": {"alignment": {"mixture": {"gate": "constant", "reverse_weight": 1.0, "skew": 0.1}}},
    "clip": {"alignment": {"clip": 2.0, "clip_mode": "scale"}},
    "clip_mask": {"alignment": {"clip": 2.0, "clip_mode": "mask"}},
    "decoupled_kd": {"alignment": {"variant": "decoupled_kd", "other_weight": 3.0, **FORWARD}},
    "at_kd": {"alignment": {"variant": "at_kd", **FORWARD}, "positions": {"policy": "full"}},
    "egad": {"alignment": {"variant": "egad", "feature_entropy": 0.3}},
    "ema_self": {"alignment": {"ema_weight": 0.5, "ema_decay": 0.5}},
    "reference": {"alignment": {"reference_weight": 0.5}},
    "rs_kd": {"classes": {"sampler": "rs_kd", "draws": 6}, "alignment": FORWARD},
    "ghost_token": {"classes": {"sampler": "ghost_token", "k": 6}, "alignment": FORWARD},
}


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    """Measure a bandit's progress on fewer samples than a batch has."""
    monkeypatch.setattr("onpolicy_skd.learner.learner.PROBE_SAMPLES", 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_depends_on_how_the_batch_is_cut_or_padded(name, monkeypatch):
    batch = make_trajectories(LENGTHS)
    learner, teacher = build(**VARIANTS[name])
    teacher.encode(batch)
    learner.step(batch)  # gives queues, schedules and averages a state
    state = {n: t.clone() for n, t in learner.state.tensors().items()}
    later = make_trajectories(LENGTHS, seed=5, version=1)
    expected = gradients(learner, teacher, later)
    assert sum(g.norm() for g in expected.values()) > 0
    for budget, side in ((40, "right"), (10_000, "left")):
        monkeypatch.setattr(forward, "collate", functools.partial(collate, padding_side=side))
        cut, teacher = build(budget=budget, **VARIANTS[name])
        cut.state.restore(state, 1)
        assert relative(gradients(cut, teacher, later), expected) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resumes_with_the_losses_of_an_uninterrupted_run(name, tmp_path):
    def run(learner, teacher, versions):
        records = []
        for version in versions:
            batch = make_trajectories(LENGTHS, seed=version, version=version)
            teacher.encode(batch)
            record = learner.step(batch).as_dict()
            records.append({k: v for k, v in record.items() if not k.endswith("seconds")})
        return records

    options = {"learner": {"lr": 1e-2, "weight_decay": 0.1}, **VARIANTS[name]}
    uninterrupted = run(*build(**options), range(7))
    learner, teacher = build(**options)
    first = run(learner, teacher, range(4))
    checkpoint.save(tmp_path, 4, {}, learner.state.tensors(), keep=1)
    resumed, teacher = build(**options)
    resumed.state.restore(checkpoint.newest(tmp_path).tensors, 4)
    assert first + run(resumed, teacher, range(4, 7)) == uninterrupted


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_in_bfloat16_on_float32_masters(name):
    variant = {k: dict(v) for k, v in VARIANTS[name].items()}
    learner, teacher = build(**{**variant, "learner": {"compute_dtype": "bfloat16", "lr": 1e-3}})
    for version in range(2):
        batch = make_trajectories(LENGTHS, seed=version, version=version)
        teacher.encode(batch)
        record = learner.step(batch)
        assert math.isfinite(record.loss)
        assert record.grad_norm > 0
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in learner.state.named.values())


@pytest.mark.parametrize("name", ["kl", "gls", "sampled_unbiased", "topk_tail", "decoupled_kd", "at_kd", "egad"])
def test_every_variant_lowers_the_divergence(name):
    learner, teacher = build(**{"learner": {"lr": 1e-2, "warmup_steps": 0}, **VARIANTS[name]})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    before = learner.scorer.divergence(batch)
    for version in range(30):
        learner.step([dataclasses.replace(t, policy_version=version) for t in batch])
    assert learner.scorer.divergence(batch) < 0.85 * before


def test_mass_and_overlap_are_means_over_all_positions_of_some_steps():
    learner, teacher = build(budget=60, positions={"top_classes": 7})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    masses, overlaps = [], []
    for t in batch:
        ids, first = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None], len(t.prompt_ids) - 1
        with torch.no_grad():
            q, p = (m(input_ids=ids).logits[0, first:-1].double().softmax(-1)
                    for m in (learner.student.model, teacher._model.model))  # fmt: skip
        top, of_teacher = q.topk(7).indices, p.topk(7).indices
        masses += p.gather(1, top).sum(1).tolist()
        overlaps += (top[:, :, None] == of_teacher[:, None]).any(-1).double().mean(1).tolist()
    record = learner.step(batch)
    assert record.teacher_mass == pytest.approx(np.mean(masses), rel=1e-4)
    assert record.overlap == pytest.approx(np.mean(overlaps), rel=1e-6)
    later = learner.step([dataclasses.replace(t, policy_version=1) for t in batch]).as_dict()
    assert not {"teacher_mass", "overlap"} & later.keys()
    equal, teacher = build(teacher=tiny_model("qwen3", False))
    teacher.encode(batch)
    assert equal.step(batch).overlap == 1.0


def test_a_score_and_the_metrics_of_a_step_share_the_teachers_rows(monkeypatch):
    learner, teacher = build(positions={"metric": "margin"})
    batch, requests, rows = make_trajectories(LENGTHS), [], teacher.rows
    teacher.encode(batch)
    monkeypatch.setattr(teacher, "rows", lambda request: requests.append(request) or rows(request))
    learner.step(batch)
    assert len(requests) == 1


def test_at_kd_treats_the_less_sure_half_of_the_batch_as_hard():
    """Both halves against the formulas in float64: lambda * NCKD on easy, (1 - lambda)(TCKD + NCKD) on hard ones."""
    learner, teacher = build(
        alignment={"variant": "at_kd", "easy_weight": 0.3, **FORWARD}, positions={"policy": "full"}
    )
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    per_position = []
    for t in batch:
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        first, y = len(t.prompt_ids) - 1, torch.as_tensor(t.response_ids)[:, None]
        with torch.no_grad():
            q = learner.student.model(input_ids=ids).logits[0, first:-1].double().softmax(-1)
            p = teacher._model.model(input_ids=ids).logits[0, first:-1].double().softmax(-1)
        q_y, p_y = q.gather(1, y), p.gather(1, y)
        tckd = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
        terms = p / (1 - p_y) * (p / (1 - p_y) * (1 - q_y) / q).log()
        nckd = terms.scatter(1, y, 0.0).sum(1, keepdim=True)
        per_position.append(torch.cat([1 - p_y, tckd, nckd, torch.full_like(p_y, 1 / len(y) / len(batch))], 1))
    unsure, tckd, nckd, weight = torch.cat(per_position).T
    hard = unsure >= unsure.sort(descending=True).values[math.ceil(len(unsure) / 2) - 1]
    expected = (weight * torch.where(hard, 0.7 * (tckd + nckd), 0.3 * nckd)).sum()
    assert learner.accumulate(batch).loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "call"),
    [
        ({}, "rows"),
        ({"positions": {"metric": "teacher_entropy"}}, "entropy_and_logprob"),
        ({"alignment": {"variant": "at_kd", **FORWARD}}, "entropy_and_logprob"),
        ({"classes": {"sampler": "rs_kd", "draws": 6}, "alignment": FORWARD}, "classes"),
    ],
)
def test_the_wait_for_the_teacher_counts_each_kind_of_call(sections, call, monkeypatch):
    learner, teacher = build(**sections)
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    answer = getattr(teacher, call)
    monkeypatch.setattr(teacher, call, lambda *arguments: time.sleep(0.2) or answer(*arguments))
    assert learner.accumulate(batch).teacher_wait_seconds > 0.2


def test_egad_sets_temperatures_and_compares_hidden_states_where_the_teacher_is_unsure():
    egad = {"variant": "egad", "min_temperature": 0.8, "max_temperature": 2.5, "feature_weight": 0.7}
    learner, teacher = build(alignment={**egad, "feature_entropy": 0.8}, positions={"k": 1.0})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    projection = learner.state.named["objective.projection"]
    expected = 0.0
    for t in batch:
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        first = len(t.prompt_ids) - 1
        with torch.no_grad():
            log_p = teacher._model.model(input_ids=ids).logits[0, first:-1].log_softmax(-1)
            share = -(log_p.exp() * log_p).sum(-1) / math.log(VOCABULARY)
            temperature = (2.5 - 1.7 * share)[:, None]
            log_q = (learner.student.model(input_ids=ids).logits[0, first:-1] / temperature).log_softmax(-1)
            rows = (log_q.exp() * (log_q - (log_p / temperature).log_softmax(-1))).sum(-1)
            hidden = learner.student.backbone(input_ids=ids).last_hidden_state[0, first:-1]
            other = teacher._model.backbone(input_ids=ids).last_hidden_state[0, first:-1]
            feature = (hidden @ projection.T - other).square().mean(-1)
            assert 0 < (share >= 0.8).float().mean() < 1 or len(share) < 9
        expected += (rows + 0.7 * (share >= 0.8) * feature).mean().item() / len(batch)
    assert learner.accumulate(batch).loss == pytest.approx(expected, rel=1e-4)
    assert projection.grad.norm() > 0


def test_the_average_of_the_student_follows_it():
    learner, teacher = build(alignment={"ema_weight": 1.0, "ema_decay": 0.75}, learner={"lr": 1e-2})
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    plain, other = build()
    other.encode(batch)
    assert relative(gradients(learner, teacher, batch), gradients(plain, other, batch)) < 1e-5  # no distance yet
    before = {n: p.detach().clone() for n, p in learner.state.named.items()}
    learner.step(batch)
    average = {n.partition("/")[2]: t for n, t in learner.state.tensors().items() if n.startswith("objective/")}
    for name, new in learner.state.named.items():
        assert torch.allclose(average[name], 0.75 * before[name] + 0.25 * new, atol=1e-6)
    again = [dataclasses.replace(t, policy_version=1) for t in batch]
    plain.state.restore({n: t for n, t in learner.state.tensors().items() if not n.startswith("objective/")}, 1)
    assert relative(gradients(learner, teacher, again), gradients(plain, other, again)) > 1e-3


def test_the_reference_adds_the_reverse_kl_from_the_initial_student():
    """Checked against float64 and autograd; other divergences and estimators of the teacher's term do not change it."""
    batch = make_trajectories(LENGTHS)
    learner, teacher = build(alignment={"reference_weight": 0.7}, learner={"lr": 1e-2, "warmup_steps": 0})
    initial = copy.deepcopy(learner.student.model)
    teacher.encode(batch)
    record = learner.step(batch)
    assert record.reference_kl == pytest.approx(0.0, abs=1e-6)  # still the initial student
    state = {n: t.clone() for n, t in learner.state.tensors().items()}
    later = make_trajectories(LENGTHS, seed=5, version=1)
    value, distance = dense_gradients(learner.student.model, initial, later, 0.2)
    for section in ({}, {"divergence": "forward_kl"}, {"estimator": "topk_tail", "kd_weight": 0.5}):
        learner, teacher = build(alignment={"reference_weight": 0.7, **section})
        plain, other = build(alignment=section)
        for each in (learner, plain):
            each.state.restore(state, 1)
        actual, without = gradients(learner, teacher, later), gradients(plain, other, later)
        assert relative({n: (actual[n] - without[n]) / 0.7 for n in actual}, distance) < 1e-3
        loss = learner.accumulate(later).loss - plain.accumulate(later).loss
        assert loss == pytest.approx(0.7 * value, rel=1e-3)
    assert learner.step(later).reference_kl > 1e-3


def test_a_reference_without_weight_changes_nothing():
    batch = make_trajectories(LENGTHS)
    with_zero, without = (gradients(*build(alignment=section), batch) for section in ({"reference_weight": 0.0}, {}))
    assert all(torch.equal(with_zero[name], gradient) for name, gradient in without.items())
    learner, teacher = build(alignment={"reference_weight": 0.0})
    teacher.encode(batch)
    assert learner.step(batch).reference_kl is None


def test_with_all_classes_the_sparse_targets_are_full_kd():
    batch = make_trajectories(LENGTHS)
    full = gradients(*build(alignment=FORWARD), batch)
    all_classes = {"sampler": "top_k", "k": VOCABULARY}
    assert relative(gradients(*build(alignment=FORWARD, classes=all_classes), batch), full) < 1e-4
    drawn = gradients(*build(alignment=FORWARD, classes={"sampler": "rs_kd", "draws": 20_000}), batch)
    assert relative(drawn, full) < 0.1


def test_gls_may_leave_a_sample_without_positions():
    learner, teacher = build(positions={"policy": "gls", "k": 0.02})
    first, later = make_trajectories(LENGTHS), make_trajectories([(4, 2), (5, 2)], version=1)
    teacher.encode(first)
    learner.step(first)
    teacher.encode(later)
    record = learner.step(later)
    assert record.positions_selected in range(3)
    assert math.isfinite(record.loss)


@pytest.mark.parametrize("metric", ["kl", "ce_ratio", "random"])
def test_samples_are_ranked_by_the_other_metrics(metric):
    learner, teacher = build(samples={"metric": metric, "keep": 0.25}, budget=60)
    batch = make_trajectories(LENGTHS)
    scores = learner.scorer.score_samples(batch)
    assert teacher.stored == 0
    for t, score in zip(batch, scores, strict=True):
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        first, y = len(t.prompt_ids) - 1, torch.as_tensor(t.response_ids)[:, None]
        with torch.no_grad():
            log_q = learner.student.model(input_ids=ids).logits[0, first:-1].log_softmax(-1)
            log_p = teacher._model.model(input_ids=ids).logits[0, first:-1].log_softmax(-1)
        expected = {
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
            "ce_ratio": log_q.gather(1, y).mean() / log_p.gather(1, y).mean(),
        }
        if metric in expected:
            assert score == pytest.approx(expected[metric].item(), rel=1e-4)
    report, kept = learner.scorer.filter(batch)
    order = sorted(range(8), key=lambda i: -scores[i])[:2]
    assert [t.key for t in kept] == [f"t{i}" for i in sorted(order)]
    assert report.dropped == {"not_selected": 6}
    assert teacher.stored == (0 if metric == "random" else 2)  # what was kept need not be encoded again


def test_samples_that_cannot_be_read_rank_last():
    learner, _ = build(samples={"keep": 0.5})
    batch = make_trajectories(LENGTHS[:4])
    batch[1] = dataclasses.replace(batch[1], response_ids=np.array([], dtype=np.int64))
    batch[2].response_ids[0] = VOCABULARY
    scores = learner.scorer.score_samples(batch)
    assert [math.isinf(s) for s in scores] == [False, True, True, False]


def test_paced_samples_weigh_by_the_pass_rate_of_their_prompt():
    verdicts = [True, False, False, True, True, False]
    keys = ["a/0", "a/1", "a/2", "b/0", "b/1", "c/0"]
    batch = [
        dataclasses.replace(t, key=k, correct=c)
        for t, k, c in zip(make_trajectories(LENGTHS[:6]), keys, verdicts, strict=True)
    ]
    learner, teacher = build(samples={"weight": "paced"}, rollout={"n": 2})
    report, kept = learner.scorer.filter(batch)
    assert report.dropped == {"no_pace": 3}
    assert [t.weight for t in kept] == pytest.approx([2 / 9] * 3)
    mixed = [dataclasses.replace(t, weight=w) for t, w in zip(kept, (1.0, 2.0, 5.0), strict=True)]
    actual = gradients(learner, teacher, mixed)
    alone = [gradients(*build(), [t]) for t in kept]
    expected = {n: (alone[0][n] + 2 * alone[1][n] + 5 * alone[2][n]) / 8 for n in actual}
    assert relative(actual, expected) < 1e-5


def test_one_step_off_policy_gives_the_weights_of_one_step_on_policy():
    """The same trajectories, once as the student's own, once as references: nothing else may differ."""
    weights = []
    for version in (0, None):
        learner, teacher = build(learner={"lr": 1e-2}, mode="on_policy" if version == 0 else "off_policy",
                                 alignment={"divergence": "reverse_kl"})  # fmt: skip
        batch = [dataclasses.replace(t, policy_version=version) for t in make_trajectories(LENGTHS)]
        teacher.encode(batch)
        record = learner.step(batch)
        assert (record.sampler_gap is not None) == (version == 0)
        weights.append({n: p.detach().clone() for n, p in learner.state.named.items()})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    learner, _ = build()
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        learner.state.restore({"model/other": torch.zeros(1)}, 0)


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


@pytest.mark.parametrize(
    ("sections", "threads"),
    [({}, 8), ({"learner": {"ranks": 2}}, 4), ({"learner": {"threads": 3}}, 3), ({"pipeline": {"streaming": True}}, 7),
     ({"pipeline": {"max_staleness": 1}, "learner": {"ranks": 2}}, 3), ({"learner": {"ranks": 9}}, 1)],
)  # fmt: skip
def test_the_learner_takes_all_cores_where_roles_alternate(monkeypatch, sections, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert learner_threads(resolve(sections)) == threads


def test_learning_rate_warms_up_and_falls():
    cfg = tiny_settings(learner={"lr": 1.0, "warmup_steps": 3, "min_lr_ratio": 0.1}).learner
    rates = [learning_rate(cfg, s, 103) for s in range(103)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))
    linear = cfg.model_copy(update={"schedule": "linear"})
    assert learning_rate(linear, 53, 103) == pytest.approx(0.55)
    assert learning_rate(cfg.model_copy(update={"schedule": "constant"}), 90, 103) == 1.0


@pytest.mark.parametrize("positions", [{"k": 0.3}, {"metric": "tip_soft_or"}, {"policy": "full"}])
def test_diagnostics_show_what_training_would_select_and_what_it_costs(positions):
    """In the order asked, whatever the micro-batches; its means are those of a step on the same batch."""
    batch = make_trajectories(LENGTHS)
    learner, teacher = build(positions=positions, budget=60)
    teacher.encode(batch)
    diagnosed = learner.scorer.diagnose_positions(batch)
    assert [i.key for i in diagnosed] == [t.key for t in batch]
    for t, d in zip(batch, diagnosed, strict=True):
        assert len(d.entropy) == len(d.divergence) == len(d.selected) == len(t.response_ids)
        k = 1.0 if positions.get("policy") == "full" else learner._settings.positions.k
        assert d.selected.sum() == num_selected(k, len(t.response_ids))
    means = diagnostics.means(diagnosed)
    assert means["divergence"] == pytest.approx(learner.scorer.divergence(batch), rel=1e-5)
    record = learner.step(batch)
    assert means["divergence_selected"] == pytest.approx(record.divergence_selected, rel=1e-4)
    assert means["entropy_selected"] == pytest.approx(record.entropy_selected, rel=1e-4)
    assert (means["divergence_unselected"] is None) == (positions.get("policy") == "full")
    assert diagnostics.means([]) == {"divergence": None}
