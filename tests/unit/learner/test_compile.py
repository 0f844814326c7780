"""Compiled decoder layers compared with the same layers as they are."""

import copy
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers import make_trajectories, tiny_model, tiny_settings
from learner_helpers import LENGTHS, build, compiled_graphs, gradients, graphs_without_code, relative

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.models import compilation
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.run.preflight import preflight

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
CASES = {
    "padded": {},
    "packed": {"pipeline": {"packing": True}},
    "checkpointed": {"student": {"activation_checkpointing": True}},
    "packed, checkpointed": {"pipeline": {"packing": True}, "student": {"activation_checkpointing": True}},
    "lora": {"lora": 4},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("padded", False),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in CASES if name != "padded"),
        pytest.param("padded", True, marks=[NEEDS_COMPILER, pytest.mark.slow]),
    ],
)
def test_loss_gradient_and_weights_after_a_step_are_those_of_eager_layers(name, code):
    eager, teacher = build(tied=True, **CASES[name])
    with nullcontext() if code else graphs_without_code():
        compiled, other = build(tied=True, learner={"compile": True}, **CASES[name])
    assert list(compiled.state.named) == list(eager.state.named)
    batch = make_trajectories(LENGTHS)
    assert compiled_graphs() == 0
    assert relative(gradients(compiled, other, batch), gradients(eager, teacher, batch)) < 1e-5
    assert compiled_graphs() > 0
    for step in range(2):
        batch = make_trajectories(LENGTHS, seed=step, version=step)
        for each in (teacher, other):
            each.encode(batch)
        expected, actual = eager.step(batch), compiled.step(batch)
        assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
        assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        for each in (teacher, other):
            each.release([t.key for t in batch])
    saved, plain = compiled.state.tensors(), eager.state.tensors()
    assert saved.keys() == plain.keys()
    assert all(torch.allclose(saved[key].float(), plain[key].float(), atol=1e-5) for key in plain)
    assert dict(compiled.state.weights()).keys() == dict(eager.state.weights()).keys()


@pytest.mark.slow
def test_other_lengths_and_rows_are_not_compiled_again():
    with graphs_without_code():
        learner, teacher = build(budget=200, learner={"compile": True})
    graphs = []
    for lengths in ([(5, 9), (3, 20)], [(4, 30), (9, 9), (2, 2)], [(2, 5), (8, 3), (7, 7), (1, 40)], [(3, 11), (3, 8)]):
        gradients(learner, teacher, make_trajectories(lengths))
        graphs.append(compiled_graphs())
    assert graphs[1] == graphs[-1]


def test_a_copy_of_the_model_is_not_compiled():
    model = tiny_model("qwen3", False)
    compilation.compile_layers(model)
    for layer, copied in zip(model.model.layers, copy.deepcopy(model).model.layers, strict=True):
        assert layer._compiled_call_impl is not None
        assert copied._compiled_call_impl is None


def test_a_family_that_does_not_name_its_layers_is_refused():
    model = tiny_model("llama", False)
    model._no_split_modules = None
    with pytest.raises(ModelError, match=r"learner\.compile: LlamaForCausalLM does not name its decoder layers"):
        compilation.compile_layers(model)


@pytest.mark.parametrize(("device", "variable", "named"), [("cpu", "CXX", r"g\+\+"), ("cuda", "CC", "gcc or clang")])
def test_a_machine_without_a_compiler_is_refused_before_ray_starts(device, variable, named, monkeypatch):
    settings = tiny_settings(learner={"compile": True}, run={"device": device})
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(compilation.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=rf"learner\.compile=true: .* {named}, and none is on the PATH.*{variable}"):
        preflight(settings)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/opt/{name}" if name == "other-cc" else None)
    monkeypatch.setenv(variable, "other-cc")
    compilation.check_compiler(device)


def test_layers_that_also_generate_are_not_compiled():
    rollout = {"engine": "transformers", "placement": "learner"}
    with pytest.raises(ConfigError, match=r"learner\.compile=True: accepted with rollout\.placement=actor only"):
        tiny_settings(learner={"compile": True}, rollout=rollout)
