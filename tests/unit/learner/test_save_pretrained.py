"""The saved student: its dtype, its generation settings, its files."""

import json

import pytest
import torch
from helpers import tiny_model, tiny_settings
from learner_helpers import build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from onpolicy_skd.models.loading import load_tokenizer, saved_dtype

TOKENIZER = "bundled:demo_student"


@pytest.mark.parametrize(
    ("checkpoint", "compute", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float16, "auto", torch.float16),
    ],
)
def test_a_student_is_saved_in_the_dtype_of_its_checkpoint(tmp_path, checkpoint, compute, expected):
    """float32 masters would make the folder of a bfloat16 student twice as large."""
    tiny_model("llama", False).to(checkpoint).save_pretrained(tmp_path / "student")
    settings = tiny_settings(student={"model": str(tmp_path / "student")}, learner={"compute_dtype": compute})
    learner, _ = build("llama")
    learner.state.save_pretrained(tmp_path / "final", load_tokenizer(TOKENIZER), saved_dtype(settings))
    assert {t.dtype for t in load_file(tmp_path / "final" / "model.safetensors").values()} == {expected}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto").dtype == expected


def test_merged_adapters_are_saved_in_float32(tmp_path):
    learner, _ = build("llama", lora=4)
    learner.state.save_pretrained(tmp_path / "final", load_tokenizer(TOKENIZER), torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("values", [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]},
    {"do_sample": False, "top_k": 20, "num_beams": 1, "early_stopping": True, "eos_token_id": [1, 2]},
])  # fmt: skip
def test_a_student_whose_generation_settings_contradict_each_other_is_saved(tmp_path, values):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    learner, _ = build("llama")
    given = learner.state.student.model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    learner.state.save_pretrained(tmp_path / "final", load_tokenizer(TOKENIZER))
    assert GenerationConfig.from_pretrained(tmp_path / "final").eos_token_id == [1, 2]
    assert learner.state.student.model.generation_config is given
