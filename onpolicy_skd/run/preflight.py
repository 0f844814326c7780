"""Checks before Ray starts: everything that can be checked in seconds without weights, with one-line errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from onpolicy_skd.config.errors import ConfigError, first_line
from onpolicy_skd.config.schema import DataSettings, Settings, StudentSettings, TeacherSettings
from onpolicy_skd.data.prompts import prompt_ids
from onpolicy_skd.data.rows import DataError, Row, is_blank, load_rows
from onpolicy_skd.learner.optimizer import check_optimizer
from onpolicy_skd.models import loading
from onpolicy_skd.models.generation_config import savable_generation_config
from onpolicy_skd.models.head_weights import logit_transform
from onpolicy_skd.models.loading import ModelError
from onpolicy_skd.report.trackers import check_trackers

T = TypeVar("T")
TEMPLATE_TIMEOUT_S = 3.0  # a template renders a row in milliseconds
OTHER_TEXT = "Which is larger, 3 or 5?"  # no template may render it like the text of a row
MOST_TENSORS = 5_000  # of a trial load, which takes a second; the load itself checks larger models
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def preflight(settings: Settings) -> None:
    """Check the run folder, the checkpoints of student and teachers, the tokenizer, and the template on a row.

    Raises ConfigError.
    """
    check_folder(settings.run.folder)
    check_trackers(settings.run.trackers)
    check_optimizer(settings.learner)
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
    loading.check_tensor_parallel(settings)
    if settings.cache.path is None:
        for key, each in models_of_teachers(settings):
            teacher = each.teacher_model
            with naming(key):
                check_checkpoint(teacher.model, teacher.trust_remote_code)
                if each.teacher.engine == "vllm":
                    logit_transform(teacher.model, teacher.trust_remote_code)


def models_of_teachers(settings: Settings) -> list[tuple[str, Settings]]:
    """Return, for each teacher, the setting that names its model, and the settings with that teacher alone."""
    named = [(f"teachers.{name}.model", settings.of_teacher(name)) for name in settings.teachers]
    return named or [("teacher.model", settings)]


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Prefix the message of a ModelError from the block with the setting that names the model."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error.__cause__


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


def check_checkpoint(model: str, trust_remote_code: bool) -> None:
    """Raise ModelError unless ``model`` is a causal language model with a backbone, a head and fitting safetensors.

    Weight files of a hub model are not checked, because they may not be downloaded yet.
    """
    built = check_model(model, trust_remote_code)
    if built is not None and (built.get_output_embeddings() is None or built.base_model is built):
        raise ModelError(
            f"model {model!r}: {type(built).__name__} has no backbone and LM head that can be told apart; use a causal "
            "language model with output embeddings"
        )


def check_model(model: str, trust_remote_code: bool) -> Any:
    """Return ``model`` built without weights, None if its own code builds it.

    Raises ModelError unless it is a causal language model with readable safetensors that fit its configuration.
    """
    import torch

    config = loading.load_config(model, trust_remote_code)
    folder = Path(loading.resolve_path(model))
    if folder.is_dir():
        loading.check_weights(model)
        check_weight_headers(folder, model)
    if trust_remote_code:
        return None  # the model's code may not build without weights
    auto_class = loading.auto_class(config)
    try:
        # from_config would import every model of transformers, half a minute, to list them in its error.
        if type(config) not in auto_class._model_mapping:
            raise ValueError(f"{auto_class.__name__} has no model for {type(config).__name__}")
        with torch.device("meta"):
            built = auto_class.from_config(config)
    except Exception as error:  # transformers raises many kinds for a bad configuration
        raise ModelError(
            f"model {model!r}: its config.json describes no causal language model that transformers knows: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
    if folder.is_dir():
        _check_trial_load(type(built), config, folder, model)
    return built


def _check_trial_load(kind: Any, config: Any, folder: Path, model: str) -> None:
    """Load tensors without values, so that transformers itself compares names and shapes.  Raises ModelError.

    Quantized checkpoints are left out, because their tensors depend on the library that quantized them.
    """
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        return
    tensors = _meta_tensors(folder)
    if not 0 < len(tensors) <= MOST_TENSORS:
        return
    with _quiet_transformers():
        loaded, info = kind.from_pretrained(
            None, config=copy.deepcopy(config), state_dict=tensors, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    loading.check_complete(loaded, info, model)


def _meta_tensors(folder: Path) -> dict[str, Any]:
    """Return the tensors of the files that transformers loads, without values."""
    import torch
    from safetensors import safe_open

    index = folder / INDEX
    names = [SINGLE] if (folder / SINGLE).exists() else _weight_files(index) if index.exists() else []
    tensors = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  no mapping
                tensors[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
    return tensors


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bar and the report of a load."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def check_quantization(settings: Settings) -> None:
    """Raise ModelError for quantized weights of a student, or of a teacher whose engine or settings accept none."""
    student = settings.student
    if stored := _quantization(student):
        raise ModelError(
            f"student.model={student.model}: its weights are quantized ({stored}); use an unquantized checkpoint"
        )
    if settings.cache.path is not None:
        return  # the teacher's outputs are stored
    for key, each in models_of_teachers(settings):
        named = each.teacher_model
        with naming(key):
            stored = _quantization(named)
        if not stored:
            continue
        section, method = key.removesuffix(".model"), each.teacher.quantization
        if each.teacher.engine == "transformers":
            raise ModelError(f"{key}={named.model}: its weights are quantized ({stored}); use {section}.engine=vllm")
        if method is not None:
            raise ModelError(
                f"{section}.quantization={method}: the weights of {named.model!r} are quantized already ({stored}); "
                "leave it empty"
            )


def _quantization(named: StudentSettings | TeacherSettings) -> str | None:
    """Return the method by which the weights of a checkpoint are quantized; None if they are not."""
    config = loading.load_config(named.model, named.trust_remote_code)
    stored = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if stored is None:
        return None
    return str((stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method"))


def check_weight_headers(folder: Path, model: str) -> None:
    """Raise ModelError unless ``folder`` has all its safetensors files, with readable headers."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    try:
        names = _weight_files(index) if index.exists() else sorted(path.name for path in folder.glob("*.safetensors"))
        for name in names:
            with safe_open(folder / name, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model {model!r}: its weights cannot be read: {first_line(error)}") from None


def _weight_files(index: Path) -> list[str]:
    """Return the names of the files in ``index``.  Raises ValueError if it names none."""
    tree = json.loads(index.read_text(encoding="utf-8"))
    weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index.name} has no weight_map from names of tensors to names of files")
    return sorted(set(weight_map.values()))


def check_generation_config(model: str, trust_remote_code: bool = False) -> None:
    """Raise ModelError unless the generation settings of ``model`` can be used and, at the end of a run, saved."""
    from transformers import GenerationConfig

    folder = Path(loading.resolve_path(model))
    if not (folder / "generation_config.json").exists():
        return
    wrong = f"model {model!r}: its generation_config.json cannot be used: "
    try:
        config = savable_generation_config(GenerationConfig.from_pretrained(folder))
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{wrong}{first_line(error)}; correct or remove the file") from None
    ends, rows = config.eos_token_id, loading.vocabulary_of(loading.load_config(model, trust_remote_code))
    for token in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(token, int) or token >= rows:
            raise ModelError(f"{wrong}eos_token_id={token!r} is no token; accepted: numbers below {rows}, or a list")


def check_savable(model: str, trust_remote_code: bool, tokenizer: Any) -> None:
    """Raise ModelError unless configuration and tokenizer of ``model`` can be saved, as the end of a run does."""
    parts = {"configuration": loading.load_config(model, trust_remote_code), "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in parts.items():
            try:
                part.save_pretrained(scratch)
            except Exception as error:  # transformers raises many kinds
                raise ModelError(
                    f"student.model={model}: its {name} cannot be saved: {type(error).__name__}: {first_line(error)}; "
                    "correct its files"
                ) from None
