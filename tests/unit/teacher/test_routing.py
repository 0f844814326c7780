"""Several teachers: each row is scored by its own, one that no row names is not started, and what is refused."""

import dataclasses
import json
import shlex

import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model, tiny_settings
from learner_helpers import LENGTHS

from actors.placement import Counts
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import dump, resolve
from onpolicy_skd.config.yaml_text import parse
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.split_model import split
from onpolicy_skd.report.card import command
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.teacher.routing import RoutedTeachers
from onpolicy_skd.teacher.teacher import Teacher

NAMES = ("code", "maths")
TEACHER = {"model": "bundled:demo_teacher", "dtype": "float32"}


@pytest.fixture
def teachers():
    """Two teachers of different widths."""
    models = {name: tiny_model("qwen3", False, hidden=48 - 16 * i, seed=1 + i) for i, name in enumerate(NAMES)}
    return {name: Teacher(split(model, VOCABULARY), 10_000, 0) for name, model in models.items()}


def learner(teacher, **positions):
    settings = tiny_settings(positions={"policy": "full", **positions})
    return Learner(split(tiny_model("qwen3", False), VOCABULARY), teacher, settings, pad_id=0, steps=10)


def named_batch():
    return [dataclasses.replace(t, teacher=NAMES[i % 3 == 0]) for i, t in enumerate(make_trajectories(LENGTHS))]


def test_each_row_is_distilled_from_its_own_teacher(teachers):
    batch, routed = named_batch(), RoutedTeachers(teachers)
    routed.encode(batch)
    together = learner(routed)
    together.state.optimizer.zero_grad()
    sums = together.accumulate(batch)
    expected = {name: torch.zeros_like(p) for name, p in together.state.named.items()}
    for teacher_name, teacher in teachers.items():
        rows = [t for t in batch if t.teacher == teacher_name]
        alone = learner(teacher)
        alone.state.optimizer.zero_grad()
        single = alone.accumulate(rows)
        divergence, positions = sums.by_teacher[teacher_name]
        assert positions == single.selected == sum(len(t.target_ids) for t in rows)
        assert divergence == pytest.approx(single.divergence, rel=1e-4)
        for name, parameter in alone.state.named.items():
            expected[name] += parameter.grad * len(rows) / len(batch)
    for name, parameter in together.state.named.items():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5)
    record = sums.record(1.0).as_dict()
    for name, (divergence, positions) in sums.by_teacher.items():
        assert record[f"divergence_selected/{name}"] == divergence / positions
    assert sums.by_teacher["code"][0] / sums.by_teacher["code"][1] != record["divergence_selected"]


def test_entropies_of_several_teachers_keep_the_order_of_the_request(teachers):
    batch, routed = named_batch(), RoutedTeachers(teachers)
    routed.encode(batch)
    entropy_N, logprob_N = routed.entropy_and_logprob([t.key for t in reversed(batch)])
    by_row = [teachers[t.teacher].entropy_and_logprob([t.key]) for t in reversed(batch)]
    assert torch.allclose(entropy_N, torch.cat([entropy for entropy, _ in by_row]), atol=1e-5)
    assert torch.allclose(logprob_N, torch.cat([logprob for _, logprob in by_row]), atol=1e-5)
    with pytest.raises(ValueError, match="rows of 2 teachers"):
        routed.rows([(t.key, [0]) for t in batch])
    routed.release([t.key for t in batch])
    assert all(teacher.stored == 0 for teacher in teachers.values())
    with pytest.raises(KeyError, match="t0"):
        routed.rows([("t0", [0])])


def with_teachers(data, **sections):
    tree = {"teacher": {}, "teachers": {"maths": TEACHER, "code": TEACHER | {"actors": 2}}, **sections}
    base = tiny_settings().model_dump(mode="json")
    base["eval"].pop("teacher")
    for name, section in tree.items():
        merged = isinstance(section, dict) and name not in ("teacher", "teachers")
        base[name] = {**base[name], **section} if merged else section
    base["data"] = {"source": "demo", "max_prompt_tokens": 96, **data}
    return resolve(base)


def test_a_teacher_that_no_row_names_is_not_started(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": "1", "who": "code"}) + "\n" for i in range(3)))
    data = {"source": "jsonl", "train_file": str(file), "teacher_column": "who"}
    settings = with_teachers(data, rollout={"engine": "transformers"})
    assert Counts.of_training(settings).teacher == 3
    logged = []
    run = prepare(settings, logged.append)
    assert [p.teacher for p in run.train] == ["code"] * 3
    assert {r.teacher for r in run.requests(run.train, 0)} == {"code"}
    assert list(run.worker_settings.teachers) == ["code"]
    assert Counts.of_training(run.worker_settings).teacher == 2
    assert logged == ["teachers.maths: no row names it; it is not started"]
    assert resolve(parse(dump(settings))) == settings
    file.write_text(json.dumps({"question": "1?", "answer": "1", "who": "history"}) + "\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl#1.*'history'; accepted: maths, code"):
        prepare(settings)


BAD = {
    "data.teacher: with teachers needs that": ({}, {}),
    "data.teacher=art: there is no such teacher; accepted: maths, code": ({"teacher": "art"}, {}),
    r"data.mix\[0\].teacher: with teachers needs": ({"source": "gsm8k", "mix": [{"source": "demo"}]}, {}),
    "teacher.dtype=float32: with teachers": ({"teacher": "code"}, {"teacher": {"dtype": "float32"}}),
    "cache.path needs a single teacher": ({"teacher": "code"}, {"mode": "off_policy", "cache": {"path": "c"}}),
    "eval.teacher=true needs a single": ({"teacher": "code"}, {"eval": {"teacher": True}}),
    "policy=bandit needs a single": ({"teacher": "code"}, {"positions": {"policy": "bandit"}}),
    "teachers.a.placement=learner": ({"teacher": "a"}, {"teachers": {"a": TEACHER | {"placement": "learner"}}}),
    "teachers.a.model: missing": ({"teacher": "a"}, {"teachers": {"a": {"actors": 2}}}),
    "teachers: vLLM engines of different tensor_parallel": (
        {"teacher": "a"},
        {"teachers": {n: TEACHER | {"engine": "vllm", "tensor_parallel": size} for n, size in (("a", 1), ("b", 2))}},
    ),
    "teachers.a: teacher.engine=vllm: .*topology=split": (
        {"teacher": "a"}, {"teachers": {"a": TEACHER | {"engine": "vllm"}}, "cluster": {"topology": "colocated"}}
    ),
    "teachers.a.prompt": ({"teacher": "a"}, {"teachers": {"a": TEACHER | {"prompt": "{question}"}}}),
    "teachers.a: teacher.ema_decay": (
        {"teacher": "a"}, {"teachers": {"a": {"model": "student", "ema_decay": 0.9}}}
    ),
    "teachers.a: teacher.tokens_per_batch": ({"teacher": "a"}, {"teachers": {"a": TEACHER | {"tokens_per_batch": 9}}}),
    "data.teacher=a: accepted with teachers only": ({"teacher": "a"}, {"teachers": {}}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    data, sections = BAD[message]
    with pytest.raises(ConfigError, match=message):
        with_teachers(data, **sections)


def test_a_mix_and_teachers_are_named_in_the_command_of_a_card(tmp_path):
    settings = with_teachers(
        {"source": "gsm8k", "mix": [{"source": "demo", "teacher": "code"}]}, teachers={"code": {"model": str(tmp_path)}}
    )
    said = command(settings)
    assert str(tmp_path) not in said
    words = dict(word.split("=", 1) for word in shlex.split(said.replace("\\\n", " "))[2:])
    assert parse(words["data.mix"]) == [{"source": "demo", "teacher": "code"}]
    assert parse(words["teachers"]) == {"code": {"model": tmp_path.name}}
