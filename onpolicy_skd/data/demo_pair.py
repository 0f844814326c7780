"""Recipe of the bundled tiny pair.

Train, from random weights and on the demo task alone, a byte-level BPE tokenizer with single-digit tokens, a teacher
(Qwen3 architecture, about 0.9M parameters) and a smaller student that is stopped long before it has learned the
arithmetic.  On two CPU cores the pair takes about half an hour.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from onpolicy_skd.data.demo_task import problems

VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEACHER = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
               num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
STUDENT = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=3,
               num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a lossless byte-level BPE over the task's text; each digit is a separate token."""
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (p["question"] + p["answer"] for p in itertools.islice(problems("train"), 5_000))
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(shape: dict[str, Any], tokenizer: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, head_dim=32, max_position_embeddings=512, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"), pad_token_id=0, **shape,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float()


def encode(problem: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem["question"]}], add_generation_prompt=True, return_dict=False
    )
    answer = tokenizer(problem["answer"], add_special_tokens=False)["input_ids"]
    return prompt, [*answer, tokenizer.eos_token_id]


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ``input_ids [B, L]`` and ``labels [B, L]``; only response tokens carry a label."""
    length = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for row, (prompt, response) in enumerate(rows):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return ids, labels


@torch.no_grad()
def greedy_match(model: Qwen3ForCausalLM, rows: list[tuple[list[int], list[int]]], pad: int) -> float:
    """Return the share of ``rows`` whose answers greedy decoding would reproduce; one forward, no generation."""
    right = 0
    for start in range(0, len(rows), 128):
        ids, labels = collate(rows[start : start + 128], pad)
        guess = model(input_ids=ids).logits[:, :-1].argmax(-1)
        right += ((guess == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).sum().item()
    return right / len(rows)


def train(model, tokenizer, steps: int, batch: int, lr: float, stop_at: float = 1.0) -> float:
    """Train by cross-entropy on reference answers until a held-out exact match of ``stop_at``; return the match."""
    stream, pad = problems("train"), tokenizer.pad_token_id
    held_out = [encode(p, tokenizer) for p in itertools.islice(problems("test", seed=1), 512)]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    pool, match = [], 0.0
    for step in range(1, steps + 1):
        if not pool:  # a pool of batches of similar length, in random order
            rows = sorted((encode(next(stream), tokenizer) for _ in range(16 * batch)), key=lambda r: len(r[0] + r[1]))
            pool = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            random.Random(step).shuffle(pool)
        ids, labels = collate(pool.pop(), pad)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        warm = min(1.0, step / 50)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            match = greedy_match(model, held_out, pad)
            print(f"step {step}/{steps} loss {loss.item():.4f} held-out match {match:.3f}", flush=True)
            if match >= stop_at:
                break
    return match


def main(argv: Sequence[str] | None = None, prog: str = "python -m onpolicy_skd.data.demo_pair") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives teacher/ and student/")
    parser.add_argument("--only", choices=("teacher", "student"), help="train one of the two")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the learning-rate schedule (default: 1000)")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args(argv)
    tokenizer = train_tokenizer()
    for name, shape, stop_at in (("teacher", TEACHER, 1.0), ("student", STUDENT, 0.05)):
        if args.only in (None, name):
            model = build_model(shape, tokenizer)
            print(name, f"{model.num_parameters():,} parameters", flush=True)
            train(model, tokenizer, args.steps, 128, args.lr, stop_at)
            model.save_pretrained(args.out / name)
            tokenizer.save_pretrained(args.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
