"""Rows of data sets: GSM8K, the demo task, files with one JSON object per line, hub data sets."""

from __future__ import annotations

import itertools
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpolicy_skd.config.errors import ConfigError, first_line
from onpolicy_skd.config.schema import DataSettings
from onpolicy_skd.data import demo_task
from onpolicy_skd.types import Chat

DEMO_TRAIN_PROBLEMS = 20_000
DEMO_TEST_PROBLEMS = 1_000
GSM8K = dict(name="openai/gsm8k", subset="main")
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of parts of a message's content
ROLES = ("system", "developer", "user", "assistant", "tool")


class DataError(ConfigError):
    """A data file or row that cannot be used; the message names file and row."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data set."""

    name: str  # "FILE#LINE", for messages
    question: str
    answer: str  # empty: none
    columns: dict[str, Any]  # as read
    chat: Chat | None = None  # of data.messages_column
    teacher: str | None = None  # name of its teacher, where the run has several


def load_rows(settings: DataSettings, split: str) -> Iterator[Row]:
    """Yield each row of ``split`` ("train" or "eval").  Raises DataError."""
    training = split == "train"
    where, rows = _rows(settings, split)
    limit = settings.train_problems + settings.shots if training and settings.train_problems else None
    for number, row in itertools.islice(rows, limit):
        yield _row(f"{where}#{number}", row, settings, f"{where} row {number}")


def _row(name: str, row: dict[str, Any], settings: DataSettings, where: str) -> Row:
    answer_columns = [settings.answer_column] if settings.answer_column else []
    if settings.messages_column is None:
        question, *answer = text_columns(row, [settings.question_column, *answer_columns], where)
        return Row(name, question, "".join(answer), row, teacher=_teacher(row, settings, where))
    chat = read_chat(row, settings, where)
    answer = text_columns(row, [c for c in answer_columns if row.get(c) is not None], where)
    return Row(name, chat.question, "".join(answer), row, chat, _teacher(row, settings, where))


def _teacher(row: dict[str, Any], settings: DataSettings, where: str) -> str | None:
    """Return the name of the row's teacher; None if neither settings nor row give one.  Raises DataError."""
    if settings.teacher_column is None:
        return settings.teacher
    name = row.get(settings.teacher_column)
    if name is not None and not isinstance(name, str):
        raise DataError(f"{where}: column {settings.teacher_column!r} (data.teacher_column) is no text: {name!r}")
    return name


def read_chat(row: dict[str, Any], settings: DataSettings, where: str) -> Chat:
    """Return the conversation of a row, starting with ``data.system`` unless it has a system message.

    Raises DataError, naming ``where``, for messages or tools that no chat template can read, and for a conversation in
    which the assistant's last turn answers neither a user nor a tool.
    """
    messages = row.get(str(settings.messages_column))
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: column {settings.messages_column!r} is missing or no list of messages; this row has "
            f"{', '.join(map(repr, row)) or 'no columns'} (set data.messages_column; accepted: a list of objects with "
            "role and content, but not the JSON text of one)"
        )
    checked = [_message(m, f"{where}: message {number}") for number, m in enumerate(messages, 1)]
    if settings.system is not None and checked[0]["role"] not in ("system", "developer"):
        checked.insert(0, {"role": "system", "content": settings.system})
    chat = Chat(checked, _tools(row.get(settings.tools_column), f"{where}: column {settings.tools_column!r}"),
                settings.thinking)  # fmt: skip
    if not chat.prompt or chat.prompt[-1]["role"] not in ("user", "tool"):
        raise DataError(f"{where}: the assistant's last turn must follow a message of the roles user or tool")
    return chat


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message with its text as one string, without empty fields.  Raises DataError."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(f"{where}: must be an object with a role ({', '.join(ROLES)}) and content")
    checked = {key: value for key, value in message.items() if value is not None}
    content = checked.get("content", "")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        if others := [str(p["type"]) for p in content if p.get("type") not in TEXT_PARTS]:
            raise DataError(f"{where}: its content has a part of type {others[0]}; accepted: parts of type text")
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: its content is no text; accepted: a string, or a list of objects with a text")
    calls = checked.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls must be a list of objects with function: name and arguments")
    if message["role"] == "user" and is_blank(content):
        raise DataError(f"{where}: the user says nothing; give a content, or remove the message")
    if message["role"] == "assistant" and is_blank(content) and not calls:
        raise DataError(f"{where}: the assistant says nothing; give a content or tool_calls, or remove the message")
    checked["content"] = content
    if calls:
        checked["tool_calls"] = [_tool_call(call, where) for call in calls]
    check_text(json.dumps(checked, ensure_ascii=False, default=str), where)
    return checked


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, which templates expect; APIs give them as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: each of its tool_calls must be an object with function: name and arguments")
    arguments = _from_json(function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: the arguments of {function['name']} are no JSON object")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row, a list of JSON schemas or its JSON text; None if there are none."""
    tools = _from_json(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: must be a list of tools, each an object (its JSON schema), or the JSON text of one")
    check_text(json.dumps(tools, ensure_ascii=False, default=str), where)
    return tools


def _from_json(value: Any) -> Any:
    """Return the value of JSON text; return other values, and text that is not JSON, unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):  # ValueError: also a number of too many digits
        return value


def load_questions(settings: DataSettings, split: str) -> Iterator[tuple[str, str, str]]:
    """Yield (row, question, answer) of each row of ``split``.  Raises DataError."""
    return ((row.name, row.question, row.answer) for row in load_rows(settings, split))


def _rows(settings: DataSettings, split: str) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    """Return the name of the split's source, for messages, and its rows with their numbers (in files: line numbers)."""
    training = split == "train"
    name = settings.train_split if training else settings.eval_split
    if settings.source == "demo":
        if name not in demo_task.SPLITS:
            key = "data.train_split" if training else "data.eval_split"
            raise DataError(f"{key}={name}: the demo task has no such split; accepted: {', '.join(demo_task.SPLITS)}")
        count = DEMO_TRAIN_PROBLEMS if training else DEMO_TEST_PROBLEMS
        return f"demo:{name}", enumerate(itertools.islice(demo_task.problems(name), count), 1)
    if settings.source == "jsonl" or settings.path:  # only GSM8K has a path
        named = settings.train_file if training else settings.eval_file
        file = settings.path / f"{name}.jsonl" if settings.path else named
        if file is None:
            raise DataError("data.eval_file: needed to evaluate with data.source=jsonl; give a file or run without it")
        return file.name, numbered_jsonl(file)
    spec = GSM8K if settings.source == "gsm8k" else dict(name=settings.name, subset=settings.subset)
    return f"{spec['name']}:{name}", enumerate(read_hub(str(spec["name"]), spec["subset"], name), 1)


def text_columns(row: dict[str, Any], columns: Sequence[str], where: str) -> list[str]:
    """Return the texts in ``columns`` of a row.

    Raises DataError, naming ``where``, if one is missing, blank or not text.
    """
    texts = []
    for column in columns:
        text = row.get(column)
        if not isinstance(text, str):
            raise DataError(
                f"{where}: column {column!r} is missing or not text; this row has "
                f"{', '.join(map(repr, row)) or 'no columns'} (set data.question_column / data.answer_column)"
            )
        check_text(text, f"{where}: column {column!r}")
        if is_blank(text):
            raise DataError(f"{where}: column {column!r} is empty; give a text or remove the row")
        texts.append(text)
    return texts


def is_blank(text: str) -> bool:
    """Return True if ``text`` shows nothing: only white space, control characters and zero-width characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def check_text(text: str, where: str) -> None:
    """Raise DataError, naming ``where``, for text that no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(
            f"{where} holds half of a surrogate pair ({half} at character {error.start}), which is no text; write the "
            "full character"
        ) from None


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """Yield one object per line; blank lines are skipped.  Raises DataError naming file and line."""
    return (row for _, row in numbered_jsonl(file))


def numbered_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what ``read_jsonl`` yields, each object with the number of its line."""
    try:
        with file.open(encoding="utf-8") as lines:
            unmarked = (line.removeprefix("\ufeff") for line in lines)  # byte order marks, also of joined files
            for number, line in enumerate(unmarked, 1):
                if not line.strip():
                    continue
                row = _from_line(line, f"{file} line {number}")
                if not isinstance(row, dict):
                    raise DataError(f"{file} line {number}: a {type(row).__name__}, but must be a JSON object")
                yield number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _from_line(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_without_contradictions)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); one JSON object a line") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except ValueError:  # of int()
        most = sys.get_int_max_str_digits()
        raise DataError(f"{where}: a number has more than {most} digits; write it as text") from None


def _without_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object.  Raises DataError if a key has two different values: JSON would keep the last."""
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row and row[key] != value:
            raise DataError(f"the key {key!r} is there twice with different values; keep one")
        row[key] = value
    return row


def read_hub(name: str, subset: str | None, split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub data set; ``streaming``: without a copy on disk.  Raises DataError."""
    from datasets import load_dataset  # takes seconds to import and is needed for hub data only

    try:
        rows: Any = load_dataset(name, subset, split=split, streaming=streaming)
        yield from rows
    except Exception as error:  # the hub client raises many kinds
        raise DataError(
            f"data set {name} ({subset or 'default'}, {split}) cannot be loaded from the hub: "
            f"{type(error).__name__}: {first_line(error)}; "
            "give local files (data.path, data.source=jsonl, or data.train_file of text)"
        ) from error
