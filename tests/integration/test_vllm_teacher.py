"""The teacher in vLLM against the transformers teacher: rows, losses, caches, two workers, quantized weights."""

import json
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
import torch
from helpers import ON_GPU, ROOT, make_trajectories, tiny_model, tiny_settings
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from actors.teacher_actor import build_teacher
from actors.workers import Workers
from eval import teacher_engines
from onpolicy_skd import cache, train
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.models.loading import load_model, load_tokenizer
from onpolicy_skd.models.split_model import split
from onpolicy_skd.report.metrics_log import read
from onpolicy_skd.teacher import vllm_teacher
from onpolicy_skd.teacher.cache_format import write_shard
from onpolicy_skd.teacher.teacher import Teacher

pytestmark = pytest.mark.slow

VOCABULARY = 512
CHANGED_LOGITS = [("gemma2", {"final_logit_softcapping": 5.0}), ("granite", {"logits_scaling": 8.0})]
LENGTHS = [(5, 9), (30, 90), (12, 40), (7, 1), (96, 128), (9, 11)]


def settings_for(engine, **teacher):
    return tiny_settings(teacher={"engine": engine, **teacher})


def teachers(**teacher):
    """Return the teacher of each engine."""
    return [build_teacher(settings_for(engine, **teacher), VOCABULARY, 0) for engine in ("vllm", "transformers")]


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def save_tiny(folder):
    """Save a random model with the bundled tokenizer."""
    model = tiny_model("qwen3", False, vocabulary=VOCABULARY, hidden=64)
    model.save_pretrained(folder)
    load_tokenizer("bundled:demo_teacher").save_pretrained(folder)
    set_config(folder, max_position_embeddings=256)
    return model


@pytest.fixture(scope="module")
def pair():
    return teachers()


@pytest.fixture(scope="module")
def batch():
    return make_trajectories(LENGTHS, VOCABULARY)


def test_rows_and_statistics_are_those_of_the_transformers_teacher(pair, batch):
    request = [(t.key, range(len(t.target_ids))) for t in batch]
    for teacher in pair:
        teacher.encode(batch)
    assert relative(*(t.rows(request) for t in pair)) < 1e-3
    assert torch.equal(*(t.head().weight_VH for t in pair))
    for values in zip(*(t.entropy_and_logprob([t.key for t in batch]) for t in pair), strict=True):
        torch.testing.assert_close(*values, rtol=0, atol=1e-3)
    for teacher in pair:
        teacher.release([t.key for t in batch])
        assert teacher.stored == 0


def test_five_steps_have_the_losses_of_the_transformers_teacher(pair):
    losses = []
    for teacher in pair:
        student = split(load_model("bundled:demo_student", torch.float32, "cpu"), VOCABULARY)
        learner = Learner(student, teacher, tiny_settings(learner={"lr": 1e-3}), 0, 5)
        losses.append([])
        for step in range(5):
            trajectories = make_trajectories(LENGTHS[:4], VOCABULARY, step, step)
            teacher.encode(trajectories)
            losses[-1].append(learner.step(trajectories).loss)
            teacher.release([t.key for t in trajectories])
    assert np.allclose(*losses, rtol=0, atol=1e-4)
    assert len(set(losses[0])) == 5


def test_the_command_compares_both_engines(tmp_path, capsys):
    file = tmp_path / "figures.json"
    config = str(ROOT / "configs" / "demo.yaml")
    counts = ["--samples", "3", "--steps", "2"]
    assert teacher_engines.main(["--config", config, *counts, "--json", str(file), "cluster.teacher_gpus=null"]) == 0
    figures = json.loads(file.read_text())
    assert 0 < figures["rows"] < 1e-3
    assert max(figures["entropy"], figures["logprob"]) < 1e-3
    assert np.allclose(*figures["losses"].values(), rtol=0, atol=1e-4)
    assert len(figures["losses"]["vllm"]) == 2
    assert "largest difference of losses" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["none", "rs_kd"])
def test_a_shard_of_a_cache_has_the_same_content(pair, batch, tmp_path, sampler):
    divergence = {} if sampler == "none" else {"alignment": {"divergence": "forward_kl"}}
    shards = []
    for name, teacher in zip(("vllm", "transformers"), pair, strict=True):
        settings = tiny_settings(mode="off_policy", classes={"sampler": sampler}, **divergence)
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, 0, batch, teacher, settings, VOCABULARY)
        shards.append(load_file(next((tmp_path / name).glob("*.safetensors"))))
    first, second = shards
    assert first.keys() == second.keys()
    if sampler == "none":
        assert relative(first.pop("hidden"), second.pop("hidden")) < 1e-3
    for name in first:
        assert first[name].shape == second[name].shape
        assert (first[name] == second[name]).float().mean() > 0.99  # a draw may fall on either side of a boundary


def test_head_and_states_that_are_not_the_engines_distribution_are_refused(tmp_path, monkeypatch):
    save_tiny(tmp_path)
    read_head = vllm_teacher.read_head

    def negated(*arguments):
        head = read_head(*arguments)
        head.weight_VH.neg_()
        return head

    monkeypatch.setattr(vllm_teacher, "read_head", negated)
    with pytest.raises(ModelError, match="prompt_logprobs"):
        build_teacher(settings_for("vllm", model=str(tmp_path)), VOCABULARY, 0)


@pytest.mark.parametrize(("family", "settings"), CHANGED_LOGITS)
def test_scaled_and_capped_logits_are_those_of_the_transformers_teacher(tmp_path, batch, family, settings):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, initializer_range=0.2, **settings))
    model.float().save_pretrained(tmp_path)
    load_tokenizer("bundled:demo_teacher").save_pretrained(tmp_path)
    ours, plain = teachers(model=str(tmp_path))
    assert (ours.head().scale, ours.head().cap) == (plain.head().scale, plain.head().cap) != (1.0, None)
    request = [(t.key, range(len(t.target_ids))) for t in batch]
    for teacher in (ours, plain):
        teacher.encode(batch)
    assert relative(ours.rows(request), plain.rows(request)) < 1e-3
    keys = [t.key for t in batch]
    for actual, expected in zip(*(teacher.entropy_and_logprob(keys) for teacher in (ours, plain)), strict=True):
        assert (actual - expected).abs().mean() < 1e-3


def test_two_workers_give_the_rows_of_one_process_and_the_death_of_one_is_noticed(tmp_path, batch):
    save_tiny(tmp_path)
    wide = build_teacher(settings_for("vllm", model=str(tmp_path), tensor_parallel=2), VOCABULARY, 0)
    single = build_teacher(settings_for("transformers", model=str(tmp_path)), VOCABULARY, 0)
    request = [(t.key, range(len(t.target_ids))) for t in batch]
    for teacher in (wide, single):
        teacher.encode(batch)
    assert relative(wide.rows(request), single.rows(request)) < 1e-3
    assert not wide.lost_worker(0)

    died = threading.Event()
    wide.on_worker_death(died.set)
    wide.release([t.key for t in batch])
    multiprocessing.active_children()[-1].kill()
    with pytest.raises(RuntimeError):
        wide.encode(batch)
    assert wide.lost_worker(10)
    assert died.wait(60)


def as_gptq(weight_OI, group=32):
    """Return the tensors of a symmetric four-bit GPTQ layer, and the weight that they stand for."""
    weight_IO = weight_OI.T.float()
    inputs, outputs = weight_IO.shape
    grouped = weight_IO.reshape(inputs // group, group, outputs)
    scales = (grouped.abs().amax(1, keepdim=True) / 7).half().float()
    codes = (grouped / scales).round().clamp(-8, 7)
    packed = torch.zeros(inputs // 8, outputs, dtype=torch.int64)
    for bit, rows in enumerate((codes.reshape(inputs // 8, 8, outputs) + 8).long().unbind(1)):
        packed |= rows << 4 * bit
    tensors = {
        "qweight": torch.where(packed < 2**31, packed, packed - 2**32).int(),
        "scales": scales[:, 0].half(),
        "qzeros": torch.full((inputs // group, outputs // 8), 0x77777777, dtype=torch.int32),  # 8 - 1 in each place
        "g_idx": (torch.arange(inputs) // group).int(),
    }
    return tensors, (codes * scales).reshape(inputs, outputs).T.contiguous()


@pytest.mark.skipif(
    not ON_GPU and torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="vLLM's CPU build has the products of four-bit weights for AVX-512 only",
)
def test_a_quantized_teacher_is_its_dequantized_self(tmp_path, batch):
    """Four-bit GPTQ in bfloat16, the only products that vLLM's CPU build has for it."""
    folders = {name: tmp_path / name for name in ("gptq", "plain")}
    model, _ = (save_tiny(folder) for folder in folders.values())
    layout = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
    set_config(folders["gptq"], dtype="bfloat16", quantization_config={"quant_method": "gptq", **layout})
    stored = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    for name in [n for n in stored["plain"] if n.endswith("proj.weight")]:
        tensors, stored["plain"][name] = as_gptq(stored["gptq"].pop(name))
        stored["gptq"] |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in tensors.items()}
    for name, folder in folders.items():
        save_file(stored[name], folder / "model.safetensors", {"format": "pt"})
    request = [(t.key, range(len(t.target_ids))) for t in batch]
    rows = []
    for engine, folder in (("vllm", folders["gptq"]), ("transformers", folders["plain"])):
        teacher = build_teacher(settings_for(engine, model=str(folder), dtype="bfloat16"), VOCABULARY, 0)
        teacher.encode(batch)
        rows.append(teacher.rows(request).float())
    assert relative(*rows) < 2e-2
    assert relative(rows[0], model_rows(model, batch)) > 2 * relative(*rows)  # four bits change more than rounding


def model_rows(model, batch):
    """The states of the weights before they were quantized."""
    teacher = Teacher(split(model, VOCABULARY), 10_000, 0)
    teacher.encode(batch)
    return teacher.rows([(t.key, range(len(t.target_ids))) for t in batch])


OFF_POLICY = [
    "--config", str(ROOT / "configs" / "demo.yaml"), "mode=off_policy", "alignment.divergence=forward_kl",
    "eval.teacher=false", "eval.before=false", "eval.after=false", "run.evaluate_every=0", "run.checkpoint_every=1",
    "run.trackers=[]", "run.steps=3", "learner.batch_size=8", "rollout.engine=transformers", "data.train_problems=32",
    "cluster.teacher_gpus=null", "faults.backoff_seconds=0",
]  # fmt: skip


def steps(folder):
    return [r["loss"] for r in read(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def arguments(address, tmp_path_factory):
    """The settings of the runs below, and their folder."""
    folder = tmp_path_factory.mktemp("runs")
    return [*OFF_POLICY, f"run.dir={folder}", f"cluster.address={address}"], folder


@pytest.fixture(scope="module")
def plain(arguments):
    """The losses with a teacher in transformers."""
    settings, folder = arguments
    assert train.main([*settings, "run.name=plain"]) == 0
    assert len(steps(folder / "plain")) == 3
    return steps(folder / "plain")


def test_a_run_trains_with_it_also_after_its_process_was_killed(plain, arguments, monkeypatch):
    settings, folder = arguments
    assert train.main([*settings, "run.name=undisturbed", "teacher.engine=vllm"]) == 0
    undisturbed = steps(folder / "undisturbed")
    assert np.allclose(undisturbed, plain, rtol=0, atol=1e-4)

    encode, pids = Workers.encode, []

    def encode_and_kill(self, kept):
        (teacher,) = self._groups.teachers
        pids.append(self._groups.place(teacher).pid)
        if len(pids) == 2:
            os.kill(pids[-1], signal.SIGKILL)
        return encode(self, kept)

    monkeypatch.setattr(Workers, "encode", encode_and_kill)
    assert train.main([*settings, "run.name=killed", "teacher.engine=vllm"]) == 0
    assert steps(folder / "killed") == undisturbed
    faults = [r for r in read(folder / "killed" / "metrics.jsonl") if r.get("event") == "fault"]
    assert [fault["restarted"] for fault in faults] == [["teacher"]]
    assert pids[0] == pids[1] != pids[2]


def test_a_run_trains_from_the_cache_that_it_built(plain, arguments):
    settings, folder = arguments
    cached = [*settings, "run.name=cached", "teacher.engine=vllm", f"cache.path={folder / 'cache'}"]
    assert cache.main(["build", *cached]) == 0
    assert train.main(cached) == 0
    assert np.allclose(steps(folder / "cached"), plain, rtol=0, atol=1e-4)
