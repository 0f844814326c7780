"""Checks before Ray starts: everything that can be checked in seconds without weights, with one-line errors."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from onpolicy_skd.config.errors import ConfigError, first_line
from onpolicy_skd.config.schema import DataSettings, Settings
from onpolicy_skd.data.prompts import prompt_ids
from onpolicy_skd.data.rows import DataError, load_rows
from onpolicy_skd.learner.optimizer import check_optimizer
from onpolicy_skd.models import loading
from onpolicy_skd.models.generation_config import savable_generation_config
from onpolicy_skd.models.head_weights import check_plain_logits
from onpolicy_skd.models.loading import ModelError
from onpolicy_skd.report.trackers import check_trackers

T = TypeVar("T")
TEMPLATE_TIMEOUT_S = 3.0  # a template renders a row in milliseconds


def preflight(settings: Settings) -> None:
    """Check the run folder, the checkpoints of student and teachers, the tokenizer, and the template on a row.

    Raises ConfigError.
    """
    check_folder(settings.run.folder)
    check_trackers(settings.run.trackers)
    check_optimizer(settings.learner)
    student = settings.student
    tokenizer = loading.load_tokenizer(student.model, student.trust_remote_code)
    check_tokenizer(tokenizer, student.model)
    if settings.generates:
        check_template(settings.data, tokenizer)
    check_checkpoint(student.model, student.trust_remote_code)
    check_generation_config(student.model)
    if settings.cache.path is None:
        for teacher in (each.teacher_model for each in settings.by_teacher):
            check_checkpoint(teacher.model, teacher.trust_remote_code)
        if settings.teacher.engine == "vllm":
            check_plain_logits(settings.teacher_model.model, settings.teacher_model.trust_remote_code)
            check_quantization(settings)


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


def check_template(data: DataSettings, tokenizer: Any) -> None:
    """Render the first training row of each source within a time limit.  Raises DataError."""
    for source in data.sources:
        _check_first_row(source, tokenizer)


def _check_first_row(data: DataSettings, tokenizer: Any) -> None:
    row = next(iter(load_rows(data, "train")), None)
    if row is None:
        return  # prepare raises the error, which names the split
    try:
        _with_timeout(lambda: prompt_ids(row, tokenizer, data))
    except ConfigError as error:
        raise DataError(f"{row.name}: {error}") from None
    except TimeoutError:
        raise DataError(
            f"data.template={data.template}: rendering {row.name} took more than {TEMPLATE_TIMEOUT_S:g} s; look for "
            "a loop in the chat template"
        ) from None


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
    """Raise ModelError unless ``model`` is a causal language model with readable safetensors.

    Weight files of a hub model are not checked, because they may not be downloaded yet.
    """
    import torch

    config = loading.load_config(model, trust_remote_code)
    folder = Path(loading.resolve_path(model))
    if folder.is_dir():
        loading.check_weights(model)
        check_weight_headers(folder, model)
    if trust_remote_code:
        return  # the model's code may not build without weights
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
    if built.get_output_embeddings() is None or built.base_model is built:
        raise ModelError(
            f"model {model!r}: {type(built).__name__} has no backbone and LM head that can be told apart; use a causal "
            "language model with output embeddings"
        )


def check_quantization(settings: Settings) -> None:
    """Raise ModelError if the weights that ``teacher.quantization`` would quantize are quantized already."""
    named, method = settings.teacher_model, settings.teacher.quantization
    if method is None:
        return
    config = loading.load_config(named.model, named.trust_remote_code)
    if (stored := getattr(config, "quantization_config", None)) is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        raise ModelError(
            f"teacher.quantization={method}: the weights of {named.model!r} are quantized already "
            f"({stored.get('quant_method')}); leave it empty"
        )


def check_weight_headers(folder: Path, model: str) -> None:
    """Raise ModelError unless ``folder`` has all its safetensors files, with readable headers."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        for name in names:
            with safe_open(folder / name, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model {model!r}: its weights cannot be read: {first_line(error)}") from None


def check_generation_config(model: str) -> None:
    """Raise ModelError unless the generation settings of ``model`` can be saved, as the end of a run does."""
    from transformers import GenerationConfig

    folder = Path(loading.resolve_path(model))
    if not (folder / "generation_config.json").exists():
        return
    try:
        config = savable_generation_config(GenerationConfig.from_pretrained(folder))
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"model {model!r}: its generation_config.json cannot be used: {first_line(error)}; correct or "
            "remove the file"
        ) from None
