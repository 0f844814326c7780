"""Conversations as token ids, and the mask of the assistant's tokens."""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from onpolicy_skd.config.errors import first_line
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.types import Chat

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in templates that mark the assistant's text
TO_MARK = "put each turn of the assistant, and nothing else, between {% generation %} and {% endgeneration %}"


def chat_ids(chat: Chat, tokenizer: Any, generation_prompt: bool = True) -> list[int]:
    """Return the token ids of all messages of ``chat``, with or without the generation prompt.

    Raises DataError if the tokenizer has no chat template, or one that fails or does not show the tools of ``chat``.
    """
    return _render(chat, tokenizer, add_generation_prompt=generation_prompt, return_dict=False)


def conversation(chat: Chat, tokenizer: Any, last: bool = False) -> tuple[list[int], np.ndarray]:
    """Return the token ids of ``chat`` up to the assistant's last turn, and a bool mask of the assistant's tokens.

    The assistant's tokens are those that the template marks by ``{% generation %}``.  Without marks, the tokens of a
    turn start after the generation prompt and extend to the end of the turn; an end of sequence is appended if the
    template puts none after the last turn.  ``last``: only the tokens of the last turn.  Raises DataError for a chat
    without a turn of the assistant, or whose turns cannot be told apart.
    """
    turns = [number for number, m in enumerate(chat.messages) if m["role"] == "assistant"]
    if not turns:
        raise DataError("the conversation has no turn of the assistant to learn from")
    chat = dataclasses.replace(chat, messages=chat.messages[: turns[-1] + 1])
    find = _marked_turns if MARKED.search(_template(chat, tokenizer)) else _turns_by_prefix
    ids, spans = find(chat, turns[-1:] if last else turns, tokenizer)
    mask = np.zeros(spans[-1][1], bool)
    for start, end in spans:
        mask[start:end] = True
    return ids[: len(mask)], mask


def _marked_turns(chat: Chat, turns: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of ``chat``, and start and end of each span that the template marks in ``turns``.

    The texts of users and tools separate the turns.  Raises DataError for a turn without a span, and for a span that
    holds the text of another role.
    """
    encoded = _render(chat, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    ids, edges = list(encoded["input_ids"]), np.flatnonzero(np.diff(np.array([0, *encoded["assistant_masks"], 0])))
    spans = [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    roles, borders = [m["role"] for m in chat.messages], {}
    for number, role in enumerate(roles):
        place = None if role == "assistant" else _place_of_text(chat, number, ids, tokenizer)
        if place is None:
            continue
        if any(start <= place < end for start, end in spans):
            raise DataError(f"message {number + 1}: the chat template marks this text of the role {role}; {TO_MARK}")
        if role in ("user", "tool"):  # some templates move the system message
            borders[number] = place
    places = sorted(borders.values())
    group_of = {n: sum(border < n for border in borders) for n, role in enumerate(roles) if role == "assistant"}
    turns_in, kept = Counter(group_of.values()), {}
    for turn in turns:
        group = group_of[turn]
        marked = [span for span in spans if bisect(places, span[0]) == group]
        if len(marked) < turns_in[group]:
            raise DataError(f"message {turn + 1}: the chat template marks no text of this turn; {TO_MARK}")
        kept[group] = marked if len(turns) >= turns_in[group] else marked[-1:]
    return ids, [span for marked in kept.values() for span in marked]


def _place_of_text(chat: Chat, number: int, ids: list[int], tokenizer: Any) -> int | None:
    """Return the index in ``ids`` (of ``chat``) of a token in a message's text; None if the template hides the text."""
    messages, text = list(chat.messages), chat.messages[number]["content"]
    middle = len(text) // 2  # a template may look at the ends of a text
    messages[number] = {**messages[number], "content": f"{text[:middle]}0{text[middle:]}"}
    try:
        changed = chat_ids(dataclasses.replace(chat, messages=messages), tokenizer, generation_prompt=False)
    except DataError:  # a template may refuse the other text
        return None
    return next((place for place, (a, b) in enumerate(zip(ids, changed, strict=False)) if a != b), None)


def _turns_by_prefix(chat: Chat, turns: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of ``chat``, and start and end of ``turns``, each rendered after the messages before it."""
    ids, spans, special = chat_ids(chat, tokenizer, generation_prompt=False), [], special_ids(tokenizer)
    for number in turns:
        if number == 0:
            raise DataError(
                "message 1: the conversation starts with the assistant, so no prompt tells which tokens are its turn; "
                "put a message of the user before it, mark turns in the chat template by {% generation %}, or train on "
                "last turns alone (references.supervise=last)"
            )
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


def _template(chat: Chat, tokenizer: Any) -> str:
    """Return the chat template that renders ``chat``.  Raises DataError if the tokenizer has none for it."""
    if not tokenizer.chat_template:
        raise DataError("data.template=chat: the student's tokenizer has no chat template; use data.template=plain")
    try:
        return tokenizer.get_chat_template(tools=chat.tools)
    except ValueError:
        raise DataError(
            f"data.template=chat: the student's tokenizer has chat templates named {', '.join(tokenizer.chat_template)}"
            ", and none named default; name one of them default, or use data.template=plain"
        ) from None


def _render(chat: Chat, tokenizer: Any, **options: Any) -> Any:
    template = _template(chat, tokenizer)
    if chat.tools and "tools" not in template:
        raise DataError("the student's chat template does not show tools, but the row has some; remove its tools")
    try:
        rendered = _apply(chat, tokenizer, **options)
        hides_calls = "tool_calls" not in template and _hides_calls(chat, tokenizer)
    except Exception as error:  # a template is a program: jinja2, and what its expressions raise
        starts_with_system = bool(chat.messages) and chat.messages[0]["role"] == "system"
        hint = " (data.system is set or the row has a system message; some templates accept none)"
        raise DataError(
            f"data.template=chat: the template fails: {type(error).__name__}: {first_line(error)}"
            f"{hint if starts_with_system else ''}; correct the chat template of the student's tokenizer, or use "
            "data.template=plain"
        ) from None
    if hides_calls:
        raise DataError("the student's chat template does not show tool_calls, but the row has some; remove them")
    return rendered


def _apply(chat: Chat, tokenizer: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(chat.messages, tools=chat.tools, enable_thinking=chat.thinking, **options)


def _hides_calls(chat: Chat, tokenizer: Any) -> bool:
    """Return True if ``chat`` has tool calls and is rendered the same without them."""
    if not any(m.get("tool_calls") for m in chat.messages):
        return False
    without = [{key: value for key, value in m.items() if key != "tool_calls"} for m in chat.messages]
    bare = dataclasses.replace(chat, messages=without)
    return _apply(bare, tokenizer, tokenize=False) == _apply(chat, tokenizer, tokenize=False)
