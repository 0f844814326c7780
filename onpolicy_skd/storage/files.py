"""The files of a run folder, atomic and durable writes, locks and checksums."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpolicy_skd.config.errors import ConfigError

logger = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint or model that cannot be written; earlier ones are unchanged."""


class LockedError(ConfigError):
    """A folder that another process is writing to; the message names the process."""


@dataclass(frozen=True, slots=True)
class RunPaths:
    """All files of a run's folder, and the folders that runs under one ``run.dir`` share."""

    folder: Path

    @property
    def config(self) -> Path:
        """All settings of the run, as resolved."""
        return self.folder / "config.yaml"

    @property
    def record(self) -> Path:
        """Digest of the data, and the settings that changed when the run was resumed."""
        return self.folder / "record.json"

    @property
    def lock(self) -> Path:
        return self.folder / ".lock"

    @property
    def metrics(self) -> Path:
        """One JSON object per step or event."""
        return self.folder / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.md"

    @property
    def curves(self) -> Path:
        return self.folder / "curves.png"

    @property
    def trackers(self) -> Path:
        """Ids of the run at wandb and MLflow, with which a resumed run continues there."""
        return self.folder / "trackers.json"

    @property
    def timeline(self) -> Path:
        """The timeline of one step as a trace; ``timeline_image`` draws it."""
        return self.folder / "timeline.json"

    @property
    def timeline_image(self) -> Path:
        return self.folder / "timeline.png"

    @property
    def validation(self) -> Path:
        """The training problems that are held out."""
        return self.folder / "validation.json"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained student, a plain transformers model."""
        return self.folder / "final"

    @property
    def best(self) -> Path:
        """The student of the best evaluation during training, a plain transformers model."""
        return self.folder / "best"

    @property
    def best_record(self) -> Path:
        """Step and value of the evaluation whose student is in ``best``."""
        return self.folder / "best.json"

    @property
    def evaluations(self) -> Path:
        return self.folder / "evaluations"

    def evaluation(self, name: str, step: int) -> Path:
        """Return the file with the judged answers of an evaluation."""
        return self.evaluations / f"{name}-{step:06d}.jsonl"

    @property
    def packed_text(self) -> Path:
        """Packed text, shared by runs on the same documents."""
        return self.folder.parent / "text"

    @property
    def prefilter(self) -> Path:
        """Scores of prompts, shared by runs on the same data and student."""
        return self.folder.parent / "prefilter"

    @property
    def references(self) -> Path:
        """Answers of the teacher or the initial student, shared by runs on the same prompts and model."""
        return self.folder.parent / "references"


def config_beside(model: str | Path) -> Path | None:
    """Return the config.yaml of the run folder that holds ``model`` (``runs/NAME/final``); None if there is none."""
    file = RunPaths(Path(model).parent).config
    return file if file.exists() else None


@contextmanager
def lock(path: Path, subject: str) -> Iterator[None]:
    """Hold an exclusive lock on ``path``.

    The system frees the lock when the process ends in any way, so a leftover file does no harm.  If the file system
    has no locks, only a warning is logged.  Raises LockedError naming ``subject`` and the process and host that hold
    the lock.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise LockedError(f"{subject} is in use by {holder}; wait for its end, or stop it") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run on it", subject, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def replace_folder(final: Path, temporary: Path) -> None:
    """Rename ``temporary``, a complete folder, to ``final``.  A kill in between leaves the old one as ``.NAME.old``."""
    replaced = final.with_name(f".{final.name}.old")
    mode = new_file_mode(temporary)
    for path in temporary.rglob("*"):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)  # who may read a folder may also enter it
        sync(path)
    sync(temporary)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text``, atomically and durably."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, tree: Any) -> None:
    """Write ``tree`` as indented JSON, as ``write_text`` does; create the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(tree, indent=2) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name next to ``path`` that no other process uses.

    The file that the block writes there replaces ``path``, atomically and durably; after an error it is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        mode = new_file_mode(path.parent)
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def new_file_mode(folder: Path) -> int:
    """Return the mode of a new file in ``folder``, as the umask gives it; safetensors writes files as 0600."""
    probe = folder / f".mode.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(record: dict[str, Any]) -> str:
    """Return the SHA-256 of ``record`` as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
