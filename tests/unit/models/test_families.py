"""Model families of transformers, built tiny: which are accepted, and that backbone and head are their logits."""

import pytest
import torch
from helpers import make_trajectories
from transformers import AutoConfig, AutoModelForCausalLM

from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.lora import add_lora, merged_parameters
from onpolicy_skd.models.split_model import ModelError, check_documents, split

VOCABULARY = 64
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    tie_word_embeddings=False, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16,
)  # fmt: skip
ACCEPTED = [
    "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "mistral", "mixtral", "ministral", "gemma",
    "gemma3_text", "gpt_neox", "gpt2", "opt", "bloom", "falcon", "phi3", "phimoe", "granite", "granitemoe", "olmo",
    "olmo2", "olmo3", "olmoe", "stablelm", "gpt_oss", "mamba", "falcon_mamba", "smollm3", "starcoder2", "gpt_bigcode",
    "mpt", "persimmon", "nemotron", "glm", "glm4", "helium", "exaone4", "ernie4_5", "arcee", "hunyuan_v1_dense",
    "seed_oss", "apertus", "bitnet", "lfm2", "jamba", "minimax", "biogpt", "xglm",
]  # fmt: skip
REFUSED = {  # family, settings, words of the refusal
    "gemma2": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "recurrent_gemma": ({}, "logits_soft_cap=30.0"),
    "cohere": ({}, "logit_scale=0.0625"),
    "cohere2": ({}, "logit_scale=0.0625"),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
    "granitemoe": ({"logits_scaling": 6.0}, "logits_scaling=6.0"),
    "phi": ({}, "its LM head has a bias"),
    "gptj": ({"rotary_dim": 8}, "its LM head has a bias"),
}


def family(name, **settings):
    """Return a tiny model of the family ``name`` in eval mode."""
    shape = {k: v for k, v in SHAPE.items() if k != "head_dim" or name != "falcon"}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape | settings)).float().eval()


@pytest.mark.parametrize("name", ACCEPTED)
def test_backbone_and_head_are_the_logits_of_the_family(name):
    model = family(name)
    student = split(model, VOCABULARY)
    batch = collate(make_trajectories([(4, 6), (9, 3)], VOCABULARY), 0)
    with torch.no_grad():
        hidden = student.hidden(batch)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        assert torch.allclose(hidden @ student.head_VH.T, batch.eligible(logits), atol=1e-4)
        embedded = student.embedded(batch) if student.takes_embeddings else None
        if embedded is not None:
            assert torch.allclose(student.hidden(batch, embedded), hidden, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_logits_other_than_the_heads_output_are_refused_by_name_whatever_their_size(name, dtype):
    settings, words = REFUSED[name]
    model = family(name, **settings).to(dtype)
    model.get_output_embeddings().weight.data.mul_(1e-3)  # logits so small that a soft cap does not change them
    with pytest.raises(ModelError, match=words):
        split(model, VOCABULARY)


def test_settings_that_change_no_logit_are_accepted():
    split(family("gemma2", final_logit_softcapping=None), VOCABULARY)
    split(family("cohere", logit_scale=1.0), VOCABULARY)


def test_a_scale_before_the_head_is_refused():
    model = family("llama")
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (2.0 * inputs[0],))
    with pytest.raises(ModelError, match="does not read the last hidden state"):
        split(model, VOCABULARY)


def test_rows_of_the_head_that_are_not_finite_matter_only_inside_the_vocabulary():
    model = family("llama")
    model.lm_head.weight.data[60:] = torch.nan
    batch = collate(make_trajectories([(4, 6)], 60), 0)
    assert split(model, 60).hidden(batch).isfinite().all()
    with pytest.raises(ModelError, match=r"4 rows of its LM head hold NaN or infinity, the first is token id 60"):
        split(model, VOCABULARY)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "gpt2", "opt", "falcon", "olmoe", "lfm2"])
def test_merged_adapters_have_the_names_and_values_of_the_plain_model(name):
    plain = dict(family(name).named_parameters())
    adapted = add_lora(family(name), 4, 8, seed=0)
    merged = {key: compute() for key, compute in merged_parameters(adapted, lambda tensor: tensor)}
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[key], plain[key]) for key in plain)
    trained = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in key for key in trained)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_families_that_peft_does_not_support_are_refused_in_one_line(name):
    with pytest.raises(ModelError, match=r"student\.lora_rank: peft does not support .*; accepted: 0$") as refusal:
        add_lora(family(name), 4, 8, seed=0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["bloom", "mamba", "falcon_mamba"])
def test_families_without_document_masks_are_refused_in_one_line(name):
    with pytest.raises(ModelError, match=r"accepted with data\.documents=joined") as refusal:
        check_documents(split(family(name), VOCABULARY), 0, 32)
    assert "\n" not in str(refusal.value)
