"""Offline on-policy distillation: rollouts of the initial student, made once, and a teacher cache."""

import dataclasses

import torch
from helpers import tiny_settings
from learner_helpers import gradients, relative

from onpolicy_skd.data.references import generated_responses
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.loading import load_model
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.transformers_engine import TransformersEngine
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.teacher import cache_format as caches
from onpolicy_skd.teacher.cache_format import Layout, Manifest
from onpolicy_skd.teacher.cached_teacher import open_teacher
from onpolicy_skd.teacher.teacher import Teacher


def model(name, vocabulary):
    return split(load_model(name, torch.float32, "cpu"), vocabulary)


def write_cache(folder, settings, trajectories, teacher, vocabulary):
    """Write a cache of hidden states in one shard."""
    folder.mkdir()
    layout, cut = Layout.of(settings, vocabulary), [range(len(trajectories))]
    shard = caches.write_shard(folder, 0, trajectories, teacher, settings, vocabulary)
    plan = caches.plan_of([t.digest for t in trajectories], cut)
    caches.complete(folder, Manifest({}, layout, plan, caches.write_head(folder, teacher.head()), [shard]))


def test_the_first_step_has_the_gradient_of_the_live_one(tmp_path):
    """On the same rollouts: sampled by the same engine, scored by a live teacher or read from its cache."""
    sections = {"data": {"train_problems": 12}, "learner": {"batch_size": 8}, "rollout": {"max_tokens": 60}}
    offline = tiny_settings(
        **sections, mode="off_policy", references={"source": "student"}, run={"dir": tmp_path},
        samples={"truncated": "keep"},
    )  # fmt: skip
    live = tiny_settings(**sections)
    assert offline.alignment == live.alignment
    run = prepare(offline)
    engine = TransformersEngine("bundled:demo_student", offline)
    rollouts = {}

    def generate(requests):
        made = engine.generate(requests, run.sampling)
        rollouts.update({t.prompt_key: t for t in made})
        return made

    run.train, run.responses = generated_responses(offline, run.train, generate, print)
    batch = run.references(run.train, 0)
    teacher = Teacher(model("bundled:demo_teacher", run.vocabulary), 8_192, 0)
    write_cache(tmp_path / "cache", offline, list(run.every_reference(run.train)), teacher, run.vocabulary)
    path = offline.cache.model_copy(update={"path": tmp_path / "cache"})
    cached = open_teacher(offline.model_copy(update={"cache": path}), "cpu")

    on_policy = [dataclasses.replace(rollouts[t.prompt_key.partition(":")[2]], key=t.key) for t in batch]
    assert [t.response_ids.tolist() for t in on_policy] == [t.response_ids.tolist() for t in batch]
    assert {t.policy_version for t in on_policy} == {0}
    results = []
    for settings, source, trajectories in ((offline, cached, batch), (live, teacher, on_policy)):
        student = model("bundled:demo_student", run.vocabulary)
        results.append(gradients(Learner(student, source, settings, 0, 10), source, trajectories))
    assert relative(*results) < 1e-5
    assert sum(g.norm() for g in results[0].values()) > 0
