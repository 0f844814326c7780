"""Models with a soft cap, a scale or a bias of the logits, as student and as teacher, against dense logits."""

import copy

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_settings
from learner_helpers import LENGTHS, gradients, relative
from transformers import AutoConfig, AutoModelForCausalLM

from actors.serialization import pack_head, unpack_head
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.split_model import split
from onpolicy_skd.teacher import cache_format as caches
from onpolicy_skd.teacher.cache_format import Layout, Manifest
from onpolicy_skd.teacher.cached_teacher import open_teacher
from onpolicy_skd.teacher.teacher import Teacher

FAMILIES = {
    "gemma2": {"final_logit_softcapping": 3.0, "num_key_value_heads": 1, "head_dim": 16},
    "cohere": {"logit_scale": 0.0625, "num_key_value_heads": 1, "use_qk_norm": False},
    "granite": {"logits_scaling": 6.0, "num_key_value_heads": 1},
    "phi": {},
}
ORDERS = [("gemma2", "phi"), ("cohere", "gemma2"), ("granite", "cohere"), ("phi", "granite")]


def tiny(name, hidden=32, seed=0):
    """Return a two-layer model of a family, with logits that reach a soft cap, and a bias that is not zero."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False,
        initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape | FAMILIES[name])).float().eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.data.normal_()
    if name in ("cohere", "granite"):  # else rounding decides: both distributions would be nearly uniform
        head.weight.data.mul_(8.0)
    return model


def build(student, teacher, **sections):
    settings = tiny_settings(**sections)
    other = Teacher(split(teacher, VOCABULARY), 10_000, 0)
    return Learner(split(student, VOCABULARY), other, settings, pad_id=0, steps=10), other, settings


def dense(student, teacher, batch):
    """Return loss, divergences and gradients of reverse KL at all positions, from dense float64 logits."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    total, values = 0.0, []
    for t in batch:
        ids = torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None]
        at = slice(len(t.prompt_ids) - 1, -1)
        log_q = student(input_ids=ids).logits[0, at].log_softmax(-1)
        log_p = teacher(input_ids=ids).logits[0, at].detach().log_softmax(-1)
        rows = (log_q.exp() * (log_q - log_p)).sum(-1)
        values.append(rows.detach())
        total = total + rows.mean() / len(batch)
    total.backward()
    gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}
    return total.item(), torch.cat(values), gradient


@pytest.mark.parametrize(("student", "teacher"), ORDERS)
def test_loss_divergence_and_gradient_are_those_of_dense_logits(student, teacher):
    models, batch = (tiny(student), tiny(teacher, 48, seed=1)), make_trajectories(LENGTHS)
    learner, other, _ = build(*models, positions={"policy": "full"})
    loss, values, expected = dense(*models, batch)
    actual = gradients(learner, other, batch)
    assert actual.keys() == expected.keys()
    assert relative(actual, expected) < 1e-5
    assert learner.accumulate(batch).loss == pytest.approx(loss, rel=1e-5)
    diagnosed = np.concatenate([d.divergence for d in learner.scorer.diagnose_positions(batch)])
    np.testing.assert_allclose(diagnosed, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_does_not_move_towards_itself(name):
    batch = make_trajectories(LENGTHS)
    learner, teacher, _ = build(tiny(name), tiny(name), positions={"policy": "full"})
    teacher.encode(batch)
    record = learner.step(batch)
    assert abs(record.loss) < 1e-6
    assert record.grad_norm < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_crosses_the_wire_and_a_cache_with_its_transform(name, tmp_path):
    model, batch = tiny(name), make_trajectories(LENGTHS)
    _, teacher, settings = build(tiny("gemma2"), model, mode="off_policy", cache={"path": tmp_path})
    layout, head = Layout.of(settings, VOCABULARY), teacher.head()
    shards = [caches.write_shard(tmp_path, 0, batch, teacher, settings, VOCABULARY)]
    digest = caches.write_head(tmp_path, head)
    plan = caches.plan_of([t.digest for t in batch], [range(len(batch))])
    caches.complete(tmp_path, Manifest({}, layout, plan, digest, shards))
    cached = open_teacher(settings, "cpu")
    for other in (unpack_head(pack_head(head)), cached.head()):
        assert (other.scale, other.cap) == (head.scale, head.cap)
        assert torch.equal(other.weight_VH, head.weight_VH)
        assert (other.bias_V is None) == (head.bias_V is None)
        assert head.bias_V is None or torch.equal(other.bias_V, head.bias_V)
    keys = [t.key for t in batch]
    for t in (teacher, cached):
        t.encode(batch)
    for a, b in zip(teacher.entropy_and_logprob(keys), cached.entropy_and_logprob(keys), strict=True):
        torch.testing.assert_close(a, b)
    positions = {t.key: len(t.target_ids) for t in batch}
    entropy, logprob = teacher.entropy_and_logprob(keys)
    assert len(entropy) == sum(positions.values())
    assert logprob.max() < 0


def test_a_moving_average_keeps_the_transform():
    models, batch = (tiny("gemma2"), tiny("phi", 48, seed=1)), make_trajectories(LENGTHS)
    learner, teacher, _ = build(*models, positions={"policy": "full"}, alignment={"ema_weight": 0.5})
    plain, other, _ = build(tiny("gemma2"), tiny("phi", 48, seed=1), positions={"policy": "full"})
    teacher.encode(batch)
    other.encode(batch)
    assert learner.step(batch).loss == pytest.approx(plain.step(batch).loss, rel=1e-5)  # no distance from itself
