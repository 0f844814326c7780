"""Text towers of multimodal models: found, trained alone, and saved with the rest."""

import numpy as np
import pytest
import torch
from helpers import make_trajectories, tiny_model, tiny_settings
from learner_helpers import LENGTHS, gradients
from transformers import AutoConfig

from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.loading import auto_class, freeze_other_towers, load_model
from onpolicy_skd.models.lora import LORA, add_lora
from onpolicy_skd.models.split_model import split
from onpolicy_skd.run.model_checks import check_checkpoint
from onpolicy_skd.teacher.teacher import Teacher

VOCABULARY = 97
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    initializer_range=0.2,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
QWEN_VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}}
FAMILIES = {
    "gemma3": dict(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4),
    "llava": dict(
        text_config=dict(model_type="llama", **TEXT), vision_config=dict(model_type="clip_vision_model", **VISION)
    ),
    "mistral3": dict(
        text_config=dict(model_type="mistral", **TEXT), vision_config=dict(model_type="pixtral", **VISION)
    ),
    "qwen2_5_vl": dict(text_config=TEXT | ROPE, vision_config=QWEN_VISION),
    "qwen3_vl": dict(text_config=TEXT, vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]}),
}


def tiny(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **FAMILIES[name])
    return auto_class(config).from_config(config).float().eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_tower_is_trained_by_the_gradient_of_dense_logits(name):
    model, batch = freeze_other_towers(tiny(name)), make_trajectories(LENGTHS)
    teacher = Teacher(split(tiny_model("llama", False, hidden=48, seed=1), VOCABULARY), 10_000, 0)
    settings = tiny_settings(positions={"policy": "full"})
    learner = Learner(split(model, VOCABULARY), teacher, settings, pad_id=0, steps=10)
    actual = gradients(learner, teacher, batch)
    learner.state.optimizer.zero_grad()
    total = torch.zeros(())
    for t in batch:
        ids, at = (
            torch.as_tensor(np.concatenate([t.prompt_ids, t.response_ids]))[None],
            slice(len(t.prompt_ids) - 1, -1),
        )
        log_q = model(input_ids=ids).logits[0, at].log_softmax(-1)
        log_p = teacher._model.model(input_ids=ids).logits[0, at].detach().log_softmax(-1)
        total = total + (log_q.exp() * (log_q - log_p)).sum(-1).mean() / len(batch)
    total.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for key, gradient in expected.items():
        assert (actual[key] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, key
    assert len(expected) < len(list(model.parameters()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_accepted_and_loaded_whole(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    check_checkpoint(str(tmp_path), trust_remote_code=False)
    loaded = load_model(str(tmp_path), torch.float32, "cpu")
    weights, expected = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_adapters_are_added_to_the_text_tower_alone():
    adapted = add_lora(freeze_other_towers(tiny("llava")), 4, 8, seed=0)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(LORA in name and "vision" not in name for name in trained)


def test_a_plain_model_is_trained_whole():
    model = freeze_other_towers(tiny_model("qwen3", True))
    assert all(parameter.requires_grad for parameter in model.parameters())
