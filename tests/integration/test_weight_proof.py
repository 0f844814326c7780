"""The proof that a weight update reaches every parameter of an engine: who passes it, and who is refused by name."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import tiny_model, tiny_settings

from actors.learner_weights import SendsWeights
from actors.serialization import unpack_named
from actors.weight_proof import prove_update
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.loading import ModelError, load_tokenizer
from onpolicy_skd.models.lora import add_lora
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.teacher.teacher import NoTeacher

VOCABULARY = 512
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.2, bos_token_id=None,
    eos_token_id=1, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)


def new_model(family):
    """A random model: ``FAMILY`` or ``FAMILY-tied``."""
    name, _, tied = family.partition("-")
    torch.manual_seed(0)
    if name == "gpt_oss":
        more = dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
        config = transformers.GptOssConfig(**SHAPE, **more)
        return transformers.GptOssForCausalLM(config).float().eval()
    kinds = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "qwen3_moe": "Qwen3Moe"}
    more = EXPERTS if name == "qwen3_moe" else {}
    config = getattr(transformers, f"{kinds[name]}Config")(**SHAPE, **more, tie_word_embeddings=bool(tied))
    return getattr(transformers, f"{kinds[name]}ForCausalLM")(config).float().eval()


class LocalRank(SendsWeights):
    """The learner's side in this process; ``rank.method.remote(...)`` calls ``method``."""

    def __init__(self, model, settings):
        self._settings = settings
        self._learner = Learner(split(model, VOCABULARY), NoTeacher(), settings, 0, 1)

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return SimpleNamespace(remote=value) if callable(value) and not name.startswith("_") else value


def prove(model, engine, settings, sent=lambda weights: weights):
    """Prove updates of ``engine`` by the learner of ``model``; ``sent`` may change the weights on their way."""
    rank = LocalRank(model, settings)

    def push(version, timeout_s):
        engine.load_weights(sent(unpack_named(rank.weights.remote())), version)

    groups = SimpleNamespace(
        settings=settings, engines=[engine], timeout_s=lambda: 60.0, call_ranks=lambda call: call(rank),
        rollouts=SimpleNamespace(gather=engine.generate),
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        prove_update(groups, SimpleNamespace(push=push), 0, VOCABULARY)
    finally:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # the learner is as before


def engine_of(tmp_path, model, engine, dtype="float32"):
    settings = tiny_settings(rollout={"engine": engine, "dtype": dtype}, learner={"compute_dtype": dtype})
    model.save_pretrained(tmp_path)
    load_tokenizer("bundled:demo_student").save_pretrained(tmp_path)
    return build_engine(str(tmp_path), settings), settings


@pytest.mark.parametrize(
    "family",
    ["qwen3-tied", pytest.param("qwen2", marks=pytest.mark.slow), pytest.param("llama-tied", marks=pytest.mark.slow)],
)
def test_vllm_takes_every_parameter(family, tmp_path):
    """Tied heads, packed qkv and gate_up, biases."""
    model = new_model(family)
    prove(model, *engine_of(tmp_path, model, "vllm"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_transformers_engine_takes_every_parameter_and_merged_lora(dtype, tmp_path):
    model = tiny_model("gpt_neox", False, vocabulary=VOCABULARY)
    engine, settings = engine_of(tmp_path, model, "transformers", dtype)
    prove(model, engine, settings)
    prove(add_lora(tiny_model("gpt_neox", False, vocabulary=VOCABULARY), 4, 8, seed=0), engine, settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_vllm_does_not_take_are_refused(family, tmp_path):
    """Names and layout of transformers' experts are not those that vLLM reloads."""
    model = new_model(family)
    with pytest.raises(ModelError, match=r"rollout.engine=vllm: .* gives the engine no new values of (.*experts|all)"):
        prove(model, *engine_of(tmp_path, model, "vllm"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["self_attn.q_norm", "mlp.up_proj", "embed_tokens", "model.norm.weight"])
def test_parameters_that_do_not_arrive_are_named(kind, dtype, tmp_path):
    model = new_model("qwen3-tied")
    engine, settings = engine_of(tmp_path, model, "transformers", dtype)
    with pytest.raises(ModelError, match=rf"gives the engine no new values of [\w.*]*{kind}[\w.]*; train this model"):
        prove(model, engine, settings, sent=lambda weights: ((n, w) for n, w in weights if kind not in n))
