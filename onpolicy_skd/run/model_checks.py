"""Checks of a checkpoint's files, configuration and generation settings, without its weights' values."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.backends.cpu import get_cpu_capability as cpu_capability

from onpolicy_skd.config.errors import first_line
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models import loading
from onpolicy_skd.models.generation_config import savable_generation_config
from onpolicy_skd.models.loading import ModelError

MOST_TENSORS = 5_000  # largest trial load, which takes a second; larger models are checked when they load
FOUR_BIT = ("gptq", "awq")  # methods whose products vLLM's CPU build has for AVX-512 only
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
    """Return ``model`` built without weights, or None if a checkpoint's remote code builds it.

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
    if _quantization(config):
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
    if stored := _quantization(loading.load_config(student.model, student.trust_remote_code)):
        raise ModelError(
            f"student.model={student.model}: its weights are quantized ({stored}); use an unquantized checkpoint"
        )
    if settings.cache.path is not None:
        return  # the teacher's outputs are stored
    for key, each in models_of_teachers(settings):
        named = each.teacher_model
        with naming(key):
            stored = _quantization(loading.load_config(named.model, named.trust_remote_code))
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
        if stored in FOUR_BIT and loading.pick_device(settings.run.device) == "cpu" and cpu_capability() == "AVX2":
            raise ModelError(
                f"{key}={named.model}: its weights are quantized ({stored}), which vLLM needs a GPU or a CPU with "
                "AVX-512 for; use unquantized weights"
            )


def _quantization(config: Any) -> str | None:
    """Return the method by which the weights of a checkpoint are quantized; None if they are not."""
    for cfg in (config, config.get_text_config()):
        if stored := getattr(cfg, "quantization_config", None):
            return str((stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method"))
    return None


def check_tensor_parallel(settings: Settings) -> None:
    """Raise ModelError unless vLLM can split the attention heads of each model that it runs evenly over the GPUs."""
    engines: list[tuple[str, Any, Any]] = [("rollout", settings.student, settings.rollout)]
    if settings.cache.path is None:
        teachers = models_of_teachers(settings)
        engines += [(key.removesuffix(".model"), each.teacher_model, each.teacher) for key, each in teachers]
    for section, named, cfg in engines:
        if cfg.engine != "vllm":
            continue
        config = loading.load_config(named.model, named.trust_remote_code).get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 0
        if heads % cfg.tensor_parallel:
            raise ModelError(
                f"{section}.tensor_parallel={cfg.tensor_parallel}: model {named.model!r} has {heads} attention heads; "
                f"accepted: numbers that divide {heads}"
            )


def check_weight_headers(folder: Path, model: str) -> None:
    """Raise ModelError unless ``folder`` has all its safetensors files, with readable headers."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    try:
        names = _weight_files(index) if index.exists() else sorted(path.name for path in folder.glob("*.safetensors"))
        for name in names:
            with safe_open(folder / name, framework="pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
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
    eos, rows = config.eos_token_id, loading.vocabulary_of(loading.load_config(model, trust_remote_code))
    for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if not isinstance(token, int) or token >= rows:
            raise ModelError(f"{wrong}eos_token_id={token!r} is no token; accepted: numbers below {rows}, or a list")


def check_savable(model: str, trust_remote_code: bool, tokenizer: Any) -> None:
    """Raise ModelError unless configuration and tokenizer of ``model`` can be saved, as the end of a run does."""
    saved = {"configuration": loading.load_config(model, trust_remote_code), "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as scratch:
        for name, item in saved.items():
            try:
                item.save_pretrained(scratch)
            except Exception as error:  # transformers raises many kinds
                raise ModelError(
                    f"student.model={model}: its {name} cannot be saved: {type(error).__name__}: {first_line(error)}; "
                    "correct its files"
                ) from None
