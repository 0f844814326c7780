"""Attention that keeps packed documents apart by their boundaries, without a mask; for transformers' models.

The boundaries reach it as transformers passes them to FlashAttention: ``cu_seq_lens_q`` and ``max_length_q``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

NAME = "documents"  # in transformers' registry of attention functions
CAUSAL = (-1, 0)  # window of varlen_attn: all tokens before, none after


@contextmanager
def documents_kept_apart(model: Any) -> Iterator[None]:
    """Make the text attention of ``model`` read boundaries of documents within the block.

    Transformers builds no mask for an attention function without an entry in its registry of masks.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def recomputed_alike(model: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a checkpointed forward and its recomputation, which must use the same attention function."""
    apart = model.config.get_text_config()._attn_implementation == NAME
    return nullcontext(), documents_kept_apart(model) if apart else nullcontext()


def document_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each document; return the output ``[B, L, H, D]`` and no weights.

    ``query`` is ``[B, H, L, D]``; ``key`` and ``value`` may have fewer heads.  ``cu_seq_lens_q``: int32, starts of the
    documents in the flattened rows, and B * L; ``max_length_q``: tokens of the longest.  Raises ValueError for other
    features, such as a sliding window: the model then needs a mask.
    """
    more = {
        "a mask": attention_mask is not None,
        "dropout": dropout != 0.0,
        "attention to later tokens": is_causal is False,
        "a sliding window": sliding_window is not None and sliding_window < max_length_q,
        "a soft cap": softcap is not None,
        "sinks": s_aux is not None,
        "a position bias": position_bias is not None,
    }
    if refused := [name for name, given in more.items() if given]:
        raise ValueError(f"attention with {', '.join(refused)} cannot read boundaries of documents")
    if torch.is_autocast_enabled(query.device.type):  # norms with float32 weights return float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, length = query.shape[0], query.shape[2]
    query, key, value = _flat(query), _flat(key), _flat(value)
    attend: Any = _attend_by_kernel if _kernel_takes(query, key, value) else _attend_one_by_one
    out = attend(query, key, value, cu_seq_lens_q, max_length_q, scaling)
    return out.unflatten(0, (rows, length)), None


def _flat(states: Tensor) -> Tensor:
    """Return ``[B, heads, L, D]`` as ``[B * L, heads, D]``."""
    return states.transpose(1, 2).flatten(0, 1)


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if FlashAttention's kernel supports these tensors and their device."""
    size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and value.shape[-1] == size <= 256
        and size % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, max_length: int, scaling: float | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length,
        scale=scaling, window_size=CAUSAL, enable_gqa=grouped,
    )  # type: ignore[return-value]  # fmt: skip


@torch.compiler.disable  # lengths are data: torch would compile for each of them
def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, _: int, scaling: float | None
) -> Tensor:
    lengths = cu_seq_lens.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for document in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in document)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
