"""Durable state: written beside, fsynced, renamed; safetensors and JSON only, so that loading never unpickles.

A checkpoint is a folder ``step-00000050`` with tensors and ``state.json``; the latter holds each file's SHA-256 and its
own.  A folder that is damaged is skipped, with a warning, in favour of the newest good one.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.storage.files import SaveError, digest_of, replace_folder, sha256, write_text

logger = logging.getLogger(__name__)
STATE = "state.json"
TENSORS = "tensors.safetensors"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int  # batches of prompts consumed
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def save(folder: Path, step: int, state: dict[str, Any], tensors: dict[str, Tensor], keep: int) -> Path:
    """Writes ``folder/step-N`` atomically, then removes all but the newest ``keep``; returns its path.

    Raises SaveError, with nothing changed, if the disk is full or refuses.
    """
    beside = folder / f".step-{step:08d}.tmp"
    try:
        final = _write(folder, beside, step, state, tensors)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)  # gives back the room it took
        raise SaveError(f"the checkpoint of step {step} cannot be written to {folder}: {error}") from error
    for old in [path for path in _newest_first(folder) if path != final][keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(folder: Path, beside: Path, step: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside / TENSORS)
    record = {"format": 1, "step": step, "state": state, "sha256": {TENSORS: sha256(beside / TENSORS)}}
    write_text(beside / STATE, json.dumps(record | {"digest": digest_of(record)}, indent=1))
    replace_folder(final, beside)
    return final


def load(path: Path) -> Checkpoint:
    """Raises CheckpointError naming what is missing, damaged or unknown."""
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        if record["format"] != 1:
            raise CheckpointError(f"checkpoint {path}: format {record['format']!r}, this version reads format 1")
        if record.pop("digest") != digest_of(record):
            raise CheckpointError(f"checkpoint {path}: {STATE} is damaged (its digest differs)")
        for name, digest in record["sha256"].items():
            if sha256(path / name) != digest:
                raise CheckpointError(f"checkpoint {path}: {name} is damaged (its SHA-256 differs)")
        return Checkpoint(path, record["step"], record["state"], load_file(path / TENSORS))
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise  # a disk that does not answer now is no damage
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except Exception as error:  # damage shows in many ways: missing files, broken JSON, lost keys
        raise CheckpointError(f"checkpoint {path}: unreadable: {type(error).__name__}: {error}") from error


def newest(folder: Path) -> Checkpoint | None:
    """The newest good checkpoint under ``folder``; damaged ones are warned of and renamed ``damaged-step-N``, lest they
    count among the newest that are kept.  What a killed write left lying is cleared away."""
    for half in folder.glob(".step-*.tmp"):
        shutil.rmtree(half, ignore_errors=True)
    for replaced in folder.glob(".step-*.old"):  # killed while it was being replaced
        final = folder / replaced.stem.removeprefix(".")
        shutil.rmtree(replaced, ignore_errors=True) if final.exists() else replaced.rename(final)
    for path in _newest_first(folder):
        try:
            return load(path)
        except CheckpointError as error:
            logger.warning("%s; trying the one before", error)
            names = (path.with_name(f"damaged-{path.name}{end}") for end in ("", *(f".{i}" for i in range(1, 1000))))
            path.rename(next(name for name in names if not name.exists()))
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)
