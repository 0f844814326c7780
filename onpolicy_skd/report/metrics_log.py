"""The run's metrics: one JSON object per line, and the same numbers for trackers."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from onpolicy_skd.report.trackers import Trackers
from onpolicy_skd.storage.files import RunPaths, write_text


class Event(StrEnum):
    """Values of ``event`` in a record; the record of an optimizer step has a ``loss`` instead."""

    EVALUATION = "evaluation"
    EMPTY_BATCH = "empty_batch"
    SKIPPED = "skipped"
    OVERFLOW = "overflow"
    WARNING = "warning"
    FAULT = "fault"
    UNSAVED = "unsaved"


class MetricsLog:
    """Writer that appends records to ``metrics.jsonl`` and, on resume, drops those of steps that will be repeated."""

    def __init__(
        self, folder: Path, first_step: int = 0, resumed: bool | None = None, trackers: Trackers | None = None
    ) -> None:
        """Open the file.

        ``resumed``: the existing records belong to this run; by default True if ``first_step`` is not 0.
        """
        self.path = RunPaths(folder).metrics
        resumed = bool(first_step) if resumed is None else resumed
        kept = [r for r in read(self.path) if _is_kept(r, first_step)] if resumed else []
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("ab", buffering=0)
        self._trackers = trackers

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``, which must hold ``step``, and pass its numbers to the trackers.

        Raises OSError, with the file unchanged, if the disk is full.
        """
        line = (json.dumps(record) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) < len(line):
            self._file.truncate(end)  # half a line would look like damage
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self._trackers:
            self._trackers.log(record)

    def close(self) -> None:
        self._file.close()


def _is_kept(record: dict[str, Any], first_step: int) -> bool:
    """Return True if resuming at ``first_step`` keeps ``record``; the step of an evaluation counts the steps *done*."""
    if record.get("event") == Event.FAULT:
        return True
    if record.get("event") == Event.EVALUATION:
        return record["step"] <= first_step and record["name"] != "after"
    return record["step"] < first_step


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, without a last line that a kill cut off."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if line is not lines[-1]:
                raise
    return records


def steps_of(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of optimizer steps."""
    return [r for r in records if "loss" in r]


def events_of(records: Iterable[dict[str, Any]], event: Event) -> list[dict[str, Any]]:
    return [r for r in records if r.get("event") == event]
