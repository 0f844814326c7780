import json
import logging
import shutil

import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model
from safetensors.torch import load_file, save_file

from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.lm_head import row_statistics
from onpolicy_skd.models.loading import (
    ModelError,
    check_length,
    check_same_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    resolve_path,
    shared_vocabulary,
)
from onpolicy_skd.models.split_model import split
from onpolicy_skd.teacher.teacher import Teacher

FAMILIES = [(f, tied) for f in ("qwen3", "llama", "gpt_neox") for tied in (True, False)]


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_backbone_and_head_are_the_model(family, tied):
    model = tiny_model(family, tied)
    student = split(model, VOCABULARY)
    batch = collate(make_trajectories([(4, 6), (9, 3)]), 0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.allclose(student.hidden(batch) @ student.head_VH.T, batch.eligible(logits), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_the_gradient_of_the_embeddings_is_that_of_autograd(tied, padding_idx):
    model = tiny_model("qwen3", tied)
    table = model.get_input_embeddings()
    table.padding_idx = padding_idx
    student, batch = split(model, VOCABULARY), collate(make_trajectories([(3, 9), (5, 4), (4, 6)]), 0)
    weight = torch.randn(len(batch.targets), student.head_VH.shape[1])

    def gradients(leaf):
        model.zero_grad()
        hidden = student.hidden(batch, leaf)
        ((hidden * weight).sum() + (hidden @ student.head_VH.T).square().mean()).backward()
        if leaf is not None:
            student.add_embedding_gradient(batch, leaf)
        return [p.grad.clone() for p in model.parameters()]

    for actual, expected in zip(gradients(student.embedded(batch)), gradients(None), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_embeddings_is_reproducible_with_many_threads():
    student = split(tiny_model("qwen3", False, hidden=64), VOCABULARY)
    batch = collate(make_trajectories([(60, 60)] * 8), 0)
    gradients = []
    torch.set_num_threads(4)
    try:
        for _ in range(3):
            student.model.zero_grad()
            leaf = student.embedded(batch)
            leaf.grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0))
            student.add_embedding_gradient(batch, leaf)
            gradients.append(student.model.get_input_embeddings().weight.grad.clone())
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_missing_and_broken_models_are_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match=r"'/nowhere/at/all': no such folder"):
        resolve_path("/nowhere/at/all")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(tmp_path), torch.float32, "cpu")
    with pytest.raises(ModelError, match="bundled:demo_student, bundled:demo_teacher"):
        resolve_path("bundled:huge")
    with pytest.raises(ModelError, match="'nobody/nothing' cannot be loaded"):
        load_config("nobody/nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path), torch.float32, "cpu")


def test_weights_are_read_from_safetensors_only(tmp_path):
    tiny_model("qwen3", True).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(tmp_path), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (
            lambda name, tensor: {name.replace("layers.1.", "layers.7."): tensor},
            r"lack 11 weights of Qwen3ForCausalLM \(model\.layers\.1\.input_layernorm\.weight, .*, \.\.\.\)",
        ),
        (
            lambda name, tensor: {name.replace("q_proj.weight", "q_proj.qweight"): tensor},
            r"lack 2 weights .*\(model\.layers\.0\.self_attn\.q_proj\.weight, [^,]*\), .* unquantized checkpoint",
        ),
        (
            lambda name, tensor: {name: tensor[:7].clone() if "layers.0.self_attn.q_norm" in name else tensor},
            r"do not fit 1 weights .*q_norm\.weight has shape \[7\], not \[16\]",
        ),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_the_files_lack_are_not_random(tmp_path, tied, change, needle):
    tiny_model("qwen3", tied).save_pretrained(tmp_path)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "nonsense"}})
    )
    load_model(str(tmp_path), torch.float32, "cpu")
    tensors = [change(name, tensor) for name, tensor in load_file(file).items()]
    save_file({name: tensor for changed in tensors for name, tensor in changed.items()}, file)
    with pytest.raises(ModelError, match=needle) as refusal:
        load_model(str(tmp_path), torch.float32, "cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_the_files_lack_are_refused_with_tied_weights_too(tmp_path, tied):
    tiny_model("llama", tied).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lack 1 weights .*model\.embed_tokens\.weight"):
        load_model(str(tmp_path), torch.float32, "cpu")


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(tmp_path, caplog):
    marker = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(
        "import pathlib\nfrom transformers import Qwen3Config\n"
        f"pathlib.Path({str(marker)!r}).touch()\nclass CustomConfig(Qwen3Config):\n    model_type = 'custom'\n"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "custom.CustomConfig"}})
    )
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_config(str(tmp_path))
    assert not marker.exists()
    with caplog.at_level(logging.WARNING):
        load_config(str(tmp_path), trust_remote_code=True)
    assert marker.exists()
    assert f"Python code that comes with {tmp_path} runs here" in caplog.text


def test_tokenizers_that_differ_are_named_with_an_example(tmp_path):
    student = load_tokenizer("bundled:demo_student")
    check_same_tokenizer(student, load_tokenizer("bundled:demo_teacher"), "a", "b")
    shutil.copytree(resolve_path("bundled:demo_teacher"), tmp_path / "other")
    other = load_tokenizer(str(tmp_path / "other"))
    other.add_tokens(["<|extra|>"])
    with pytest.raises(ModelError, match=r"differ in 1 tokens, for example '<\|extra\|>': id None and 438"):
        check_same_tokenizer(student, other, "a", "b")


def test_shared_vocabulary_cuts_padding_but_covers_the_tokenizer():
    small, large = tiny_model("qwen3", True).config, tiny_model("llama", True, vocabulary=128).config
    assert shared_vocabulary(small, large, 90) == VOCABULARY
    with pytest.raises(ModelError, match=r"97 .student. and 128 .teacher. rows but the tokenizer has 120"):
        shared_vocabulary(small, large, 120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the refusal where no GPU is present")
def test_a_missing_gpu_is_reported():
    with pytest.raises(ModelError, match=r"run\.device=cuda"):
        pick_device("cuda")
    assert pick_device("auto") == "cpu"


def test_teacher_returns_rows_and_scalars_of_encoded_trajectories():
    model = tiny_model("llama", False, hidden=48)
    teacher = Teacher(split(model, VOCABULARY), tokens_per_batch=30, pad_id=0)
    members = make_trajectories([(4, 6), (9, 3), (2, 12)])
    teacher.encode(members)
    plain = split(model, VOCABULARY)
    for t in members:
        single = collate([t], 0)
        with torch.no_grad():
            hidden = plain.hidden(single)
        positions = [len(t.response_ids) - 1, 0]
        assert torch.allclose(teacher.rows([(t.key, positions)]), hidden[positions], atol=1e-5)
        entropy, logprob = teacher.entropy_and_logprob([t.key])
        expected = row_statistics(hidden, plain.head_VH, single.targets)
        assert torch.allclose(entropy, expected.entropy_N, atol=1e-5)
        assert torch.allclose(logprob, expected.logprob_N, atol=1e-5)
    order = teacher.rows([("t2", [1]), ("t0", [5, 2])])
    assert torch.equal(order, torch.cat([teacher.rows([("t2", [1])]), teacher.rows([("t0", [5, 2])])]))
    teacher.release(["t0", "t1"])
    assert teacher.stored == 1
    kept = teacher._hidden["t2"]
    assert kept.untyped_storage().nbytes() == kept.nbytes  # it does not keep its batch alive
    with pytest.raises(KeyError, match="t0"):
        teacher.rows([("t0", [0])])


def test_sequences_longer_than_a_model_supports_are_refused():
    config = load_config("bundled:demo_student")
    check_length(config, "demo", 512)
    with pytest.raises(ModelError, match="supports 512 positions, a sequence may have 513 tokens; lower data"):
        check_length(config, "demo", 513)
