"""Checks before Ray starts: everything that can be checked in seconds without weights, with one-line errors."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import DataSettings, Settings
from onpolicy_skd.data.prompts import prompt_ids
from onpolicy_skd.data.rows import DataError, Row, is_blank, load_rows
from onpolicy_skd.learner.optimizer import check_optimizer
from onpolicy_skd.models import loading
from onpolicy_skd.models.compilation import check_compiler
from onpolicy_skd.models.head_weights import logit_transform
from onpolicy_skd.models.loading import ModelError
from onpolicy_skd.report.trackers import check_trackers
from onpolicy_skd.run.model_checks import (
    check_checkpoint,
    check_generation_config,
    check_model,
    check_quantization,
    check_savable,
    check_tensor_parallel,
    check_weight_headers,
    models_of_teachers,
    naming,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
SLOWDOWN = 3.0  # a warning is logged if 16-bit products take more than this many times as long as float32 ones
TEMPLATE_TIMEOUT_S = 3.0  # a template renders a row in milliseconds
OTHER_TEXT = "Which is larger, 3 or 5?"  # no template may render it like the text of a row


def preflight(settings: Settings) -> None:
    """Check the run folder, the checkpoints of student and teachers, the tokenizer, and the template on a row.

    Raises ConfigError.
    """
    check_folder(settings.run.folder)
    check_trackers(settings.run.trackers)
    check_optimizer(settings.learner)
    if settings.learner.compile:
        device = settings.run.device  # cuda may be on other nodes only
        check_compiler(loading.pick_device(device) if device == "auto" else device)
    student = settings.student
    with naming("student.model"):
        tokenizer = loading.load_tokenizer(student.model, student.trust_remote_code)
    check_tokenizer(tokenizer, student.model)
    if settings.generates:
        check_template(settings.data, tokenizer)
    with naming("student.model"):
        check_checkpoint(student.model, student.trust_remote_code)
        check_generation_config(student.model, student.trust_remote_code)
    check_savable(student.model, student.trust_remote_code, tokenizer)
    check_quantization(settings)
    check_tensor_parallel(settings)
    if settings.cache.path is None:
        for key, each in models_of_teachers(settings):
            teacher = each.teacher_model
            with naming(key):
                check_checkpoint(teacher.model, teacher.trust_remote_code)
                if each.teacher.engine == "vllm":
                    logit_transform(teacher.model, teacher.trust_remote_code)
    warn_of_slow_dtypes(settings)


def warn_of_slow_dtypes(settings: Settings) -> None:
    """Log a warning for 16-bit dtypes that this CPU has no instructions for: float32 is then several times faster."""
    if loading.pick_device(settings.run.device) != "cpu":
        return
    dtypes = {
        "learner.compute_dtype": settings.learner.compute_dtype,
        **{f"{key.removesuffix('.model')}.dtype": s.teacher.dtype for key, s in models_of_teachers(settings)},
        "rollout.dtype": settings.rollout.dtype,
    }
    for name in ("bfloat16", "float16"):
        keys = [key for key, dtype in dtypes.items() if dtype == name]
        if keys and (slowdown := _slowdown(getattr(torch, name))) > SLOWDOWN:
            logger.warning(
                "%s: matrix products in %s take %.0f times as long as in float32 on this CPU; set %s",
                ", ".join(keys), name, slowdown, " ".join(f"{key}=float32" for key in keys),
            )  # fmt: skip


def _slowdown(dtype: torch.dtype) -> float:
    """Return the time of a small matrix product in ``dtype`` relative to float32, by the best of three each."""

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(4):  # the first one loads the kernel
            start = time.perf_counter()
            torch.mm(rows, weight)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(dtype) / seconds(torch.float32)


def check_evaluated(model: str, settings: Settings, tokenizer: Any) -> None:
    """Check what an evaluation of ``model`` needs: its files, and the template on a row.  Raises ConfigError."""
    check_template(settings.data, tokenizer, "eval")
    trust_remote_code = settings.student.trust_remote_code
    if settings.rollout.engine == "transformers":
        check_model(model, trust_remote_code)
    elif (folder := Path(loading.resolve_path(model))).is_dir():  # vLLM has models that transformers lacks
        loading.check_weights(model)
        check_weight_headers(folder, model)


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless ``folder`` can be created and its files can be written."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"run.dir, run.name: {folder} cannot be created, because {parent} is a file")
    files = [path for path in folder.glob("*") if path.is_file()] if folder.exists() else []
    for path in (parent, *files):
        if not os.access(path, os.W_OK):
            raise ConfigError(f"run.dir, run.name: {path} cannot be written; give another folder, or change its mode")


def check_tokenizer(tokenizer: Any, model: str) -> None:
    """Raise ModelError unless ``tokenizer`` has an end-of-sequence token, which ends responses and pads batches."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"student.model={model}: its tokenizer has no end-of-sequence token, so no response could end; set "
            "eos_token in tokenizer_config.json"
        )


def check_template(data: DataSettings, tokenizer: Any, split: str = "train") -> None:
    """Render the first row of each source within a time limit.

    Raises DataError, also for a chat template that leaves out a user's or system message.
    """
    for source in data.sources:
        if split == "train" or source.has_eval or not data.has_eval:
            _check_first_row(source, tokenizer, split)


def _check_first_row(data: DataSettings, tokenizer: Any, split: str) -> None:
    row = next(iter(load_rows(data, split)), None)
    if row is None:
        return  # prepare raises the error, which names the split
    try:
        _with_timeout(lambda: _check_rendering(row, tokenizer, data))
    except ConfigError as error:
        raise DataError(f"{row.name}: {error}") from None
    except TimeoutError:
        raise DataError(
            f"data.template={data.template}: rendering {row.name} took more than {TEMPLATE_TIMEOUT_S:g} s; look for "
            "a loop in the chat template"
        ) from None


def _check_rendering(row: Row, tokenizer: Any, data: DataSettings) -> None:
    """Raise DataError if the prompt of ``row`` stays the same whatever one of its messages says."""
    ids = prompt_ids(row, tokenizer, data)
    for name, other_row, other_data in _with_other_text(row, data):
        try:
            same = prompt_ids(other_row, tokenizer, other_data) == ids
        except DataError:
            continue  # a template may refuse the other text
        if same:
            raise DataError(
                f"data.template={data.template}: the template does not show {name}; remove it, or correct the chat "
                "template of the student's tokenizer"
            )


def _with_other_text(row: Row, data: DataSettings) -> Iterator[tuple[str, Row, DataSettings]]:
    """Yield (name, row, settings) for each text that a prompt must show, with ``OTHER_TEXT`` in its place."""
    if row.chat is None:
        yield "the question", dataclasses.replace(row, question=OTHER_TEXT), data
        if data.template == "chat" and data.system is not None and not is_blank(data.system):
            yield "data.system", row, data.model_copy(update={"system": OTHER_TEXT})
        return
    for number, message in enumerate(row.chat.prompt):
        if message["role"] in ("system", "developer", "user") and not is_blank(message["content"]):
            messages = copy.copy(row.chat.messages)
            messages[number] = {**message, "content": OTHER_TEXT}
            chat = dataclasses.replace(row.chat, messages=messages)
            yield f"message {number + 1} ({message['role']})", dataclasses.replace(row, chat=chat), data


def _with_timeout(action: Callable[[], T]) -> T:
    """Return what ``action`` returns; raise TimeoutError after ``TEMPLATE_TIMEOUT_S``.

    The thread of an action that never returns ends with the process.
    """
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["value"] = action()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(TEMPLATE_TIMEOUT_S)
    if thread.is_alive():
        raise TimeoutError
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
