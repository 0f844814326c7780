"""The LM head of a checkpoint's files is the head of the loaded model."""

import pytest
import torch
from helpers import VOCABULARY, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, PhiConfig, PhiForCausalLM

from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.models.head_weights import logit_transform, read_head
from onpolicy_skd.models.split_model import split


def read(folder, vocabulary=VOCABULARY, dtype=torch.float32):
    return read_head(str(folder), vocabulary, dtype, "cpu")


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_the_head_is_the_models(tmp_path, family, tied, shard):
    model = tiny_model(family, tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    head = read(tmp_path)
    assert torch.equal(head.weight_VH, model.get_output_embeddings().weight)
    assert (head.bias_V, head.scale, head.cap) == (None, 1.0, None)


def test_rows_beyond_the_vocabulary_are_left_out_and_the_dtype_is_the_runs(tmp_path):
    model = tiny_model("qwen3", False)
    model.save_pretrained(tmp_path)
    head = read(tmp_path, 90, torch.bfloat16)
    assert torch.equal(head.weight_VH, model.lm_head.weight[:90].bfloat16())


def test_a_bias_is_read_too(tmp_path):
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, pad_token_id=0)
    model = PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2, bos_token_id=None, eos_token_id=1))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    head = read(tmp_path)
    assert torch.equal(head.weight_VH, model.lm_head.weight)
    assert torch.equal(head.bias_V, model.lm_head.bias)


def test_a_checkpoint_whose_names_have_a_prefix_is_read(tmp_path):
    model = tiny_model("llama", False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"language_model.{name}": t for name, t in load_file(file).items()}, file)
    assert torch.equal(read(tmp_path).weight_VH, model.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "no tensor lm_head.weight.*not quantized"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 32).char()}), r"torch\.int8.*16 or 32 bits"),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "float8_e4m3fn.*16 or 32 bits",
        ),
    ],
)
def test_a_quantized_head_is_refused(tmp_path, change, needle):
    tiny_model("qwen3", False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=needle):
        read(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 7.0}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("cohere", {"logit_scale": 0.25}),
        ("cohere2", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("granitemoe", {"logits_scaling": 6.0}),
        ("falcon_h1", {"lm_head_multiplier": 0.5}),
    ],
)
def test_scale_and_cap_are_those_of_the_split_model(tmp_path, family, settings, tied):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, num_local_experts=2,
        mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8,
    )  # fmt: skip
    config = AutoConfig.for_model(family, **shape, tie_word_embeddings=tied, **settings)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path)
    expected, actual = split(model, 90).head, read(tmp_path, 90)
    assert (actual.scale, actual.cap, actual.bias_V) == (expected.scale, expected.cap, None)
    assert torch.equal(actual.weight_VH, expected.weight_VH)


def test_other_settings_of_logits_are_refused_by_the_config(tmp_path):
    Gemma2Config(output_logit_soft_cap=20.0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"output_logit_soft_cap=20\.0.*final_logit_softcapping.*engine=transformers"):
        logit_transform(str(tmp_path))
    Gemma2Config(final_logit_softcapping=-5.0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"soft cap -5\.0; accepted: above 0"):
        logit_transform(str(tmp_path))
    assert logit_transform("bundled:demo_teacher") == (1.0, None)
