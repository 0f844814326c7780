"""Tiny models of three architectures, random trajectories and small settings for the tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from onpolicy_skd.config.loading import resolve
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.types import Trajectory

ROOT = Path(__file__).parents[1]
VOCABULARY = 97
ON_GPU = torch.cuda.is_available()  # engines then run there; what is bitwise on a CPU is only close
GAP = 2e-3 if ON_GPU else 1e-5  # nats between the log-probabilities of engine and model, both float32
torch.set_num_threads(1)


def tiny_model(family: str, tied: bool, vocabulary: int = VOCABULARY, hidden: int = 32, seed: int = 0):
    """A randomly initialised two-layer model, float32, with weights large enough for peaked distributions."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied, max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=1, head_dim=hidden // 2))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    return model.float().eval()


def make_trajectories(
    lengths: list[tuple[int, int]], vocabulary: int = VOCABULARY, seed: int = 0, version: int = 0
) -> list[Trajectory]:
    """Random trajectories with the given (prompt, response) lengths; sampler log-probabilities are zeros."""
    rng = np.random.default_rng(seed)
    return [
        Trajectory(
            key=f"t{number}",
            prompt_ids=rng.integers(2, vocabulary, prompt),
            response_ids=rng.integers(2, vocabulary, response),
            sampler_logprobs=np.zeros(response, np.float32),
            finish_reason="stop",
            policy_version=version,
        )
        for number, (prompt, response) in enumerate(lengths)
    ]


def tiny_settings(**sections) -> Settings:
    """Small float32 settings: no bound on the gap unless a test sets it, few prompts unless it chooses its data."""
    tree: dict = {
        "run": {"trackers": []},
        "data": {"source": "demo", "max_prompt_tokens": 96},
        "student": {"model": "bundled:demo_student"},
        "teacher": {"model": "bundled:demo_teacher", "dtype": "float32"},
        "rollout": {"max_tokens": 128, "max_sequences": 64, "dtype": "float32", "gpu_memory": 0.2},
        "learner": {"compute_dtype": "float32"},
        "sync": {"max_gap": 1e9},
    }
    if not sections.get("data", {}).keys() & {"source", "mix", "train_problems", "validation_problems"}:
        tree["data"]["train_problems"] = 500
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return resolve(tree)
