"""Code inside vLLM's workers, which are separate processes with rollout.tensor_parallel above 1.

It imports vLLM, so only vLLM itself (by its name) and vllm_engine.py (after setting the environment) import it.
"""

from __future__ import annotations

from dataclasses import dataclass
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

from onpolicy_skd.distributed.weight_transfer import BUFFER_BYTES, GlooGroup, WeightSpec, buffers, unpacked
from onpolicy_skd.models.lm_head import entropy_of

ENTROPIES: dict[str, dict[int, float]] = {}  # nats, by request and position


class EntropyRecorder(LogitsProcessor):
    """Logits processor that writes the entropy of each row, at temperature 1, to ENTROPIES.

    It supports vLLM's V1 model runner, which vllm_engine.py selects; the V2 model runner has another interface.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._rows: dict[int, tuple[dict[int, float], list[int]]] = {}  # the dict to write to, and the tokens so far

    def is_argmax_invariant(self) -> bool:
        return False  # otherwise vLLM skips it in greedy decoding and applies the temperature before it

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, self._row)

    def _row(self, params: Any, _: Any, output_ids: list[int]) -> tuple[dict[int, float], list[int]] | None:
        key = (params.extra_args or {}).get("entropy_of")
        return None if key is None else (ENTROPIES.setdefault(key, {}), output_ids)

    def apply(self, logits: Tensor) -> Tensor:
        if self._rows:
            at = torch.tensor(list(self._rows), device=logits.device)
            entropies = entropy_of(logits, at).tolist()
            for (recorded, output_ids), value in zip(self._rows.values(), entropies, strict=True):
                recorded[len(output_ids)] = value
        return logits


def take_entropies(_: Any, key: str) -> dict[int, float] | None:
    """Return and delete the entropies of a request; each worker sees all rows."""
    return ENTROPIES.pop(key, None)


def repack_heads(model: Any) -> None:
    """Refresh the packed copy of the LM head from which vLLM's CPU backend computes logits.

    Reloading refreshes it for an untied head only; with tied embeddings the engine would sample from the old head.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@dataclass(kw_only=True)
class GlooInitInfo(NCCLWeightTransferInitInfo):
    timeout_s: float  # limit for the learner to send a tensor


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """Receiver of a broadcast in vLLM's workers on CPUs."""

    init_info_cls = GlooInitInfo

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        assert isinstance(init_info, GlooInitInfo)
        address = (str(init_info.master_address), int(init_info.master_port or 0))
        rank = init_info.rank_offset + self.parallel_config.rank
        self._gloo: GlooGroup | None = GlooGroup(address, rank, init_info.world_size, init_info.timeout_s)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        model: Any = self.model
        spec = WeightSpec(update_info.names, update_info.dtype_names, update_info.shapes)
        first, sizes = 0, spec.sizes
        for count in buffers(sizes, BUFFER_BYTES):
            places = range(first, first + count)
            buffer = torch.empty(sum(sizes[first : first + count]), dtype=torch.uint8)
            first += count
            assert self._gloo is not None  # vLLM calls init_transfer_engine first
            self._gloo.broadcast(buffer)
            model.load_weights(unpacked(buffer, spec, places))

    def shutdown(self) -> None:
        if gloo := getattr(self, "_gloo", None):
            gloo.destroy()
        self._gloo = None


class Extension:
    """Worker extension that only makes vLLM's workers import this module."""


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
