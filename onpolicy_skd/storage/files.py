"""Atomic, durable writes and checksums of files and folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class SaveError(RuntimeError):
    """A checkpoint that cannot be written; those before are as they were."""


def replace_folder(final: Path, beside: Path) -> None:
    """Makes ``beside``, a whole folder, ``final``.  A kill in between leaves the one before as ``.NAME.old``."""
    replaced = final.with_name(f".{final.name}.old")
    mode = new_file_mode(beside)
    for file in beside.iterdir():
        file.chmod(mode)
        sync(file)
    sync(beside)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    beside.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``, atomically and durably."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name next to ``path`` that no other process uses.  What is written there replaces ``path``, atomically and
    durably; after an error nothing of it is left."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        mode = new_file_mode(path.parent)
        yield beside
        beside.chmod(mode)
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def new_file_mode(folder: Path) -> int:
    """Return the mode of a new file in ``folder``, as the umask gives it; safetensors writes files as 0600."""
    probe = folder / f".mode.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(record: dict[str, Any]) -> str:
    """Of what JSON says of ``record``, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
