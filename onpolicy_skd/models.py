"""Loading causal language models, and telling a model's trunk from its LM head."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.checkpoint import sha256
from onpolicy_skd.config import ConfigError, Settings
from onpolicy_skd.trajectory import Batch, Trajectory, collate, seed_of

ASSETS = Path(__file__).parent / "assets"
BUNDLED = "bundled:"
LORA, BASE = ".lora_", ".base_layer.weight"  # in peft's names of parameters
log = logging.getLogger(__name__)


class ModelError(ConfigError):
    """A model or tokenizer that cannot be used; the message names it and says what would be accepted."""


def resolve_path(model: str) -> str:
    """A folder for ``bundled:NAME`` and existing paths, else the hub name.  Raises ModelError."""
    if model.startswith(BUNDLED):
        folder = ASSETS / model.removeprefix(BUNDLED)
        if not (folder / "config.json").exists():
            known = ", ".join(BUNDLED + p.parent.name for p in sorted(ASSETS.glob("*/config.json")))
            raise ModelError(f"model {model!r}: not bundled; accepted: {known}")
        return str(folder)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"model {model!r}: the folder has no config.json, so it is no transformers checkpoint")
    looks_local = path.is_absolute() or model.startswith(".") or model.count("/") > 1
    if not path.exists() and looks_local:
        raise ModelError(f"model {model!r}: no such folder; give a transformers checkpoint or a hub name OWNER/NAME")
    return model


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``model``, with a padding token.  Raises ModelError."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends a response, from the model's generation settings and its tokenizer."""
    own = getattr(generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """The configuration of ``model`` without its weights.  Raises ModelError."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, model, trust_remote_code=trust_remote_code)


def load_model(model: str, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> Any:
    """The causal language model ``model`` on ``device``, from safetensors only.  Raises ModelError."""
    from transformers import AutoModelForCausalLM

    loaded = _from_pretrained(
        AutoModelForCausalLM, model, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    return loaded.to(device)


def load_student(settings: Settings, device: str, compute_device: str) -> Any:
    """The model that is trained, on ``device``: float32 masters or, with ``student.lora_rank``, float32 additions to
    weights that are held as they are used on ``compute_device`` (in float32 too where they are cut among ranks, which
    takes one type only).  Raises ModelError."""
    own = settings.student
    frozen = own.lora_rank and settings.learner.ranks == 1
    dtype = pick_dtype(settings.learner.compute_dtype, compute_device) if frozen else torch.float32
    model = load_model(own.model, dtype, device, own.trust_remote_code)
    return add_lora(model, own.lora_rank, own.lora_alpha, settings.run.seed) if own.lora_rank else model


def add_lora(model: Any, rank: int, alpha: int, seed: int) -> Any:
    """``model`` with all weights frozen and trainable low-rank additions in its linear layers but the LM head; they
    change nothing yet (arXiv 2106.09685)."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "lora"))
        found = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"), model)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(LORA in name)
        if LORA in name:
            parameter.data = parameter.data.float()
    return found


def merged_parameters(model: Any, whole: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names as in a plain checkpoint, and what computes each weight, low-rank additions included.

    ``whole`` makes one of a tensor that is cut among ranks.  A tied LM head is left out.
    """

    def merged(weight: Tensor, layer: Any) -> Tensor:
        a_RI, b_OR = (whole(part["default"].weight.detach()) for part in (layer.lora_A, layer.lora_B))
        base = whole(weight.detach())
        if not base.numel():
            return base
        delta = layer.scaling["default"] * (b_OR @ a_RI)
        return base.float() + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)

    for name, parameter in model.named_parameters():
        if name.endswith(BASE):
            layer = model.get_submodule(name.removesuffix(BASE))
            yield name.removesuffix(BASE) + ".weight", partial(merged, parameter, layer)
        elif LORA not in name:
            yield name.replace(".base_layer.", "."), partial(lambda p: whole(p.detach()), parameter)


def _from_pretrained(kind: Any, model: str, **options: Any) -> Any:
    if options.get("trust_remote_code"):
        _warn_of_code(model)
    try:
        return kind.from_pretrained(resolve_path(model), **options)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds; each means that this model is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if "custom code" in reason:
            raise ModelError(
                f"model {model!r} brings Python code along, which is not run unless you say so: read it, and set "
                "student.trust_remote_code or teacher.trust_remote_code if you trust it"
            ) from None
        raise ModelError(
            f"model {model!r} cannot be loaded: {type(error).__name__}: {reason}; "
            "give a folder with a transformers checkpoint or a hub name OWNER/NAME"
        ) from error


@functools.cache
def _warn_of_code(model: str) -> None:
    log.warning("trust_remote_code is on: Python code that comes with %s runs here, with your rights", model)


def check_same_tokenizer(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Raises ModelError unless both map the same tokens to the same ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    example = different[0]
    raise ModelError(
        f"the tokenizers of student {student_name!r} ({len(ours)} tokens) and teacher {teacher_name!r} "
        f"({len(theirs)} tokens) differ in {len(different)} tokens, for example {example!r}: "
        f"id {ours.get(example)} and {theirs.get(example)}; distillation compares distributions over one vocabulary, "
        "so use models of one tokenizer"
    )


def check_length(config: Any, model: str, tokens: int) -> None:
    """Raises ModelError if a sequence of ``tokens`` has more positions than ``model`` knows."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    if known is not None and tokens > known:
        raise ModelError(
            f"model {model!r}: knows {known} positions, a sequence may have {tokens} tokens; lower "
            "data.max_prompt_tokens + rollout.max_tokens (or eval.max_tokens), or data.sequence_length"
        )


def vocabulary_of(config: Any) -> int:
    """Rows of a model's LM head."""
    return config.get_text_config().vocab_size


def shared_vocabulary(student_config: Any, teacher_config: Any, tokenizer_size: int) -> int:
    """Rows of the LM heads that both models have: a vocabulary padded in one of them is cut.  Raises ModelError."""
    sizes = (vocabulary_of(student_config), vocabulary_of(teacher_config))
    if min(sizes) < tokenizer_size:
        raise ModelError(
            f"the LM heads have {sizes[0]} (student) and {sizes[1]} (teacher) rows but the tokenizer has "
            f"{tokenizer_size} tokens; both heads must cover the tokenizer"
        )
    return min(sizes)


@dataclass(frozen=True)
class SplitModel:
    """A causal language model as trunk (all but the LM head, final norm included) and head weight ``[V, H]``."""

    model: Any  # a transformers PreTrainedModel
    vocabulary: int  # rows of the head in use
    takes_embeddings: bool = True  # whether the trunk makes of its embeddings what it makes of their ids
    forward: Any = None  # of the trunk, where it is not to be called itself: a model in parts (ranks.py)

    @property
    def trunk(self) -> Any:
        return self.forward or self.model.base_model

    @property
    def head_VH(self) -> Tensor:
        weight = self.model.get_output_embeddings().weight
        return weight if len(weight) == self.vocabulary else weight[: self.vocabulary]  # a slice's gradient is a copy

    @property
    def device(self) -> torch.device:
        return self.model.get_output_embeddings().weight.device

    def embedded(self, batch: Batch) -> Tensor | None:
        """``[B, L, H]``: a leaf whose gradient ``add_embedding_gradient`` takes; None for embeddings of another kind.

        Autograd would make a gradient of the whole table ``[V, H]`` of it, for a few rows, at every micro-batch.
        """
        table = self.model.get_input_embeddings()
        plain = type(table) is torch.nn.Embedding and table.max_norm is None and not table.scale_grad_by_freq
        if not (plain and self.takes_embeddings and table.weight.requires_grad):
            return None
        return torch.nn.functional.embedding(batch.input_ids, table.weight.detach()).requires_grad_()

    @torch.no_grad()
    def add_embedding_gradient(self, batch: Batch, leaf_BLH: Tensor) -> None:
        """After the backward pass: adds the gradient of ``embedded`` to that of the table."""
        table, gradient = self.model.get_input_embeddings(), leaf_BLH.grad
        if gradient is None:
            return
        if table.weight.grad is None:
            table.weight.grad = torch.zeros_like(table.weight)
        if table.padding_idx is not None:
            gradient = gradient.masked_fill((batch.input_ids == table.padding_idx)[..., None], 0.0)
        ids, gradient_TH = batch.input_ids.flatten(), gradient.flatten(0, 1).to(table.weight.dtype)
        if ids.device.type == "cpu":  # each is the one that adds in a fixed order
            table.weight.grad.index_add_(0, ids, gradient_TH)
        else:
            table.weight.grad.index_put_((ids,), gradient_TH, accumulate=True)

    def hidden(self, batch: Batch, embedded_BLH: Tensor | None = None) -> Tensor:
        """``[N, H]``: last hidden states, after the final norm, at the eligible positions."""
        mask = batch.attention_mask
        if mask.ndim == 4:
            mask = _mask_for(self.model, mask)
        out = self.trunk(
            input_ids=batch.input_ids if embedded_BLH is None else None,
            inputs_embeds=embedded_BLH,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        return batch.eligible(out.last_hidden_state)


def _mask_for(model: Any, mask_B1LL: Tensor) -> Tensor:
    """A mask of documents in the form that ``model``'s attention takes.  Raises ModelError if it takes none."""
    kind = model.config._attn_implementation
    if kind == "sdpa":
        return mask_B1LL
    if kind == "eager":
        least = torch.finfo(model.dtype).min
        return torch.zeros(mask_B1LL.shape, dtype=model.dtype, device=mask_B1LL.device).masked_fill(~mask_B1LL, least)
    raise ModelError(
        f"{type(model).__name__}: its attention ({kind}) takes no mask of documents; accepted with "
        "data.documents=joined, or attention of kind sdpa or eager"
    )


@torch.no_grad()
def check_documents(split_model: SplitModel, pad_id: int, longest: int) -> None:
    """Raises ModelError unless packed documents are kept apart, in samples of up to ``longest`` tokens."""
    config = split_model.model.config.get_text_config()
    windowed = getattr(config, "use_sliding_window", True)
    window = getattr(config, "attention_chunk_size", None) or (windowed and getattr(config, "sliding_window", None))
    if window and window < longest:
        raise ModelError(
            f"{type(split_model.model).__name__}: its attention reaches {window} tokens back, which a mask of "
            f"documents would override in samples of {longest}; accepted with data.documents=joined and "
            "pipeline.packing=false, or shorter samples"
        )
    documents = [np.arange(1, 6) % split_model.vocabulary, np.arange(3, 11) % split_model.vocabulary]

    def hidden(ids: np.ndarray, starts: list[int]) -> Tensor:
        zeros = np.zeros(len(ids) - 1, np.float32)
        packed = Trajectory("check", ids[:1], ids[1:], zeros, "stop", None, documents=np.array(starts, np.int64))
        return split_model.hidden(collate([packed], pad_id, split_model.device)).float()

    together, alone = hidden(np.concatenate(documents), [5])[5:], hidden(documents[1], [])
    tolerance = 1e-3 if split_model.head_VH.dtype == torch.float32 else 5e-2
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
        raise ModelError(
            f"{type(split_model.model).__name__}: does not keep packed documents apart (a recurrent layer?); "
            "accepted with data.documents=joined and pipeline.packing=false"
        )


@torch.no_grad()
def split(model: Any, vocabulary: int) -> SplitModel:
    """Tells trunk and head apart and checks on a short input that together they are the model.

    Raises ModelError for models whose logits are more than ``head @ trunk`` (biases, scales, soft caps).
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ModelError(f"{name}: its trunk and LM head cannot be told apart; use a causal LM with output embeddings")
    if model.get_input_embeddings().weight.shape[0] < vocabulary:
        raise ModelError(f"{name}: fewer input embeddings than the vocabulary of {vocabulary}")
    ids = torch.arange(1, 9, device=head.weight.device)[None] % vocabulary
    was_training = model.training
    model.eval()
    direct = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    composed = (hidden @ head.weight.T).float()
    model.train(was_training)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    if direct.shape != composed.shape or not torch.allclose(direct, composed, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"{name}: its logits are not LM head @ last hidden state (a bias, scale or soft cap?); "
            "accepted: models such as Qwen, Llama, Mistral, SmolLM, GPT-NeoX"
        )
    return SplitModel(model, vocabulary, _takes_embeddings(model, ids, hidden))


def _takes_embeddings(model: Any, ids: Tensor, hidden_BLH: Tensor) -> bool:
    """Whether the trunk gives ``hidden_BLH`` of the embeddings of ``ids`` too: some scale them, or look at the ids."""
    embeddings = model.get_input_embeddings()(ids)
    try:
        found = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    except (TypeError, ValueError):  # it takes no embeddings
        return False
    return torch.allclose(found.float(), hidden_BLH.float(), rtol=1e-3, atol=1e-3)


def pick_device(setting: str) -> str:
    """Either cuda or cpu.  Raises ModelError if cuda is asked for but absent."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise ModelError("run.device=cuda: no CUDA device is visible here; accepted: auto, cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting


def pick_dtype(setting: str, device: str) -> torch.dtype:
    if setting == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]


def weights_digest(model: str) -> list[str]:
    """SHA-256 of a folder's weights; of a hub model its name and commit."""
    folder = Path(resolve_path(model))
    if folder.is_dir():
        return [sha256(file) for file in sorted(folder.glob("*.safetensors"))]
    return [model, str(getattr(load_config(model), "_commit_hash", None))]
