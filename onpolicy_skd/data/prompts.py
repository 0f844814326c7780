"""Questions as prompt token ids: loading, templates, and the order in which a run sees them."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onpolicy_skd.config.errors import ConfigError, first_line
from onpolicy_skd.config.schema import DataSettings
from onpolicy_skd.data import demo_task
from onpolicy_skd.types import Prompt, seed_of

logger = logging.getLogger(__name__)
DEMO_TRAIN_PROBLEMS = 20_000
DEMO_TEST_PROBLEMS = 1_000
GSM8K = dict(name="openai/gsm8k", subset="main")


class DataError(ConfigError):
    """A data file or row that cannot be used; the message names file and row."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data set."""

    name: str  # "FILE#LINE", for messages
    question: str
    answer: str
    columns: dict[str, Any]  # as read


def load_rows(settings: DataSettings, split: str) -> Iterator[Row]:
    """Yield each row of ``split`` ("train" or "eval").  Raises DataError."""
    training = split == "train"
    where, rows = _rows(settings, split)
    limit = settings.train_problems + settings.shots if training and settings.train_problems else None
    columns = (settings.question_column, settings.answer_column)
    for number, row in itertools.islice(rows, limit):
        question, answer = text_columns(row, columns, f"{where} row {number}")
        yield Row(f"{where}#{number}", question, answer, row)


def load_questions(settings: DataSettings, split: str) -> Iterator[tuple[str, str, str]]:
    """Yield (row, question, answer) of each row of ``split``.  Raises DataError."""
    return ((row.name, row.question, row.answer) for row in load_rows(settings, split))


def _rows(settings: DataSettings, split: str) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    """Return a name of the split's source, for messages, and its rows by number (of a file: by line)."""
    training = split == "train"
    name = settings.train_split if training else settings.eval_split
    if settings.source == "demo":
        if name not in demo_task.SPLITS:
            key = "data.train_split" if training else "data.eval_split"
            raise DataError(f"{key}={name}: the demo task has no such split; accepted: {', '.join(demo_task.SPLITS)}")
        count = DEMO_TRAIN_PROBLEMS if training else DEMO_TEST_PROBLEMS
        return f"demo:{name}", enumerate(itertools.islice(demo_task.problems(name), count), 1)
    if settings.source == "jsonl" or settings.path:  # a path is GSM8K's
        named = settings.train_file if training else settings.eval_file
        file = settings.path / f"{name}.jsonl" if settings.path else named
        if file is None:
            raise DataError("data.eval_file: needed to evaluate with data.source=jsonl; give a file or run without it")
        return file.name, numbered_jsonl(file)
    spec = GSM8K if settings.source == "gsm8k" else dict(name=settings.name, subset=settings.subset)
    return f"{spec['name']}:{name}", enumerate(read_hub(str(spec["name"]), spec["subset"], name), 1)


def text_columns(row: dict[str, Any], columns: Sequence[str], where: str) -> list[str]:
    """Return the texts in ``columns`` of a row.  Raises DataError, naming ``where``, if one is missing, not text or
    blank."""
    texts = []
    for column in columns:
        text = row.get(column)
        if not isinstance(text, str):
            raise DataError(
                f"{where}: column {column!r} is missing or not text; this row has "
                f"{', '.join(map(repr, row)) or 'no columns'} (set data.question_column / data.answer_column)"
            )
        check_text(text, f"{where}: column {column!r}")
        if not text.strip():
            raise DataError(f"{where}: column {column!r} is empty; give a text or remove the row")
        texts.append(text)
    return texts


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
        with file.open(encoding="utf-8-sig") as lines:  # a byte order mark is no part of the first row
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise DataError(f"{file} line {number}: not JSON ({error}); one JSON object a line") from None
                if not isinstance(row, dict):
                    raise DataError(f"{file} line {number}: a {type(row).__name__}, but must be a JSON object")
                yield number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


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


def load_shots(settings: DataSettings) -> list[tuple[str, str]]:
    """Return (question, answer) of the first ``data.shots`` rows of the training split: the examples of every prompt.

    Raises DataError if the split has fewer rows, or none to read.
    """
    if not settings.shots:
        return []
    rows = list(itertools.islice(load_questions(settings, "train"), settings.shots))
    if len(rows) < settings.shots:
        raise DataError(f"data.shots={settings.shots}: the training split has {len(rows)} rows; accepted: fewer")
    return [(question, answer) for _, question, answer in rows]


def render(question: str, tokenizer: Any, settings: DataSettings, shots: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Return the prompt token ids of ``question``, after the examples ``shots`` and without an end of sequence.

    Examples are user and assistant turns of a chat template; in plain text, lm-eval's format: a space before an answer
    and an empty line after it.  Raises DataError if the tokenizer has no chat template, if the template fails, or if no
    token is left.
    """
    text = question + settings.instruction
    if settings.template == "plain":
        gap = "" if settings.plain[-1:].isspace() else " "
        prompt = settings.plain.replace("{question}", text)
        examples = [
            settings.plain.replace("{question}", q + settings.instruction) + f"{gap}{answer}\n\n" for q, answer in shots
        ]
        ids = _without_suffix("".join([*examples, prompt]), tokenizer)
    elif not tokenizer.chat_template:
        raise DataError("data.template=chat: the student's tokenizer has no chat template; use data.template=plain")
    else:
        system = [{"role": "system", "content": settings.system}] if settings.system is not None else []
        turns = [
            turn
            for q, answer in shots
            for turn in (
                {"role": "user", "content": q + settings.instruction},
                {"role": "assistant", "content": answer},
            )
        ]
        try:
            ids = tokenizer.apply_chat_template(
                [*system, *turns, {"role": "user", "content": text}],
                add_generation_prompt=True,
                enable_thinking=settings.thinking,
                return_dict=False,
            )
        except Exception as error:  # a template is a program: jinja2, and what its expressions raise
            hint = " (data.system is set; some templates accept no system message)" if system else ""
            raise DataError(
                f"data.template=chat: the template fails: {type(error).__name__}: {first_line(error)}{hint}; correct "
                "the chat template of the student's tokenizer, or use data.template=plain"
            ) from None
    if not ids:
        raise DataError(f"data.template={settings.template}: the prompt of {question[:40]!r} has no tokens")
    return ids


def _without_suffix(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of ``text`` with the special tokens that a tokenizer prepends but none that it appends.

    After an appended end of sequence a model has nothing left to answer.
    """
    ids, body = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
    for end in range(len(ids), len(body) - 1, -1):
        if ids[end - len(body) : end] == body:
            return ids[:end]
    return body


def answer_ids(answer: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a reference answer as a response, with its end of sequence."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def load_prompts(settings: DataSettings, tokenizer: Any, split: str, limit: int | None = None) -> list[Prompt]:
    """Return the (first ``limit``) prompts of ``split``; overlong ones are dropped and counted, if so configured.

    Problems that are examples of ``data.shots`` are left out.
    Raises DataError, also for a prompt over ``data.max_prompt_tokens``, and in the eval split for an answer that no
    output could be judged against.
    """
    prompts, dropped, shots = [], 0, load_shots(settings)
    repeats: Counter[str] = Counter()
    example_questions = {question for question, _ in shots}
    for row in load_rows(settings, split):
        if len(prompts) == limit:
            break
        if row.question in example_questions:
            continue
        try:
            ids = render(row.question, tokenizer, settings, shots)
        except DataError as error:
            raise DataError(f"{row.name}: {error}") from None
        if len(ids) > settings.max_prompt_tokens:
            if settings.overlong == "drop":
                dropped += 1
                continue
            raise DataError(
                f"{row.name}: the prompt has {len(ids)} tokens, data.max_prompt_tokens={settings.max_prompt_tokens}; "
                f"raise the limit{', lower data.shots' if shots else ''} or set data.overlong=drop"
            )
        digest = question_digest(row.question)
        repeats[digest] += 1
        key = digest if repeats[digest] == 1 else f"{digest}.{repeats[digest]}"
        prompts.append(Prompt(key, ids, row.question, row.answer, row=row.name, columns=row.columns))
    if dropped:
        logger.warning("%s split: %d prompts over %d tokens dropped", split, dropped, settings.max_prompt_tokens)
    if not prompts:
        raise DataError(f"data: no prompt is left in the {split} split of source {settings.source}")
    if split == "eval":
        check_references(prompts)
    return prompts


def check_references(prompts: Iterable[Prompt]) -> None:
    """Raise DataError if a prompt's answer cannot be read whole, naming the first such row."""
    from onpolicy_skd.evaluation.exact_match import check_reference  # math-verify takes seconds to import

    for prompt in prompts:
        if problem := check_reference(prompt.answer):
            raise DataError(
                f"{prompt.row}: {problem}; accepted after ####, in \\boxed{{}} or alone: one number with its unit, "
                "a formula, or up to 100 characters of text"
            )


def question_digest(question: str) -> str:
    """Return a name for a question that depends on its words alone: not on white space, file or row."""
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()[:16]


def hold_out(prompts: list[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to train on and ``count`` others, chosen by their questions alone.

    A question that occurs more than once is held out once, and no copy of it is trained on.  Raises DataError if
    nothing would be left to train on.
    """
    first = {question_digest(p.question): p for p in reversed(prompts)}
    if count >= len(first):
        raise DataError(
            f"data.validation_problems={count}: there are {len(first)} different training problems; accepted: fewer"
        )
    chosen = set(sorted(first, key=lambda digest: seed_of("validation", digest))[:count])
    held_out = {first[digest].key for digest in chosen}
    return (
        [p for p in prompts if question_digest(p.question) not in chosen],
        [p for p in prompts if p.key in held_out],
    )


def prompts_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """Return the indices of the prompts of ``step`` (0-based) among ``count``: a pure function, so resuming needs only
    the step.

    Each epoch is another permutation; a step may span two epochs, and no prompt is left out at their border.
    """
    indices = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, offset = divmod(place, count)
        indices.append(int(_permutation(count, seed, epoch)[offset]))
    return indices


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    key = (count, seed, epoch)
    if key not in _permutations:
        if len(_permutations) > 4:
            _permutations.clear()
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _permutations[key]
