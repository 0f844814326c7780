"""A causal language model split into backbone and LM head."""

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
from onpolicy_skd.storage.files import sha256
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.batch import Batch, collate
from onpolicy_skd.types import Trajectory, seed_of
from onpolicy_skd.models.loading import ModelError



@dataclass(frozen=True)
class SplitModel:
    """A causal language model as backbone (all but the LM head, final norm included) and head weight ``[V, H]``."""

    model: Any  # a transformers PreTrainedModel
    vocabulary: int  # rows of the head in use
    takes_embeddings: bool = True  # whether the backbone makes of its embeddings what it makes of their ids
    forward: Any = None  # of the backbone, where it is not to be called itself: a model in parts (ranks.py)

    @property
    def backbone(self) -> Any:
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
        out = self.backbone(
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
    """Tells backbone and head apart and checks on a short input that together they are the model.

    Raises ModelError for models whose logits are more than ``head @ backbone`` (biases, scales, soft caps).
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ModelError(f"{name}: its backbone and LM head cannot be told apart; use a causal LM with output embeddings")
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
    """Whether the backbone gives ``hidden_BLH`` of the embeddings of ``ids`` too: some scale them, or look at the ids."""
    embeddings = model.get_input_embeddings()(ids)
    try:
        found = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    except (TypeError, ValueError):  # it takes no embeddings
        return False
    return torch.allclose(found.float(), hidden_BLH.float(), rtol=1e-3, atol=1e-3)

