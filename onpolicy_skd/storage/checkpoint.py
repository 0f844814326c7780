"""Checkpoints: written to a temporary folder, synced, renamed; safetensors and JSON only, so loading never unpickles.

A checkpoint is a folder ``step-00000050`` with tensors and ``state.json``, which holds the SHA-256 of the tensors and
of itself.  A damaged folder is skipped, with a warning, in favor of the newest good one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.storage.files import SaveError, digest_of, replace_folder, sha256, write_text

logger = logging.getLogger(__name__)
STATE = "state.json"
TENSORS = "tensors.safetensors"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message names the file."""


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, mapped into memory.

    A tensor's bytes are read when they are used; copying a slice reads that slice only.  Raises CheckpointError if the
    file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path.parent}: {path.name} cannot be read ({error})") from error
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int  # batches of prompts consumed
    state: dict[str, Any]

    @property
    def tensors(self) -> TensorFile:
        return TensorFile(self.path / TENSORS)


def save(folder: Path, step: int, state: dict[str, Any], tensors: Mapping[str, Tensor], keep: int) -> Path:
    """Write ``folder/step-N`` atomically and remove all but the newest ``keep``; return its path.

    Raises SaveError, with earlier checkpoints unchanged, if writing fails, for example on a full disk.
    """
    temporary = folder / f".step-{step:08d}.tmp"
    try:
        final = _write(folder, temporary, step, state, tensors)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # frees its disk space
        raise SaveError(f"the checkpoint of step {step} cannot be written to {folder}: {error}") from error
    for old in [path for path in _newest_first(folder) if path != final][keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


class BackgroundWriter:
    """Writer of checkpoints on a thread, so that a learner on a GPU trains while its copy is written."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, folder: Path, step: int, state: dict[str, Any], tensors: Mapping[str, Tensor], keep: int) -> Path:
        """Copy ``tensors``, which may change afterwards, and start to write them as ``save`` does; return the path.

        Waits for the previous checkpoint, and raises its SaveError once this one is being written.
        """
        before, self._pending = self._pending, None
        error = before.exception() if before else None
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self._pending = self._executor.submit(save, folder, step, state, copies, keep)
        if error:
            raise error
        return _path(folder, step)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.  Raises its SaveError."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _write(folder: Path, temporary: Path, step: int, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    final = _path(folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
    record = {"format": 1, "step": step, "state": state, "sha256": {TENSORS: sha256(temporary / TENSORS)}}
    write_text(temporary / STATE, json.dumps(record | {"digest": digest_of(record)}, indent=1))
    replace_folder(final, temporary)
    return final


def load(path: Path, verify: bool = True) -> Checkpoint:
    """Return the checkpoint in ``path``; ``verify=False`` trusts its tensors, which another process has checked.

    Raises CheckpointError naming what is missing, damaged or unknown.
    """
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        if record["format"] != 1:
            raise CheckpointError(f"checkpoint {path}: format {record['format']!r}, this version reads format 1")
        if record.pop("digest") != digest_of(record):
            raise CheckpointError(f"checkpoint {path}: {STATE} is damaged (its digest differs)")
        for name, digest in record["sha256"].items() if verify else ():
            if sha256(path / name) != digest:
                raise CheckpointError(f"checkpoint {path}: {name} is damaged (its SHA-256 differs)")
        return Checkpoint(path, record["step"], record["state"])
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise  # a disk that does not answer is not damage
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except Exception as error:  # damage shows in many ways: missing files, broken JSON, lost keys
        raise CheckpointError(f"checkpoint {path}: unreadable: {type(error).__name__}: {error}") from error


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest good checkpoint under ``folder``, its checksums verified; None if there is none.

    Damaged ones are logged and renamed ``damaged-step-N``, so that they do not count as kept checkpoints.  Leftovers of
    a killed write are removed.
    """
    for unfinished in folder.glob(".step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for replaced in folder.glob(".step-*.old"):  # left by a kill during its replacement
        final = folder / replaced.stem.removeprefix(".")
        shutil.rmtree(replaced, ignore_errors=True) if final.exists() else replaced.rename(final)
    for path in _newest_first(folder):
        try:
            return load(path)
        except CheckpointError as error:
            logger.warning("%s; trying the previous one", error)
            suffixes = ("", *(f".{i}" for i in range(1, 1000)))
            names = (path.with_name(f"damaged-{path.name}{suffix}") for suffix in suffixes)
            path.rename(next(name for name in names if not name.exists()))
    return None


def damaged(folder: Path) -> list[Path]:
    """Return the folders of the checkpoints that ``newest`` could not read."""
    return sorted(folder.glob("damaged-step-*"))


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)
