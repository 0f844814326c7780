"""The run's metrics: one JSON object a line, and the same numbers to TensorBoard."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from onpolicy_skd.storage.files import write_text

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to ``metrics.jsonl``; on resume, forgets those of steps that will be done again."""

    def __init__(
        self, folder: Path, first_step: int = 0, tensorboard: bool = False, resumed: bool | None = None
    ) -> None:
        """``resumed``: whether what is there belongs to this run; default: if it has a first step."""
        self.path = folder / FILE
        resumed = bool(first_step) if resumed is None else resumed
        kept = [r for r in read(self.path) if _stays(r, first_step)] if resumed else []
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("ab", buffering=0)
        self._tracker = _tensorboard(folder, first_step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """``record`` must hold ``step``; nested numbers reach TensorBoard as ``outer/inner``.  Raises OSError."""
        line = (json.dumps(record) + "\n").encode()
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) < len(line):
            self._file.truncate(end)  # half a line would be taken for damage
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self._tracker:
            self._tracker.log(_flat(record), step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self._tracker:
            self._tracker.finish()


def _stays(record: dict[str, Any], first_step: int) -> bool:
    """Whether resuming before ``first_step`` leaves ``record`` as it is; evaluations count the steps *done*."""
    if record.get("event") == "fault":
        return True
    if record.get("event") == "evaluation":
        return record["step"] <= first_step and record["name"] != "after"
    return record["step"] < first_step


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line torn by a kill is left out."""
    records = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if line is not lines[-1]:
                raise
    return records


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            flat[prefix + name] = value
    return flat


def _tensorboard(folder: Path, first_step: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState(cpu=True)  # the tracker asks it whether this is the main process; the driver owns no device
    tracker = TensorBoardTracker("tensorboard", logging_dir=str(folder), purge_step=first_step)
    tracker.start()
    return tracker
