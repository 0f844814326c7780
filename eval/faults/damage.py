"""Damaged files and fuzzed input: readers must return the right content or raise a clear error."""

from __future__ import annotations

import json
import random
import shutil
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
from onpolicy_skd.data.rows import load_questions
from onpolicy_skd.models.loading import load_model
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.teacher import cache_format as caches
from onpolicy_skd.teacher.cache_format import Layout, Manifest
from onpolicy_skd.teacher.cache_reader import TeacherCache
from onpolicy_skd.teacher.teacher import Teacher
from onpolicy_skd.types import Trajectory

SLOW = 10.0  # seconds after which a reader counts as hung


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Return ``content`` with one byte changed."""
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return ``content`` after a few random cuts, repetitions, splices and replacements."""
    words = [b"null", b"true", b"-1", b"1e999", b"[]", b"{}", b'""', b"\xff\xfe", b"\x00", b"nan", b"&a *a", b"!!x y",
             b"9" * 400, b"[" * 2000, "\u202e".encode(), b"\n", b": ", b"- "]  # fmt: skip
    for _ in range(rng.randrange(1, 6)):
        size = len(content)
        first, last = sorted(rng.randrange(size + 1) for _ in range(2))
        span = content[first:last]
        content = rng.choice((
            lambda c, a, b, p: flipped(c, rng) if c else c,
            lambda c, a, b, p: c[:a],
            lambda c, a, b, p: c[:a] + c[b:],
            lambda c, a, b, p: c[:b] + p + c[b:],
            lambda c, a, b, p: c[:a] + rng.choice(words) + c[a:],
            lambda c, a, b, p: c[:a] + rng.choice(words) + c[b:] if b - a < 40 else c,
            lambda c, a, b, p: c[:a] + rng.randbytes(rng.randrange(1, 9)) + c[a:],
        ))(content, first, last, span)  # fmt: skip
    return content


def tried(tally: Tally, what: str, action: Callable[[], bool]) -> None:
    """Count the outcome of ``action``: True is right, a ConfigError with text is a clear error, all else is wrong.

    An action that takes longer than SLOW is wrong too.
    """
    start = time.monotonic()
    try:
        right = action()
    except ConfigError as error:
        outcome, note = ("clear_error", "") if str(error).strip() else ("wrong", f"{what}: an empty error")
    except Exception as error:
        outcome, note = "wrong", f"{what}: {type(error).__name__}: {str(error)[:200]}"
    else:
        outcome, note = ("ended_right", "") if right else ("wrong", f"{what}: wrong content was accepted")
    if time.monotonic() - start > SLOW:
        outcome, note = "wrong", f"{what}: took {time.monotonic() - start:.0f} s"
    tally.add(outcome, 1, note)


# -- damage --------------------------------------------------------------------------------------------------------


def damaged_checkpoints(folder: Path, rng: random.Random, count: int) -> Tally:
    """Change one byte of the newest checkpoint: ``newest`` must return its content, or that of the one before it."""
    tally = Tally()
    for number in range(count):
        checkpoints = folder / f"checkpoint-{number}"
        tensors = {"weight": torch.randn(64, 32), "optimizer/exp_avg/weight": torch.randn(64, 32)}
        for step in (1, 2):
            saved = checkpoint.save(checkpoints, step, {"step": step, "words": "a b"}, tensors, keep=2)
        file = rng.choice(sorted(saved.iterdir(), key=lambda f: f.name))
        file.write_bytes(flipped(file.read_bytes(), rng))

        def right(checkpoints: Path = checkpoints, tensors: dict[str, torch.Tensor] = tensors) -> bool:
            loaded = checkpoint.newest(checkpoints)
            same = loaded is not None and all(torch.equal(loaded.tensors[n], t) for n, t in tensors.items())
            return loaded is not None and same and loaded.state == {"step": loaded.step, "words": "a b"}

        tried(tally, f"checkpoint {file.name}", right)
    return tally


def small_cache(folder: Path) -> tuple[Path, list[Trajectory], list[torch.Tensor]]:
    """Return the folder of a small cache, its trajectories, and their class probabilities."""
    settings = command_line.resolve(
        {
            "mode": "off_policy", "data": {"source": "demo"}, "classes": {"sampler": "rs_kd", "draws": 16},
            "student": {"model": "bundled:demo_student"}, "teacher": {"model": "bundled:demo_teacher"},
        }
    )  # fmt: skip
    model = load_model("bundled:demo_student", torch.float32, "cpu")
    vocabulary = model.config.vocab_size
    teacher = Teacher(SplitModel(model, vocabulary), 4096, 0)
    rng = np.random.default_rng(0)
    texts = [
        Trajectory(f"t{i}", rng.integers(2, vocabulary, 5), rng.integers(2, vocabulary, 9 + i), np.zeros(9 + i),
                   "stop", None) for i in range(12)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    cut = caches.cut([len(t.target_ids) for t in texts], 60)
    shards = [
        caches.write_shard(folder, i, [texts[j] for j in indices], teacher, settings, vocabulary)
        for i, indices in enumerate(cut)
    ]
    plan = caches.plan_of([t.digest for t in texts], cut)
    caches.complete(folder, Manifest({}, Layout.of(settings, vocabulary), plan, None, shards))
    cache = TeacherCache(folder)
    return folder, texts, [cache.classes(t).probs_NC for t in texts]


def damaged_caches(
    folder: Path, rng: random.Random, count: int, change: Callable[[bytes, random.Random], bytes] = flipped
) -> Tally:
    """Change a file of a cache: the reader must return the same content as before, or refuse the cache."""
    tally = Tally()
    cache_folder, texts, expected = small_cache(folder / "cache")
    files = sorted(f for f in cache_folder.iterdir() if f.is_file() and f.stat().st_size)
    originals = {f: f.read_bytes() for f in files}
    for _ in range(count):
        file = rng.choice(files)
        file.write_bytes(change(originals[file], rng))

        def right() -> bool:
            cache = TeacherCache(cache_folder)
            return all(torch.equal(cache.classes(t).probs_NC, e) for t, e in zip(texts, expected, strict=True))

        tried(tally, f"cache {file.name}", right)
        file.write_bytes(originals[file])
    return tally


def damaged_data(
    folder: Path, rng: random.Random, count: int, change: Callable[[bytes, random.Random], bytes] = flipped
) -> Tally:
    """Change a data file: the loader must return rows, perhaps with other text, or raise a ConfigError."""
    tally, file = Tally(), folder / "rows.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row, _ in zip(demo_task.problems("train"), range(20), strict=False)]
    original = "".join(json.dumps({"question": r["question"], "answer": r["answer"]}) + "\n" for r in rows).encode()
    settings = DataSettings(source="jsonl", train_file=file)
    for _ in range(count):
        file.write_bytes(change(original, rng))
        tried(tally, "data rows.jsonl", lambda: all(q.strip() for _, q, _ in load_questions(settings, "train")))
    return tally


# -- fuzzing -------------------------------------------------------------------------------------------------------


def fuzzed_settings(folder: Path, rng: random.Random, count: int) -> Tally:
    """Build settings from mutated configuration files and from random overrides, alternately."""
    tally = Tally()
    shutil.copytree(ROOT / "configs", folder / "configs")  # the files extend each other by relative paths
    configs = [f for f in sorted((folder / "configs").rglob("*.yaml")) if "compare" not in f.name]
    keys = [key for key, _ in command_line.walk()]
    values = ["null", "-1", "0", "1e400", ".nan", "yes", "[1, 2]", "{a: 1}", "x" * 300, "'", "\x00", "../..", "1.5", ""]
    for number in range(count):
        file, overrides = configs[0], []
        if number % 2:
            original = rng.choice(configs)
            file = original.with_name("mutated.yaml")
            file.write_bytes(mutated(original.read_bytes(), rng))
        else:
            overrides = [f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.randrange(1, 4))]

        def right(file: Path = file, overrides: Sequence[str] = overrides) -> bool:
            return bool(command_line.build_settings(file, [command_line.parse_override(text) for text in overrides]))

        tried(tally, f"settings {overrides or file.read_bytes()[:80]!r}", right)
    return tally


def fuzzed_data(folder: Path, rng: random.Random, count: int) -> Tally:
    return damaged_data(folder, rng, count, mutated)


def fuzzed_caches(folder: Path, rng: random.Random, count: int) -> Tally:
    return damaged_caches(folder, rng, count, mutated)
