"""Bytes that change on disk, and input that nobody meant: readers must answer right or refuse in words."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from eval.faults.processes import ROOT, Tally
from onpolicy_skd.config import loading as command_line
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import DataSettings
from onpolicy_skd.data import demo_task
from onpolicy_skd.data.prompts import load_questions
from onpolicy_skd.models.loading import load_model
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.teacher import cache_format as caches
from onpolicy_skd.teacher.cache_format import Layout, Manifest
from onpolicy_skd.teacher.cache_reader import TeacherCache
from onpolicy_skd.teacher.teacher import Teacher
from onpolicy_skd.types import Trajectory

SLOW = 10.0  # seconds after which a reader counts as hung


def flipped(content: bytes, draw: random.Random) -> bytes:
    """``content`` with one byte changed."""
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ draw.randrange(1, 256)]) + content[at + 1 :]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """``content`` cut, doubled, spliced, or with bytes, digits or words of it changed, a few times over."""
    words = [b"null", b"true", b"-1", b"1e999", b"[]", b"{}", b'""', b"\xff\xfe", b"\x00", b"nan", b"&a *a", b"!!x y",
             b"9" * 400, b"[" * 2000, "\u202e".encode(), b"\n", b": ", b"- "]  # fmt: skip
    for _ in range(draw.randrange(1, 6)):
        size = len(content)
        first, last = sorted(draw.randrange(size + 1) for _ in range(2))
        part = content[first:last]
        content = draw.choice((
            lambda c, a, b, p: flipped(c, draw) if c else c,
            lambda c, a, b, p: c[:a],
            lambda c, a, b, p: c[:a] + c[b:],
            lambda c, a, b, p: c[:b] + p + c[b:],
            lambda c, a, b, p: c[:a] + draw.choice(words) + c[a:],
            lambda c, a, b, p: c[:a] + draw.choice(words) + c[b:] if b - a < 40 else c,
            lambda c, a, b, p: c[:a] + draw.randbytes(draw.randrange(1, 9)) + c[a:],
        ))(content, first, last, part)  # fmt: skip
    return content


def tried(tally: Tally, what: str, action: Callable[[], bool]) -> None:
    """Counts ``action``: true, it ended right; a ConfigError of one line, it refused; anything else is wrong."""
    started = time.monotonic()
    try:
        right = action()
    except ConfigError as error:
        outcome, note = ("clear_error", "") if str(error).strip() else ("wrong", f"{what}: an empty error")
    except Exception as error:
        outcome, note = "wrong", f"{what}: {type(error).__name__}: {str(error)[:200]}"
    else:
        outcome, note = ("ended_right", "") if right else ("wrong", f"{what}: wrong content was taken for good")
    if time.monotonic() - started > SLOW:
        outcome, note = "wrong", f"{what}: took {time.monotonic() - started:.0f} s"
    tally.add(outcome, 1, note)


# -- damage --------------------------------------------------------------------------------------------------------


def damaged_checkpoints(folder: Path, draw: random.Random, count: int) -> Tally:
    """A byte of the newest checkpoint changes: it, or the one before, must come back whole."""
    tally = Tally()
    for number in range(count):
        own = folder / f"checkpoint-{number}"
        tensors = {"weight": torch.randn(64, 32), "optimizer/exp_avg/weight": torch.randn(64, 32)}
        for step in (1, 2):
            made = checkpoint.save(own, step, {"step": step, "words": "a b"}, tensors, keep=2)
        file = draw.choice(sorted(made.iterdir(), key=lambda f: f.name))
        file.write_bytes(flipped(file.read_bytes(), draw))

        def right(own: Path = own, tensors: dict[str, torch.Tensor] = tensors) -> bool:
            found = checkpoint.newest(own)
            same = found is not None and all(torch.equal(found.tensors[n], t) for n, t in tensors.items())
            return found is not None and same and found.state == {"step": found.step, "words": "a b"}

        tried(tally, f"checkpoint {file.name}", right)
    return tally


def small_cache(folder: Path) -> tuple[Path, list[Trajectory], list[torch.Tensor]]:
    """A cache of the bundled teacher on a few demo texts, and what it holds."""
    settings = command_line.resolve(
        {
            "mode": "off_policy", "data": {"source": "demo"}, "classes": {"sampler": "rs_kd", "draws": 16},
            "student": {"model": "bundled:demo_student"}, "teacher": {"model": "bundled:demo_teacher"},
        }
    )  # fmt: skip
    model = load_model("bundled:demo_student", torch.float32, "cpu")
    vocabulary = model.config.vocab_size
    teacher = Teacher(SplitModel(model, vocabulary), 4096, 0)
    draw = np.random.default_rng(0)
    texts = [
        Trajectory(f"t{i}", draw.integers(2, vocabulary, 5), draw.integers(2, vocabulary, 9 + i), np.zeros(9 + i),
                   "stop", None) for i in range(12)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    cut = caches.cut([len(t.response_ids) for t in texts], 60)
    shards = [
        caches.write_shard(folder, i, [texts[j] for j in part], teacher, settings, vocabulary)
        for i, part in enumerate(cut)
    ]
    plan = caches.plan_of([t.digest for t in texts], cut)
    caches.finish(folder, Manifest({}, Layout.of(settings, vocabulary), plan, None, shards))
    cache = TeacherCache(folder)
    return folder, texts, [cache.classes(t).probs_NC for t in texts]


def damaged_caches(
    folder: Path, draw: random.Random, count: int, change: Callable[[bytes, random.Random], bytes] = flipped
) -> Tally:
    """A file of a cache changes: what is read is as before, or refused."""
    tally = Tally()
    own, texts, expected = small_cache(folder / "cache")
    files = sorted(f for f in own.iterdir() if f.is_file() and f.stat().st_size)
    whole = {f: f.read_bytes() for f in files}
    for _ in range(count):
        file = draw.choice(files)
        file.write_bytes(change(whole[file], draw))

        def right() -> bool:
            cache = TeacherCache(own)
            return all(torch.equal(cache.classes(t).probs_NC, e) for t, e in zip(texts, expected, strict=True))

        tried(tally, f"cache {file.name}", right)
        file.write_bytes(whole[file])
    return tally


def damaged_data(
    folder: Path, draw: random.Random, count: int, change: Callable[[bytes, random.Random], bytes] = flipped
) -> Tally:
    """A byte of a data file changes: rows come back as other text, or the file and line are named."""
    tally, file = Tally(), folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row, _ in zip(demo_task.problems("train"), range(20), strict=False)]
    whole = "".join(json.dumps({"question": r["question"], "answer": r["answer"]}) + "\n" for r in rows).encode()
    settings = DataSettings(source="jsonl", train_file=file)
    for _ in range(count):
        file.write_bytes(change(whole, draw))
        tried(tally, "data rows.jsonl", lambda: all(q.strip() for _, q, _ in load_questions(settings, "train")))
    return tally


# -- fuzzing -------------------------------------------------------------------------------------------------------


def fuzzed_settings(folder: Path, draw: random.Random, count: int) -> Tally:
    """Configuration files and overrides that nobody meant."""
    tally, file = Tally(), folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    whole = [f.read_bytes() for f in sorted((ROOT / "configs").rglob("*.yaml")) if "compare" not in f.name]
    keys = [key for key, _ in command_line.walk()]
    values = ["null", "-1", "0", "1e400", ".nan", "yes", "[1, 2]", "{a: 1}", "x" * 300, "'", "\x00", "../..", "1.5", ""]
    for number in range(count):
        if number % 2:
            file.write_bytes(mutated(draw.choice(whole), draw))
            overrides: list[str] = []
        else:
            file.write_bytes(whole[0])
            overrides = [f"{draw.choice(keys)}={draw.choice(values)}" for _ in range(draw.randrange(1, 4))]

        def right(own: Sequence[str] = overrides) -> bool:
            return bool(command_line.build_settings(file, [command_line.parse_override(text) for text in own]))

        tried(tally, f"settings {overrides or file.read_bytes()[:80]!r}", right)
    return tally


def fuzzed_data(folder: Path, draw: random.Random, count: int) -> Tally:
    return damaged_data(folder, draw, count, mutated)


def fuzzed_caches(folder: Path, draw: random.Random, count: int) -> Tally:
    return damaged_caches(folder, draw, count, mutated)
