"""Packed rows, kept apart in the attention, compared with padded ones with a response each."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from learner_helpers import build, gradients, relative

from onpolicy_skd.models.batch import collate, first_fit, micro_batches
from onpolicy_skd.models.split_model import split

MIXED = [(1, 1), (5, 9), (3, 20), (40, 60), (2, 1), (12, 4), (7, 33), (9, 11), (4, 96)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_first_fit_leaves_no_two_in_one_place(lengths):
    width = max(lengths)
    taken = np.zeros((len(lengths), width), dtype=int)
    for (row, start), length in zip(first_fit(lengths, width), lengths, strict=True):
        taken[row, start : start + length] += 1
    assert taken.max() == 1
    assert taken.sum() == sum(lengths)
    used = taken.any(1).sum()
    assert used <= max(1, 2 * -(-sum(lengths) // width))  # first fit needs fewer than twice the fewest rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 300))
def test_groups_keep_to_the_budget_in_fewer_tokens(lengths, budget):
    def tokens(groups):
        return [lengths[g[0]] * (1 + first_fit([lengths[i] for i in g], lengths[g[0]])[-1][0]) for g in groups]

    packed = micro_batches(lengths, budget, packed=True)
    assert sorted(i for g in packed for i in g) == list(range(len(lengths)))
    assert all(t <= budget for t in tokens(packed))
    padded = sum(lengths[g[0]] * len(g) for g in micro_batches(lengths, budget))
    assert sum(tokens(packed)) <= padded + budget


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt_neox"])
@pytest.mark.parametrize("reads_documents", [True, False])
def test_hidden_states_are_those_of_each_response_alone(family, reads_documents):
    model, batch = split(tiny_model(family, False), VOCABULARY), make_trajectories(MIXED)
    model = dataclasses.replace(model, reads_documents=reads_documents)
    batch = sorted(batch, key=lambda t: -t.length)
    together = collate(batch, 0, packed=True)
    assert together.input_ids.numel() < 0.5 * collate(batch, 0).input_ids.numel()
    with torch.no_grad():
        hidden_by_sequence = model.hidden(together).split(together.counts)
        for t, hidden in zip(batch, hidden_by_sequence, strict=True):
            assert torch.allclose(hidden, model.hidden(collate([t], 0)), atol=1e-5)


@pytest.mark.parametrize("budget", [10_000, 220])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"student": {"activation_checkpointing": True}}, {"lora": 4}])
def test_packed_gives_the_loss_and_gradient_of_padded(budget, masked, options):
    batch = make_trajectories(MIXED)
    lora = {name: value for name, value in options.items() if name == "lora"}
    padded, teacher = build(budget=budget, **lora)
    packed, other = build(budget=budget, pipeline={"packing": True}, **options)
    other._packed = True
    assert packed.student.reads_documents
    for model in (packed.student, other.model) if masked else ():
        object.__setattr__(model, "reads_documents", False)
    expected, actual = gradients(padded, teacher, batch), gradients(packed, other, batch)
    assert relative(actual, expected) < 1e-5
    for learner, its_teacher in ((padded, teacher), (packed, other)):
        its_teacher.encode(batch)
        learner.state.optimizer.zero_grad()
    a, b = padded.step(batch), packed.step(batch)
    assert b.loss == pytest.approx(a.loss, rel=1e-5)
    assert b.padding_share < a.padding_share


def test_long_and_short_responses_up_to_512_tokens():
    """In float32, on a model with enough positions."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16,
                 num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024)  # fmt: skip
    model = split(Qwen3ForCausalLM(Qwen3Config(**shape)).float(), VOCABULARY)
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(1, 40)), int(n)) for n in [1, 2, 3, *rng.integers(1, 470, 9), 472]]
    batch = sorted(make_trajectories(lengths), key=lambda t: -t.length)
    with torch.no_grad():
        packed, padded = model.hidden(collate(batch, 0, packed=True)), model.hidden(collate(batch, 0))
        assert torch.allclose(packed, padded, atol=1e-5)
