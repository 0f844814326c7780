"""Prompts that the teacher reads in place of the student's, made from the columns of the data."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.config.validation import PLACEHOLDER
from onpolicy_skd.data.chat import naming
from onpolicy_skd.data.prompts import load_shots, render
from onpolicy_skd.data.rows import DataError, check_text
from onpolicy_skd.types import Prompt

logger = logging.getLogger(__name__)


def with_teacher_prompts(settings: Settings, tokenizer: Any, prompts: list[Prompt]) -> list[Prompt]:
    """Return ``prompts`` with the teacher's prompt of each from ``teacher.prompt``; unchanged if that is empty.

    The text replaces the question; template, system message, examples and instruction are the student's.  Raises
    DataError for a column that is missing, not text or blank, and for a prompt over ``teacher.max_prompt_tokens``
    unless ``data.overlong=drop`` leaves it out.
    """
    template, longest = settings.teacher.prompt, settings.teacher.max_prompt_tokens
    if template is None:
        return prompts
    sources = [(source, load_shots(source)) for source in settings.data.sources]
    result, dropped = [], 0
    for prompt in prompts:
        source, shots = sources[prompt.source]
        with naming(prompt.row):
            ids = render(_filled(template, prompt), tokenizer, source, shots)
        if len(ids) <= longest:
            result.append(dataclasses.replace(prompt, teacher_ids=ids))
        elif source.overlong == "drop":
            dropped += 1
        else:
            raise DataError(
                f"{prompt.row}: the teacher's prompt has {len(ids)} tokens, teacher.max_prompt_tokens={longest}; raise "
                "the limit or set data.overlong=drop"
            )
    if dropped:
        logger.warning("%d prompts over teacher.max_prompt_tokens=%d dropped", dropped, longest)
    if not result and prompts:
        raise DataError(f"teacher.max_prompt_tokens={longest}: every prompt of the teacher is longer; raise the limit")
    return result


def _filled(template: str, prompt: Prompt) -> str:
    """Return ``template`` filled with the texts of the prompt's row.  Raises DataError."""
    columns = {**prompt.columns, "question": prompt.question, "answer": prompt.answer}
    names: Iterable[str] = PLACEHOLDER.findall(template)
    for name in names:
        text = columns.get(name)
        if not isinstance(text, str) or not text.strip():
            accepted = ", ".join(f"{{{n}}}" for n, value in columns.items() if isinstance(value, str) and value.strip())
            raise DataError(f"column {name!r} of teacher.prompt is missing, empty or not text; this row has {accepted}")
        check_text(text, f"column {name!r}")
    return PLACEHOLDER.sub(lambda match: columns[match[1]], template)
