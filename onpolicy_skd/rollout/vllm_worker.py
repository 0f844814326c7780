"""What runs inside vLLM's workers, which are processes of their own with rollout.tensor_parallel above 1.

Imports vLLM: named to it as text, or imported once vllm_engine.py has prepared the ground.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from onpolicy_skd.distributed.weight_transfer import GlooGroup
from onpolicy_skd.models.lm_head import entropy_of

ENTROPIES: dict[str, dict[int, float]] = {}  # by request and position
TIMEOUT_S = 600.0  # seconds for the learner to send one tensor


class EntropyRecorder(LogitsProcessor):
    """Writes the entropy of each row of logits to ENTROPIES, at temperature 1 as they come.

    Of vLLM's first model runner; its second has another interface (vllm_engine.py asks for the first).
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[dict[int, float], list[int]]] = {}  # where to write, and the tokens so far

    def is_argmax_invariant(self) -> bool:
        return False  # else greedy decoding and the step before the temperature would pass it by

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, self._of)

    def _of(self, params: Any, _: Any, output_ids: list[int]) -> tuple[dict[int, float], list[int]] | None:
        key = (params.extra_args or {}).get("entropy_of")
        return None if key is None else (ENTROPIES.setdefault(key, {}), output_ids)

    def apply(self, logits: Tensor) -> Tensor:
        if self._rows:
            at = torch.tensor(list(self._rows), device=logits.device)
            entropies = entropy_of(logits, at).tolist()
            for (found, output_ids), value in zip(self._rows.values(), entropies, strict=True):
                found[len(output_ids)] = value
        return logits


def take_entropies(_: Any, key: str) -> dict[int, float] | None:
    """What was recorded for a request; every worker sees all rows."""
    return ENTROPIES.pop(key, None)


def repack_heads(model: Any) -> None:
    """vLLM's CPU backend computes logits from a packed copy of the LM head; reloading renews it for an untied head
    only, so with tied embeddings the engine would go on sampling through the old head."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's receiver of a broadcast, on CPUs."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        address = (str(init_info.master_address), int(init_info.master_port or 0))
        rank = init_info.rank_offset + self.parallel_config.rank
        self._gloo: GlooGroup | None = GlooGroup(address, rank, init_info.world_size, TIMEOUT_S)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        model: Any = self.model
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            assert self._gloo is not None  # vLLM calls init_transfer_engine first
            self._gloo.broadcast(weight)
            model.load_weights([(name, weight)])

    def shutdown(self) -> None:
        if gloo := getattr(self, "_gloo", None):
            gloo.destroy()
        self._gloo = None


class Extension:
    """Named to vLLM so that its workers import this module."""


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
