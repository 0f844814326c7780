"""Which parameters a decoder layer gathers by itself, and in which types."""

import pytest
import torch
from helpers import tiny_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from onpolicy_skd.distributed.ranks import _gathered_by
from onpolicy_skd.models.lora import add_lora


def experts():
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


def layer_of(model):
    return model.base_model.layers[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt_neox"])
def test_linear_layers_are_gathered_in_the_compute_dtype(family, dtype):
    layer = layer_of(tiny_model(family, tied=False))
    params, policy = _gathered_by(layer, dtype)
    norms = {p for name, p in layer.named_parameters() if "norm" in name}
    assert params == set(layer.parameters()) - norms
    assert norms
    assert (policy.param_dtype, policy.reduce_dtype) == (dtype, torch.float32)
    assert not policy.cast_forward_inputs


def test_adapters_are_gathered_with_the_weights_that_they_adapt():
    layer = layer_of(add_lora(tiny_model("qwen3", tied=False).bfloat16(), 2, 4, 0))
    params, _ = _gathered_by(layer, torch.bfloat16)
    assert {p.dtype for p in params if p.requires_grad} == {torch.float32}
    assert {p.ndim for p in params} == {2}


@pytest.mark.parametrize(
    ("build", "dtype"), [(experts, torch.bfloat16), (lambda: tiny_model("qwen3", False), torch.float32)]
)
def test_other_layers_are_gathered_as_they_are(build, dtype):
    layer = layer_of(build())
    assert _gathered_by(layer, dtype) == (set(layer.parameters()), MixedPrecisionPolicy())
