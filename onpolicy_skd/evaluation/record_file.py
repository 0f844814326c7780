"""Records of an evaluation on disk: appended as they come, safe from a kill, sorted by problem at the end."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.storage.files import digest_of, write_text
from onpolicy_skd.types import Prompt

RECORDS, SETTINGS = "records.jsonl", "evaluation.json"


class RecordFile:
    """``FOLDER/records.jsonl``, open for appending, with the settings that made it in ``FOLDER/evaluation.json``.

    ``__enter__`` raises ConfigError if the folder cannot be written, is in use, or holds records of other settings or
    problems.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], prompts: Sequence[Prompt], samples: int) -> None:
        self.path = folder / RECORDS
        self._folder, self._settings = folder, settings
        self._prompts = {f"{p.key}/{i}": p for p in prompts for i in range(samples)}
        self._stack = ExitStack()

    def __enter__(self) -> RecordFile:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = self._stack.enter_context((self._folder / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_settings()
            self.known = self._read()
            self._file = self._stack.enter_context(self.path.open("a", encoding="utf-8"))
        except BlockingIOError:
            raise ConfigError(f"--out {self._folder}: another evaluation writes to it; give another folder") from None
        except OSError as error:
            raise ConfigError(f"--out {self._folder}: cannot be written ({error.strerror})") from None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def append(self, record: dict[str, Any]) -> None:
        """Append a record and flush it, so that a kill loses at most the line being written."""
        self._file.write(_line(record))
        self._file.flush()

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the records on disk by ``records``, atomically."""
        write_text(self.path, "".join(map(_line, records)))

    def _check_settings(self) -> None:
        file, digest = self._folder / SETTINGS, digest_of(self._settings)
        if not file.exists():
            if self.path.exists():
                raise ConfigError(
                    f"--out {self._folder}: holds {RECORDS} of unknown settings; give another folder or remove it"
                )
            write_text(file, json.dumps({"digest": digest, "settings": self._settings}, indent=1) + "\n")
            return
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["digest"] != digest:
            names = self._settings | saved["settings"]
            changed = [k for k in names if saved["settings"].get(k) != self._settings.get(k)]
            raise ConfigError(
                f"--out {self._folder}: its answers are of another {', '.join(changed)}; give another folder"
            )

    def _read(self) -> list[dict[str, Any]]:
        """Return the records on disk and cut off a line that a kill left incomplete.  Raises ConfigError."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
        try:
            records = [json.loads(line) for line in complete.decode().split("\n")[:-1]]
            asked = {r["key"]: (r["question"], r["reference"]) for r in records}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{self.path}: damaged ({error}); give another folder or remove it") from None
        for key, texts in asked.items():
            prompt = self._prompts.get(key)
            if prompt is None:
                raise ConfigError(
                    f"--out {self._folder}: also holds an answer to {key}, which this command does not ask; give at "
                    "least as many --problems and --samples as before, or another folder"
                )
            if texts != (prompt.question, prompt.answer):
                raise ConfigError(f"--out {self._folder}: another question or reference at {key}; give another folder")
        return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
