"""Nothing random takes part in training: dropout, layer drop and router noise of any family stay off."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model, tiny_settings
from learner_helpers import LENGTHS, build, gradients, relative
from transformers import AutoConfig, AutoModelForCausalLM

from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.split_model import ModelError, SplitModel, checkpoint_activations, split
from onpolicy_skd.teacher.teacher import Teacher

SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False,
)  # fmt: skip
MOE = dict(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48)
RANDOM = {  # families and what each of them randomizes in training mode
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "biogpt": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "layerdrop": 0.5,
               "activation_dropout": 0.5, "intermediate_size": 64},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64, "dropout": 0.5,
             "attention_dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5, "intermediate_size": 64},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "llama": {"attention_dropout": 0.5, "num_key_value_heads": 1, "intermediate_size": 64},
    "mixtral": {**MOE, "router_jitter_noise": 0.5, "attention_dropout": 0.5},
    "phimoe": {**MOE, "router_jitter_noise": 0.5, "input_jitter_noise": 0.5, "attention_dropout": 0.5},
}  # fmt: skip


def random_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE | RANDOM[name])).float()
    return model.train()  # as a caller may leave it


def learner_of(model, **sections):
    teacher = Teacher(split(tiny_model("qwen3", False, hidden=48, seed=1), VOCABULARY), 10_000, 0)
    return Learner(split(model, VOCABULARY), teacher, tiny_settings(**sections), pad_id=0, steps=9), teacher


@pytest.mark.parametrize("name", RANDOM)
def test_activation_checkpointing_gives_the_gradient_of_eval_mode(name):
    batch = make_trajectories(LENGTHS)
    plain, teacher = learner_of(random_model(name), positions={"k": 1.0})
    expected = gradients(plain, teacher, batch)
    learner, teacher = learner_of(random_model(name), positions={"k": 1.0}, student={"activation_checkpointing": True})
    passes = []
    for layer in learner.student.checkpointed:
        layer.register_forward_pre_hook(lambda *_: passes.append(1))
    assert relative(gradients(learner, teacher, batch), expected) < 1e-5
    assert len(passes) == 2 * len(learner.student.checkpointed)  # forward, and again in backward
    assert not any(module.training for module in learner.student.model.modules())


def test_families_without_checkpointed_layers_are_refused():
    model = tiny_model("llama", False)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match=r"student\.activation_checkpointing: LlamaForCausalLM does not support it"):
        checkpoint_activations(model)


def test_the_average_of_the_student_is_in_eval_mode():
    """At the first step it is the student, so it adds no gradient."""
    batch = make_trajectories(LENGTHS)
    expected = gradients(*learner_of(random_model("gpt2")), batch)
    averaging = learner_of(random_model("gpt2"), alignment={"ema_weight": 1.0})
    assert relative(gradients(*averaging, batch), expected) < 1e-5


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [{}, {"alignment": {"variant": "at_kd", "divergence": "forward_kl"}}])
def test_nothing_of_the_batch_outlives_its_step(sections):
    learner, teacher = build(**sections)
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    learner.step(batch)
    teacher.release([t.key for t in batch])
    references = [weakref.ref(t.response_ids) for t in batch]
    del batch
    gc.collect()
    assert not any(reference() is not None for reference in references)
    assert not learner.state.objective._hard


def test_one_micro_batch_is_freed_before_the_next_forward(monkeypatch):
    learner, teacher = build(budget=40)
    batch = make_trajectories(LENGTHS)
    teacher.encode(batch)
    alive = []
    references = []
    hidden = SplitModel.hidden

    def counting_hidden(self, *args):
        alive.append(sum(reference() is not None for reference in references))
        states = hidden(self, *args)
        references.append(weakref.ref(states))
        return states

    monkeypatch.setattr(SplitModel, "hidden", counting_hidden)
    learner.step(batch)
    learner.scorer.diagnose_positions(copy.copy(batch))
    assert len(alive) > 4
    assert max(alive) == 0
