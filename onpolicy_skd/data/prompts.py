"""Questions as prompt token ids: loading, templates, and the order in which a run sees them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from onpolicy_skd.config.schema import DataSettings
from onpolicy_skd.data.chat import chat_ids, naming
from onpolicy_skd.data.rows import DataError, Row, load_questions, load_rows
from onpolicy_skd.types import Chat, Prompt, seed_of

logger = logging.getLogger(__name__)


def load_shots(settings: DataSettings) -> list[tuple[str, str]]:
    """Return (question, answer) of the first ``data.shots`` rows of the training split: the examples of every prompt.

    Raises DataError if the split has fewer rows or cannot be read.
    """
    if not settings.shots:
        return []
    rows = list(itertools.islice(load_questions(settings, "train"), settings.shots))
    if len(rows) < settings.shots:
        raise DataError(f"data.shots={settings.shots}: the training split has {len(rows)} rows; accepted: fewer")
    return [(question, answer) for _, question, answer in rows]


def render(question: str, tokenizer: Any, settings: DataSettings, shots: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Return the prompt token ids of ``question``, after the examples ``shots`` and without an end of sequence.

    With a chat template, examples are turns of user and assistant; in plain text they have lm-eval's format: a space
    before an answer and an empty line after it.  Raises DataError if the tokenizer has no chat template, if the
    template fails, or if no token is left.
    """
    text = question + settings.instruction
    if settings.template == "plain":
        gap = "" if settings.plain[-1:].isspace() else " "
        prompt = settings.plain.replace("{question}", text)
        examples = [
            settings.plain.replace("{question}", q + settings.instruction) + f"{gap}{answer}\n\n" for q, answer in shots
        ]
        ids = _without_suffix("".join([*examples, prompt]), tokenizer)
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
        messages = [*system, *turns, {"role": "user", "content": text}]
        ids = chat_ids(Chat(messages, None, settings.thinking), tokenizer)
    if not ids:
        raise DataError(f"data.template={settings.template}: the prompt of {question[:40]!r} has no tokens")
    return ids


def _without_suffix(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of ``text`` with the special tokens that a tokenizer prepends, without those it appends.

    After an appended end of sequence, a model would have nothing left to answer.
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

    Prompts of ``data.mix`` are ordered source by source in the training split; in the eval split they alternate between
    the sources that have one.  Problems that are examples of ``data.shots`` are left out.  Raises DataError, also for a
    prompt over ``data.max_prompt_tokens``, and in the eval split for an answer that no output can be judged against.
    """
    repeats: Counter[str] = Counter()  # occurrences of each question, over all sources
    by_source = [
        _load_source(number, source, tokenizer, split, limit, repeats)
        for number, source in enumerate(settings.sources)
        if split == "train" or source.has_eval or not settings.has_eval
    ]
    if split == "train":
        return list(itertools.islice(itertools.chain.from_iterable(by_source), limit))
    rounds = itertools.zip_longest(*by_source)
    prompts = [p for prompts in rounds for p in prompts if p is not None][:limit]
    check_references(p for p in prompts if p.answer)
    return prompts


def _load_source(
    number: int, settings: DataSettings, tokenizer: Any, split: str, limit: int | None, repeats: Counter[str]
) -> list[Prompt]:
    """Return the prompts of one source; ``repeats`` counts questions for their keys."""
    prompts, dropped, shots = [], 0, load_shots(settings)
    example_questions = {question for question, _ in shots}
    for row in load_rows(settings, split):
        if len(prompts) == limit:
            break
        if row.question in example_questions:
            continue
        with naming(row.name):
            ids = prompt_ids(row, tokenizer, settings, shots)
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
        fields = (row.question, row.answer, None, row.name, row.columns, row.chat, number)
        prompts.append(Prompt(key, ids, *fields, teacher=row.teacher))
    if dropped:
        logger.warning("%s split: %d prompts over %d tokens dropped", split, dropped, settings.max_prompt_tokens)
    if not prompts:
        raise DataError(f"data: no prompt is left in the {split} split of source {settings.source}")
    return prompts


def prompt_ids(row: Row, tokenizer: Any, settings: DataSettings, shots: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Return the prompt token ids of the conversation of ``row`` up to the turn to generate, or of its question."""
    if row.chat:
        return chat_ids(dataclasses.replace(row.chat, messages=row.chat.prompt), tokenizer)
    return render(row.question, tokenizer, settings, shots)


def check_judged(prompts: Iterable[Prompt], judge: str) -> None:
    """Raise DataError for a prompt without a reference answer, unless the user gave a judge (``eval.judge``)."""
    without = next((p for p in prompts if not p.answer), None)
    if without is not None and judge == "exact_match":
        raise DataError(
            f"{without.row}: has no reference answer (data.answer_column), so no output could be judged; give the "
            "answers, or a judge by eval.judge=module:function"
        )


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
    """Return a digest of the words of a question, whatever its white space, file or row."""
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
    """Return the indices, below ``count``, of the prompts of ``step`` (0-based).

    A pure function, so that resuming needs only the step.  Each epoch is another permutation; a step may span two
    epochs, and no prompt is left out at their border.
    """
    indices = []
    for place in range(step * per_step, (step + 1) * per_step):
        epoch, offset = divmod(place, count)
        indices.append(int(_permutation(count, seed, epoch)[offset]))
    return indices


def mixed_prompts_of_step(
    members: Sequence[Sequence[int]], weights: Sequence[float], per_step: int, step: int, seed: int
) -> list[int]:
    """Return the indices of the prompts of ``step`` of a mix; a pure function like ``prompts_of_step``.

    ``members`` holds the indices of each source's prompts.  Each place draws a source in proportion to ``weights`` and
    takes the next prompt of that source, whose epochs are permutations of its prompts.
    """
    start, end = step * per_step, (step + 1) * per_step
    drawn = _drawn_sources(tuple(weights), seed, 1 << (end - 1).bit_length())
    taken = np.bincount(drawn[:start], minlength=len(weights))
    indices = []
    for source in drawn[start:end].tolist():
        count = len(members[source])
        epoch, offset = divmod(int(taken[source]), count)
        indices.append(members[source][int(_permutation(count, seed_of(seed, "source", source), epoch)[offset])])
        taken[source] += 1
    return indices


@functools.lru_cache(2)
def _drawn_sources(weights: tuple[float, ...], seed: int, places: int) -> np.ndarray:
    """Return the source of each of the first ``places`` places of a run, int16; a larger number only appends."""
    borders = np.cumsum(weights) / sum(weights)
    uniform = np.random.default_rng(seed_of(seed, "mix")).random(places)
    return np.minimum(np.searchsorted(borders, uniform, side="right"), len(weights) - 1).astype(np.int16)


@functools.lru_cache(16)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
