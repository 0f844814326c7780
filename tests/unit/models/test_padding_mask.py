"""Padding on the right needs no mask in causal models; and memory that chunks of logits leave free."""

import pytest
import torch
from helpers import make_trajectories, tiny_model
from learner_helpers import LENGTHS, build, gradients, relative
from test_families import ACCEPTED, VOCABULARY, family

from onpolicy_skd.models import lm_head
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.split_model import SplitModel, split

SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_accepted_family_is_causal(name):
    assert split(family(name), VOCABULARY).causal


@pytest.mark.parametrize(
    ("side", "packed", "masked"), [("right", False, False), ("left", False, True), ("right", True, False)]
)
def test_attention_gets_a_mask_only_where_it_needs_one(side, packed, masked, monkeypatch):
    calls = []

    def attention(*given, **named):
        calls.append((named.get("attn_mask") is not None, named.get("is_causal")))
        return SDPA(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    batch = collate(make_trajectories(LENGTHS), 0, padding_side=side, packed=packed)
    model = split(tiny_model("qwen3", True), 97)
    calls.clear()
    with torch.no_grad():
        hidden = model.hidden(batch)
        assert {mask for mask, _ in calls} == {masked}
        if not masked:
            assert all(causal for _, causal in calls)
        calls.clear()
        plain = SplitModel(model.model, 97).hidden(batch)  # known neither to be causal nor to read documents
        assert {mask for mask, _ in calls} == {True}
    assert torch.allclose(hidden, plain, atol=1e-5)


def test_the_gradient_is_that_with_a_mask(monkeypatch):
    batch = make_trajectories(LENGTHS)
    without = gradients(*build(), batch)
    learner, teacher = build()
    for model in (learner.student, teacher._model):
        object.__setattr__(model, "causal", False)
    assert relative(without, gradients(learner, teacher, batch)) < 1e-6


class SeesBothWays(torch.nn.Module):
    """A backbone in which a token depends on the tokens after it."""

    def __init__(self, model):
        super().__init__()
        self.embed = model.get_input_embeddings()

    def forward(self, input_ids=None, inputs_embeds=None, **_):
        states = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return type("Output", (), {"last_hidden_state": states + states.mean(1, keepdim=True)})()


def test_a_model_that_looks_ahead_is_not_causal():
    from onpolicy_skd.models.split_model import _is_causal

    model = tiny_model("qwen3", True)
    ids = torch.arange(1, 9)[None]
    for backbone, causal in ((model.base_model, True), (SeesBothWays(model), False)):
        holder = type("Model", (), {"base_model": backbone})
        with torch.no_grad():
            assert _is_causal(holder, ids, backbone(input_ids=ids, use_cache=False).last_hidden_state) is causal


def test_chunks_of_logits_leave_room_for_gradients_and_moments(monkeypatch):
    """A card with 40 GB free before the first step of a model with two billion weights."""
    device = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1 * 10**9)
    lm_head._free_memory.cache_clear()
    try:
        assert lm_head._free_memory(device) == 42 * 10**9
        lm_head.reserve(device, 12 * 2 * 10**9)
        assert lm_head._free_memory(device) == 18 * 10**9
        assert lm_head.logits_per_chunk(device) == 18 * 10**9 // 8 // 16
        lm_head.reserve(device, 10**12)
        assert lm_head.logits_per_chunk(device) == lm_head.LOGITS_PER_CHUNK
    finally:
        lm_head._reserved.pop(device, None)
        lm_head._free_memory.cache_clear()


def test_the_learner_reserves_them():
    learner, _ = build()
    assert lm_head._reserved[torch.device("cpu")] == 12 * sum(p.numel() for p in learner.state.named.values())
