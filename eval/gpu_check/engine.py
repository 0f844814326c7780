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
from onpolicy_skd.data.prompts import load_prompts
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models import loading
from onpolicy_skd.models.split_model import split
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.teacher.teacher import NoTeacher
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

PUSHES = 5
FLOAT32_GAP = 1e-3  # nats per token between engine and learner
MAX_GAP = 0.02  # the same in a 16-bit type, on questions that the model can answer; bfloat16 explains 0.007
PERTURBED_GAP = 0.06  # the same after ``_perturb``, whose noise makes the model unsure; bfloat16 explains 0.03
NOISE = 0.2  # of ``_perturb``: a confident model hardly changes with 0.1
ASLEEP_GB = 3.0  # GPU memory that a sleeping engine may hold: graphs and workspaces


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest gaps between engine and learner, nats: with the model's weights, and with perturbed ones."""
    return (FLOAT32_GAP, FLOAT32_GAP) if dtype == torch.float32 else (MAX_GAP, PERTURBED_GAP)


def check(report: Report, device: str, model: str, tokens: int = 128, prompts: int = 64) -> None:
    """Generate with vLLM, score with the learner's forward, push the same and then changed weights, generate again."""
    cfg = settings(model, device, tokens)
    requests = questions(cfg, prompts)
    free = free_bytes(device)
    engine: Any = build_engine(model, cfg)
    sampling, greedy = SamplingParams(tokens), SamplingParams(tokens, temperature=0.0)
    engine.generate(requests[:2], sampling)  # compiles kernels
    start = time.perf_counter()
    sampled = engine.generate(requests, sampling)
    generated = sum(len(t.response_ids) for t in sampled)
    report.note("tokens per second", generated / (time.perf_counter() - start))
    before = engine.generate(requests, greedy)
    if device == "cuda":
        engine.sleep()  # the pushes wake it
        report.at_most("engine asleep, GB", (free - free_bytes(device)) / 1e9, ASLEEP_GB)
    learner = build_learner(cfg, model, device)
    bound, perturbed_bound = bounds(learner.state.dtype)
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
    changed = gap(learner, sampled)  # the gap of an engine that has kept the old weights
    report.at_least("new weights: change of log-probabilities of sampled responses, nats", changed, 2 * perturbed_bound)
    after = engine.generate(requests, sampling)
    report.at_most("new weights: gap, nats (a stale prefix cache shows here)", gap(learner, after), perturbed_bound)


def settings(model: str, device: str, tokens: int) -> Settings:
    """Return settings for an engine and a learner of ``model`` on one GPU, with questions that the model can answer."""
    template = "chat" if loading.load_tokenizer(model).chat_template else "plain"
    return resolve(
        {
            "run": {"device": device, "timeline": None}, "cluster": {"topology": "colocated"},
            "data": {"source": "demo", "max_prompt_tokens": 256, "template": template},
            "student": {"model": model}, "sync": {"max_gap": 1e9, "method": "object_store"},
            "rollout": {"engine": "vllm", "max_tokens": tokens, "gpu_memory": 0.3, "max_sequences": 64},
        }
    )  # fmt: skip


def questions(cfg: Settings, count: int) -> list[RolloutRequest]:
    """Return word problems in the model's template: 16-bit types differ more on ids that the model does not expect."""
    prompts = load_prompts(cfg.data, loading.load_tokenizer(cfg.student.model), "test", count)
    return [RolloutRequest(p.key, p.token_ids, i) for i, p in enumerate(prompts)]


def free_bytes(device: str) -> int:
    """Return the free bytes of the GPU; 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 0


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
    """Add noise to each weight matrix, with NOISE of its root mean square as standard deviation."""
    for number, parameter in enumerate(learner.state.named.values()):
        if parameter.ndim > 1:
            rng = torch.Generator(parameter.device).manual_seed(number)
            noise = torch.randn(parameter.shape, generator=rng, device=parameter.device)
            parameter.add_(NOISE * parameter.square().mean().sqrt() * noise)
