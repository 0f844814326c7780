"""Loading of causal language models and tokenizers, and checks that student and teacher fit together."""

from __future__ import annotations

import functools
import logging
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.models.lora import add_lora
from onpolicy_skd.storage.files import sha256

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = "bundled:"


def resolve_path(model: str) -> str:
    """Return a folder for ``bundled:NAME`` and existing paths, else the hub name.  Raises ModelError."""
    if model.startswith(BUNDLED):
        folder = ASSETS / model.removeprefix(BUNDLED)
        if not (folder / "config.json").exists():
            known = ", ".join(BUNDLED + p.parent.name for p in sorted(ASSETS.glob("*/config.json")))
            raise ModelError(f"model {model!r}: not bundled; accepted: {known}")
        return str(folder)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"model {model!r}: the folder has no config.json, so it is not a transformers checkpoint")
    looks_local = path.is_absolute() or model.startswith(".") or model.count("/") > 1
    if not path.exists() and looks_local:
        raise ModelError(f"model {model!r}: no such folder; give a transformers checkpoint or a hub name OWNER/NAME")
    if not path.exists() and not _in_cache(model) and not _hub_answers():
        raise ModelError(
            f"model {model!r}: no such folder, not in the Hugging Face cache, and the hub does not answer; give a "
            "folder with a transformers checkpoint, or connect to the network"
        )
    return model


def check_weights(model: str) -> None:
    """Raise ModelError if ``model`` is a folder without safetensors weights: pickled weights are never loaded."""
    folder = Path(resolve_path(model))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
        held = f"only pickled weights ({pickled[0]}), which may run code" if pickled else "no weights"
        raise ModelError(f"model {model!r}: the folder has {held}; accepted: *.safetensors, as save_pretrained writes")


def _in_cache(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)


@functools.cache
def _hub_answers() -> bool:
    """Return False if the hub cannot be reached: without this check huggingface_hub retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # offline fails at once; only a proxy knows what it reaches
        return True
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of ``model``, with a padding token.  Raises ModelError."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_token_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that end a response, from generation settings and tokenizer."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """Load the configuration of ``model`` without its weights.  Raises ModelError."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, model, trust_remote_code=trust_remote_code)


def load_model(model: str, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> Any:
    """Load the causal language model ``model`` on ``device``, from safetensors only.

    Raises ModelError, also if the files lack a tensor or have one of another shape, which transformers would only log.
    """
    check_weights(model)
    kind = auto_class(load_config(model, trust_remote_code))
    loaded, info = _from_pretrained(
        kind,
        model,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_complete names them
    )
    check_complete(loaded, info, model)
    return loaded.to(device)


def check_complete(loaded: Any, info: dict[str, Any], model: str) -> None:
    """Raise ModelError unless the files gave each weight of ``loaded`` its value; ``info``: from transformers.

    Tied weights have one name in the files.  Of the buffers only biases, of routers, are learned; the model computes
    the others.
    """
    parameters = {name for name, _ in loaded.named_parameters(remove_duplicate=False)}
    learned = parameters - getattr(loaded, "all_tied_weights_keys", {}).keys()
    lacking = sorted(name for name in info["missing_keys"] if name in learned or name.endswith("_bias"))
    others = sorted(
        f"{name} has shape {list(stored)}, not {list(built)}" for name, stored, built in info["mismatched_keys"]
    )
    if lacking or others:
        kind, named = ("lack", lacking) if lacking else ("do not fit", others)
        raise ModelError(
            f"model {model!r}: its files {kind} {len(named)} weights of {type(loaded).__name__} "
            f"({', '.join(named[:3])}{', ...' if len(named) > 3 else ''}), which would be random; give a complete, "
            "unquantized checkpoint"
        )


def auto_class(config: Any) -> Any:
    """Return the auto class for causal language models, or the multimodal one for models that only it knows."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal = type(config) in AutoModelForCausalLM._model_mapping
    multimodal = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if multimodal and not causal else AutoModelForCausalLM


def freeze_other_towers(model: Any) -> Any:
    """Freeze the parameters of a multimodal model that text does not use: its image and audio towers."""
    config = model.config
    if config.get_text_config() is not config:
        text = [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]
        trained = {id(parameter) for parameter in text}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    return model


def load_student(settings: Settings, device: str, compute_device: str) -> Any:
    """Load the student to train, on ``device``.

    Its weights are float32 masters.  With ``student.lora_rank`` only the adapters are float32; the frozen weights have
    the compute dtype of ``compute_device``.  Raises ModelError.
    """
    student_cfg = settings.student
    adapters = student_cfg.lora_rank > 0
    dtype = pick_dtype(settings.learner.compute_dtype, compute_device) if adapters else torch.float32
    model = freeze_other_towers(load_model(student_cfg.model, dtype, device, student_cfg.trust_remote_code))
    if student_cfg.lora_rank:
        return add_lora(model, student_cfg.lora_rank, student_cfg.lora_alpha, settings.run.seed)
    return model


def saved_dtype(settings: Settings) -> torch.dtype:
    """Return the dtype of the saved student: its checkpoint's, or ``learner.compute_dtype`` if that is finer."""
    if settings.learner.compute_dtype == "float32":
        return torch.float32
    config = load_config(settings.student.model, settings.student.trust_remote_code)
    dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    coarse = settings.learner.compute_dtype == "float16" and dtype == torch.bfloat16
    return torch.float16 if coarse else dtype  # bfloat16 would undo small updates


def _from_pretrained(kind: Any, model: str, **options: Any) -> Any:
    if options.get("trust_remote_code"):
        _warn_of_code(model)
    try:
        return kind.from_pretrained(resolve_path(model), **options)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds; each means that this model cannot be used
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if "custom code" in reason:
            raise ModelError(
                f"model {model!r} comes with Python code, which runs only if you allow it: read it, and set "
                "student.trust_remote_code or teacher.trust_remote_code if you trust it"
            ) from None
        raise ModelError(
            f"model {model!r} cannot be loaded: {type(error).__name__}: {reason}; "
            "give a folder with a transformers checkpoint or a hub name OWNER/NAME"
        ) from error


@functools.cache
def _warn_of_code(model: str) -> None:
    logger.warning("trust_remote_code is on: Python code that comes with %s runs here with your permissions", model)


def check_same_tokenizer(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Raise ModelError unless both map the same tokens to the same ids."""
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    if student_ids == teacher_ids:
        return
    tokens = student_ids.keys() | teacher_ids.keys()
    different = sorted(t for t in tokens if student_ids.get(t) != teacher_ids.get(t))
    example = different[0]
    raise ModelError(
        f"the tokenizers of student {student_name!r} ({len(student_ids)} tokens) and teacher {teacher_name!r} "
        f"({len(teacher_ids)} tokens) differ in {len(different)} tokens, for example {example!r}: "
        f"id {student_ids.get(example)} and {teacher_ids.get(example)}; distillation compares distributions over one "
        "vocabulary, so use models with the same tokenizer"
    )


def check_length(config: Any, model: str, tokens: int) -> None:
    """Raise ModelError if a sequence of ``tokens`` has more positions than ``model`` supports."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ModelError(
            f"model {model!r}: supports {limit} positions, a sequence may have {tokens} tokens; lower "
            "data.max_prompt_tokens + rollout.max_tokens (or eval.max_tokens, teacher.max_prompt_tokens), or "
            "data.sequence_length"
        )


def vocabulary_of(config: Any) -> int:
    """Return the number of rows of a model's LM head."""
    return config.get_text_config().vocab_size


def shared_vocabulary(student_config: Any, teacher_config: Any, tokenizer_size: int) -> int:
    """Return the number of rows that both LM heads have; padding of the larger one is cut.  Raises ModelError."""
    sizes = (vocabulary_of(student_config), vocabulary_of(teacher_config))
    if min(sizes) < tokenizer_size:
        raise ModelError(
            f"the LM heads have {sizes[0]} (student) and {sizes[1]} (teacher) rows but the tokenizer has "
            f"{tokenizer_size} tokens; both heads must cover the tokenizer"
        )
    return min(sizes)


def pick_device(setting: str) -> str:
    """Return cuda or cpu.  Raises ModelError if cuda is required but absent."""
    if setting == "cuda" and not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}, which may need a newer driver (nvidia-smi shows it)"
        raise ModelError(
            "run.device=cuda, or a GPU of the cluster: torch sees no CUDA device here; "
            f"{built if torch.version.cuda else 'torch is a CPU build'}; accepted: run.device=cpu"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting


def pick_dtype(setting: str, device: str) -> torch.dtype:
    """Return the dtype of a setting; ``auto`` is bfloat16 on GPUs and float32 on CPUs."""
    if setting == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[setting]


def weights_digest(model: str) -> list[str]:
    """Return the SHA-256 of each file of a folder's weights, or the name and commit of a hub model."""
    folder = Path(resolve_path(model))
    if folder.is_dir():
        return [sha256(file) for file in sorted(folder.glob("*.safetensors"))]
    return [model, str(getattr(load_config(model), "_commit_hash", None))]
