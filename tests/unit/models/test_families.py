"""Model families of transformers, built tiny: which are accepted, and that backbone and head are their logits."""

import pytest
import torch
from helpers import make_trajectories
from transformers import AutoConfig, AutoModelForCausalLM

from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.lm_head import Projector
from onpolicy_skd.models.loading import load_model
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
TRANSFORMED = {  # family: settings; scale, cap and bias of its head
    "gemma2": ({"final_logit_softcapping": 30.0}, 1.0, 30.0, False),
    "recurrent_gemma": ({}, 1.0, 30.0, False),
    "cohere": ({}, 0.0625, None, False),
    "cohere2": ({}, 0.0625, None, False),
    "granite": ({"logits_scaling": 8.0}, 1 / 8, None, False),
    "granitemoe": ({"logits_scaling": 6.0}, 1 / 6, None, False),
    "phi": ({}, 1.0, None, True),
    "gptj": ({"rotary_dim": 8}, 1.0, None, True),
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


def transformed(name, size=1.0, **settings):
    """Return a tiny model of a family in TRANSFORMED, its head scaled by ``size`` and its bias, if any, not zero."""
    model = family(name, **TRANSFORMED[name][0] | settings)
    head = model.get_output_embeddings()
    head.weight.data.mul_(size)
    if getattr(head, "bias", None) is not None:
        head.bias.data.normal_()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 300.0])  # logits that a soft cap leaves as they are; logits all at the cap
@pytest.mark.parametrize("name", TRANSFORMED)
def test_scale_cap_and_bias_are_found_whatever_the_size_of_the_logits(name, size, dtype):
    _, scale, cap, has_bias = TRANSFORMED[name]
    head = split(transformed(name, size).to(dtype), VOCABULARY - 7).head
    assert (head.scale, head.cap, head.bias_V is not None) == (scale, cap, has_bias)
    assert len(head) == VOCABULARY - 7
    assert head.bias_V is None or len(head.bias_V) == VOCABULARY - 7


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_head_gives_the_logits_of_its_family(name):
    model = transformed(name, 40.0)
    student = split(model, VOCABULARY)
    batch = collate(make_trajectories([(4, 6), (9, 3)], VOCABULARY), 0)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        actual = Projector(student.head, 9)(student.hidden(batch))
    torch.testing.assert_close(actual, batch.eligible(logits), rtol=1e-4, atol=1e-4)


def test_settings_that_change_no_logit_are_accepted():
    for model in (family("gemma2", final_logit_softcapping=None), family("cohere", logit_scale=1.0)):
        head = split(model, VOCABULARY).head
        assert (head.scale, head.cap, head.bias_V) == (1.0, None, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clamp(max=5.0),
        lambda x: x + 1e-3,
        lambda x: x - x.logsumexp(-1, keepdim=True),
        lambda x: x.masked_fill(torch.arange(VOCABULARY) > 60, -1e9),
        lambda x: 30.0 * torch.atan(x / 30.0),
        lambda x: x * (1 + torch.arange(x.shape[1])[:, None]),
    ],
)
def test_logits_that_no_head_describes_are_refused_whatever_their_size(change):
    model = family("llama")
    model.lm_head.weight.data.mul_(1e-3)
    forward = model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    with pytest.raises(ModelError, match=r"its logits are not its LM head's output.*changed in code"):
        split(model, VOCABULARY)


@pytest.mark.parametrize("name", ["llama", "opt"])  # OPT calls a part of its backbone
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.1), (torch.float32, 1.00005), (torch.bfloat16, 1.01)])
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_a_scale_before_the_head_is_refused(name, size, dtype, scale):
    model = family(name).to(dtype)
    (model.model.norm if name == "llama" else model.model.decoder.final_layer_norm).weight.data.mul_(size)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (scale * inputs[0],))
    with pytest.raises(ModelError, match="does not read the last hidden state"):
        split(model, VOCABULARY)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [*ACCEPTED, *TRANSFORMED])
def test_a_saved_family_is_loaded_whole_and_split_in_16_bits(name, tied, tmp_path):
    model = family(name, tie_word_embeddings=tied, **TRANSFORMED.get(name, ({},))[0])
    model.save_pretrained(tmp_path)
    loaded = split(load_model(str(tmp_path), torch.bfloat16, "cpu"), VOCABULARY)
    assert torch.equal(loaded.head_VH, model.get_output_embeddings().weight.bfloat16())


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


@pytest.mark.parametrize("name", ["bloom", "mamba", "falcon_mamba", "jamba", "minimax"])
def test_families_without_document_masks_are_refused_in_one_line(name):
    with pytest.raises(ModelError, match=r"accepted with data\.documents=joined") as refusal:
        check_documents(split(family(name), VOCABULARY), 0, 32)
    assert "\n" not in str(refusal.value)
