"""The LM head of a checkpoint, read from its files, for a model that another library runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.models.loading import auto_class, load_config, resolve_path
from onpolicy_skd.models.split_model import LOGIT_SETTING

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CAP = "final_logit_softcapping"  # Gemma
SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": float,  # Cohere
    "logits_scaling": lambda value: 1.0 / value,  # Granite
    "lm_head_multiplier": float,  # Falcon-H1
}
NEOX_HEAD = "embed_out.weight"  # name in files of GPT-NeoX, whose module has another name


def logit_transform(model: str, trust_remote_code: bool = False) -> tuple[float, float | None]:
    """Return scale and soft cap of the logits of ``model``, see LMHead, from its config.

    Raises ModelError for other settings that change logits.  ``split`` measures both for a model that transformers
    runs; a teacher in vLLM compares them with vLLM's log-probabilities when it starts.
    """
    scale, cap = 1.0, None
    for key, value in load_config(model, trust_remote_code).get_text_config().to_dict().items():
        if not LOGIT_SETTING.search(key) or type(value) not in (int, float):
            continue
        if key == CAP:
            cap = float(value)
        elif key in SCALES:
            scale *= SCALES[key](value)
        elif value not in (0, 1):
            raise ModelError(
                f"teacher.engine=vllm: {key}={value} of {model!r} may change its logits; accepted: "
                f"{CAP}, {', '.join(SCALES)}, or teacher.engine=transformers"
            )
    if not scale > 0 or (cap is not None and not cap > 0):
        raise ModelError(f"model {model!r}: its logits have scale {scale:g} and soft cap {cap}; accepted: above 0")
    return scale, cap


def read_head(model: str, vocabulary: int, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> LMHead:
    """Read the first ``vocabulary`` rows of the LM head of ``model``; with tied weights these are its embeddings.

    Raises ModelError if the files have no such tensor, or only a quantized one.
    """
    head, table = _names(model, trust_remote_code)
    tied = load_config(model, trust_remote_code).get_text_config().tie_word_embeddings
    weight = _tensor(model, table) if tied else _tensor(model, head)
    if weight is None and not tied:
        weight = _tensor(model, NEOX_HEAD)
    if weight is None:
        raise ModelError(
            f"model {model!r}: its files have no tensor {table if tied else head}, so the LM head cannot be read; "
            "accepted: checkpoints whose LM head is not quantized"
        )
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise ModelError(f"model {model!r}: its LM head is stored as {weight.dtype}; accepted: 16 or 32 bits")
    bias = _tensor(model, head.removesuffix("weight") + "bias")

    def used(rows: Tensor) -> Tensor:
        return rows[:vocabulary].clone().to(device, dtype)

    return LMHead(used(weight), None if bias is None else used(bias), *logit_transform(model, trust_remote_code))


def _names(model: str, trust_remote_code: bool) -> tuple[str, str]:
    """Return the names of the weights of LM head and input embeddings."""
    config = load_config(model, trust_remote_code)
    with torch.device("meta"):
        built: Any = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    modules = {id(module): name for name, module in built.named_modules()}
    head, table = built.get_output_embeddings(), built.get_input_embeddings()
    if head is None:
        raise ModelError(f"model {model!r}: has no LM head; accepted: causal language models")
    return f"{modules[id(head)]}.weight", f"{modules[id(table)]}.weight"


def _tensor(model: str, name: str) -> Tensor | None:
    """Return the tensor with this name, or else the only one with its last two words; None if there is none."""
    from safetensors import safe_open

    last_words = ".".join(name.split(".")[-2:])
    files = _files(model)
    keys = [key for key in files if key == name] or [
        key for key in files if key == last_words or key.endswith(f".{last_words}")
    ]
    if len(keys) != 1:
        return None
    with safe_open(files[keys[0]], framework="pt") as file:
        return file.get_tensor(keys[0])


def _files(model: str) -> dict[str, Path]:
    """Return the file of each tensor, from a folder or from the hub."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    path = resolve_path(model)

    def local(name: str) -> Path | None:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file)

    if index := local(INDEX):
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_name = {name: local(name) for name in set(weight_map.values())}
        return {key: file for key, name in weight_map.items() if (file := by_name[name])}
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [f for f in (local(SINGLE),) if f]
    tensors: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors |= dict.fromkeys(opened.keys(), file)
    return tensors
