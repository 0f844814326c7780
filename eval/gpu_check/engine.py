"""Checks of a vLLM engine against the learner's forward: log-probabilities, new weights, prefix cache, throughput."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eval.gpu_check.report import Report
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models import loading
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.teacher.teacher import NoTeacher
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

PUSHES = 5
MAX_GAP = 0.02  # nats per token between engine and learner in a 16-bit type; 1e-3 in float32


def check(report: Report, device: str, model: str, tokens: int = 128, prompts: int = 64) -> None:
    """Generate with vLLM, score with the learner's forward, push the same and then changed weights, generate again."""
    cfg = settings(model, device, tokens)
    engine: Any = build_engine(model, cfg)
    rng, known = np.random.default_rng(0), len(loading.load_tokenizer(model))
    requests = [RolloutRequest(f"p{i}", rng.integers(0, known, 32).tolist(), i) for i in range(prompts)]
    sampling, greedy = SamplingParams(tokens), SamplingParams(tokens, temperature=0.0)
    engine.generate(requests[:2], sampling)  # compiles kernels
    start = time.perf_counter()
    sampled = engine.generate(requests, sampling)
    generated = sum(len(t.response_ids) for t in sampled)
    report.note("tokens per second", generated / (time.perf_counter() - start))
    learner = build_learner(cfg, model, device)
    coarse = learner.state.dtype != torch.float32
    bound = MAX_GAP if coarse else 1e-3
    before = engine.generate(requests, greedy)
    report.at_most("gap of sampled responses, nats", gap(learner, sampled), bound)
    report.at_most("gap of greedy responses, nats", gap(learner, before), bound)
    seconds = []
    for _ in range(PUSHES):
        start = time.perf_counter()
        engine.load_weights(learner.state.weights(learner.state.dtype), 1)
        seconds.append(time.perf_counter() - start)
        again = engine.generate(requests[:8], greedy)
        same = [_difference(a, b) for a, b in zip(before, again, strict=False)]
        report.at_most("the same weights pushed: difference of log-probabilities, nats", float(np.mean(same)), bound)
    report.note("seconds of a push in the process", float(np.median(seconds)))
    _perturb(learner)
    engine.load_weights(learner.state.weights(learner.state.dtype), 2)
    after = engine.generate(requests, greedy)
    changed = float(np.mean([_difference(a, b) for a, b in zip(before, after, strict=True)]))
    report.at_least("new weights: change of log-probabilities of the same prompts, nats", changed, 2 * bound)
    report.at_most("new weights: gap, nats (a stale prefix cache shows here)", gap(learner, after), bound)


def settings(model: str, device: str, tokens: int) -> Settings:
    """Return settings of an engine and a learner of ``model`` that share a GPU."""
    return resolve(
        {
            "run": {"device": device, "timeline": None}, "data": {"source": "demo", "max_prompt_tokens": 64},
            "student": {"model": model}, "sync": {"max_gap": 1e9, "method": "object_store"},
            "rollout": {"engine": "vllm", "max_tokens": tokens, "gpu_memory": 0.3, "max_sequences": 64},
        }
    )  # fmt: skip


def build_learner(cfg: Settings, model: str, device: str) -> Learner:
    """Return a learner without a teacher, over the model's full vocabulary, from which the engine samples."""
    vocabulary = loading.vocabulary_of(loading.load_config(model))
    student = split(loading.load_model(model, torch.float32, device), vocabulary)
    return Learner(student, NoTeacher(), cfg, 0, 1)


def gap(learner: Learner, trajectories: Sequence[Trajectory]) -> float:
    """Return the mean absolute difference of log-probabilities between engine and learner, nats per token."""
    return float(np.mean(learner.scorer.sampler_gaps(trajectories)))


def _difference(a: Trajectory, b: Trajectory) -> float:
    """Return the mean absolute difference of log-probabilities up to the first token that differs, nats per token."""
    shared = min(len(a.response_ids), len(b.response_ids))
    different = np.flatnonzero(a.response_ids[:shared] != b.response_ids[:shared])
    end = different[0] + 1 if len(different) else shared
    return float(np.abs(a.sampler_logprobs[:end] - b.sampler_logprobs[:end]).mean())


@torch.no_grad()
def _perturb(learner: Learner) -> None:
    """Add noise to each weight matrix, with a tenth of its root mean square as standard deviation."""
    for number, parameter in enumerate(learner.state.named.values()):
        if parameter.ndim > 1:
            rng = torch.Generator(parameter.device).manual_seed(number)
            noise = torch.randn(parameter.shape, generator=rng, device=parameter.device)
            parameter.add_(0.1 * parameter.square().mean().sqrt() * noise)
