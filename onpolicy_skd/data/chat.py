"""Conversations as token ids, and the mask of the assistant's tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from onpolicy_skd.config.errors import first_line
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.types import Chat

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in templates that mark the assistant's text


def chat_ids(chat: Chat, tokenizer: Any, generation_prompt: bool = True) -> list[int]:
    """Return the token ids of all messages of ``chat``, with or without the header of a turn to generate.

    Raises DataError if the tokenizer has no chat template, or one that fails or does not show the tools of ``chat``.
    """
    return _render(chat, tokenizer, add_generation_prompt=generation_prompt, return_dict=False)


def conversation(chat: Chat, tokenizer: Any, last: bool = False) -> tuple[list[int], np.ndarray]:
    """Return the token ids of ``chat`` up to the assistant's last turn, and a bool mask of the assistant's tokens.

    The assistant's tokens are those that the template marks by ``{% generation %}``.  If it marks none, they are those
    from the generation prompt of the messages before a turn to the end of the turn; an end of sequence is appended if
    the template puts none after the last turn.  ``last``: only the tokens of the last turn.  Raises DataError for a
    chat without a turn of the assistant, or whose turns cannot be told apart.
    """
    turns = [number for number, m in enumerate(chat.messages) if m["role"] == "assistant"]
    if not turns:
        raise DataError("the conversation has no turn of the assistant to learn from")
    chat = dataclasses.replace(chat, messages=chat.messages[: turns[-1] + 1])
    marked = MARKED.search(tokenizer.get_chat_template(tools=chat.tools) if tokenizer.chat_template else "")
    find = _marked_turns if marked else _turns_by_prefix
    ids, spans = find(chat, turns[-1:] if last else turns, tokenizer)
    mask = np.zeros(spans[-1][1], bool)
    for start, end in spans:
        mask[start:end] = True
    return ids[: len(mask)], mask


def _marked_turns(chat: Chat, turns: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of ``chat``, and start and end of each span that the template marks; for one turn the last."""
    encoded = _render(chat, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    edges = np.flatnonzero(np.diff(np.array([0, *encoded["assistant_masks"], 0])))
    spans = [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    if len(spans) < len(turns):
        raise DataError(
            f"the chat template marks {len(spans)} spans for {len(turns)} turns of the assistant; put each turn, tool "
            "calls included, between {% generation %} and {% endgeneration %}"
        )
    return list(encoded["input_ids"]), spans[-1:] if len(turns) == 1 else spans


def _turns_by_prefix(chat: Chat, turns: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of ``chat``, and start and end of ``turns``, each rendered after the messages before it."""
    ids, spans, special = chat_ids(chat, tokenizer, generation_prompt=False), [], special_ids(tokenizer)
    for number in turns:
        before = chat_ids(dataclasses.replace(chat, messages=chat.messages[:number]), tokenizer)
        through = chat_ids(dataclasses.replace(chat, messages=chat.messages[: number + 1]), tokenizer, False)
        if ids[: len(through)] != through or through[: len(before)] != before or len(through) == len(before):
            raise DataError(
                f"message {number + 1}: the chat template does not render this turn of the assistant as the "
                "continuation of its generation prompt, or renders it differently once others follow (thinking that it "
                "drops?), so its tokens cannot be told from others; mark them in the template by {% generation %}, or "
                "train on last turns alone (references.supervise=last)"
            )
        spans.append((len(before), _end_of_turn(through, len(before), special, tokenizer)))
    start, end = spans[-1]
    if ids[end - 1] not in special:
        ids, spans[-1] = [*ids[:end], tokenizer.eos_token_id], (start, end + 1)
    return ids, spans


def _end_of_turn(ids: list[int], start: int, special: set[int], tokenizer: Any) -> int:
    """Return the end of a turn in ``ids[start:]``: after its last special token if only white space follows that."""
    for end in range(len(ids), start, -1):
        if ids[end - 1] in special:
            return end
        if tokenizer.decode(ids[end - 1 : end]).strip():
            break
    return len(ids)


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens, named and added ones."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


@contextmanager
def naming(row: str) -> Iterator[None]:
    """Prefix the message of a DataError from the block with ``row``."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{row}: {error}") from None


def _render(chat: Chat, tokenizer: Any, **options: Any) -> Any:
    if not tokenizer.chat_template:
        raise DataError("data.template=chat: the student's tokenizer has no chat template; use data.template=plain")
    if chat.tools and "tools" not in tokenizer.get_chat_template(tools=chat.tools):
        raise DataError("the student's chat template does not show tools, but the row has some; remove its tools")
    try:
        return tokenizer.apply_chat_template(chat.messages, tools=chat.tools, enable_thinking=chat.thinking, **options)
    except Exception as error:  # a template is a program: jinja2, and what its expressions raise
        starts_with_system = chat.messages[0]["role"] == "system"
        hint = " (data.system is set or the row has a system message; some templates accept none)"
        raise DataError(
            f"data.template=chat: the template fails: {type(error).__name__}: {first_line(error)}"
            f"{hint if starts_with_system else ''}; correct the chat template of the student's tokenizer, or use "
            "data.template=plain"
        ) from None
