"""Students of other families after training: the saved checkpoint is the model that was trained."""

import dataclasses

import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model, tiny_settings
from learner_helpers import LENGTHS
from transformers import AutoConfig, AutoModelForCausalLM

from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.loading import load_model, load_tokenizer
from onpolicy_skd.models.lora import add_lora
from onpolicy_skd.models.split_model import split
from onpolicy_skd.teacher.teacher import Teacher

SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    tie_word_embeddings=False, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
)  # fmt: skip


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "gpt2", "opt"])
def test_the_saved_student_is_the_one_that_was_trained(name, lora_rank, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE)).float()
    names = [key for key, _ in model.named_parameters()]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    student = split(add_lora(model, lora_rank, 8, seed=0) if lora_rank else model, VOCABULARY)
    teacher = Teacher(split(tiny_model("qwen3", False, hidden=48, seed=1), VOCABULARY), 10_000, 0)
    settings = tiny_settings(learner={"lr": 1e-2, "warmup_steps": 0})
    learner, batch = Learner(student, teacher, settings, pad_id=0, steps=9), make_trajectories(LENGTHS)
    teacher.encode(batch)
    for _ in range(2):
        learner.step([dataclasses.replace(t, policy_version=learner.version) for t in batch])
    assert [key for key, _ in learner.state.weights()] == names
    assert any(not torch.equal(weight, before[key]) for key, weight in learner.state.weights())
    learner.state.save_pretrained(tmp_path / "m", load_tokenizer("bundled:demo_student"))
    loaded = split(load_model(str(tmp_path / "m"), torch.float32, "cpu"), VOCABULARY)
    with torch.no_grad():
        collated = collate(batch, 0)
        assert torch.allclose(loaded.hidden(collated), learner.student.hidden(collated), atol=1e-4)
