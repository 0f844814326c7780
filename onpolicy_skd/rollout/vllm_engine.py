"""Everything that knows vLLM's Python API, which moves: one file to change when it does."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.weight_transfer import Address, WeightSpec
from onpolicy_skd.models.loading import ModelError, eos_token_ids, load_tokenizer, pick_device, resolve_path
from onpolicy_skd.rollout.engine import sort_by_request
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

if TYPE_CHECKING:
    import vllm

# The engine lives in the caller's process: it starts in seconds, dies with its actor, and takes weights as objects.
# Compiling the sampler costs seconds for no gain on CPU. Both must be set before vLLM is imported.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_RECORDING = {"VLLM_USE_V2_MODEL_RUNNER": "0"}  # the runner that EntropyRecorder is made for
WORKER = "onpolicy_skd.rollout.vllm_worker"
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
        device, own = pick_device(settings.run.device), settings.rollout
        _prepare(device, _RECORDING if own.entropy == "engine" else {})
        from vllm import LLM

        path = resolve_path(model)
        dtype = own.dtype if own.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
        longest = settings.max_model_length
        on_gpu: dict[str, Any] = dict(gpu_memory_utilization=own.gpu_memory)
        room = _cpu_room(longest, own.kv_cache_mib) if device == "cpu" else on_gpu
        if own.tensor_parallel > 1:
            room |= dict(tensor_parallel_size=own.tensor_parallel, distributed_executor_backend="mp")
        backend = {"broadcast": "gloo" if device == "cpu" else "nccl", "ipc": "ipc"}.get(settings.sync.method)
        if backend:
            room |= dict(weight_transfer_config={"backend": backend}, worker_extension_cls=f"{WORKER}.Extension")
        self.version = 0
        self._on_cpu = device == "cpu"
        self._devices = own.tensor_parallel
        self._sleeps, self._asleep = device == "cuda" and settings.cluster.topology == "colocated", False
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
            logits_processors=[f"{WORKER}:EntropyRecorder"] if own.entropy == "engine" else None,
            enable_sleep_mode=self._sleeps,
            **room,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        with self._updated(version):
            whole = iter(weights) if self._devices == 1 else list(weights)  # which must reach other processes
            self._llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=whole))

    def join(self, address: Address, first: int, count: int) -> None:
        """Joins the group of ``count`` that the learner broadcasts weights in, its workers as ranks from ``first`` on.

        An ``ipc`` engine needs no group and only gets ready.
        """
        host, port = address
        info = dict(master_address=host, master_port=port, rank_offset=first, world_size=count) if count else {}
        self._llm.shutdown_weight_transfer_engine()  # of a group that is gone
        self._llm.init_weight_transfer_engine({"init_info": info | {"packed": False}})

    def receive(self, weight_spec: WeightSpec, version: int) -> None:
        """As ``load_weights``, of what the learner sends at this time."""
        with self._updated(version):
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": weight_spec.update})
            self._llm.finish_weight_update()

    @contextmanager
    def _updated(self, version: int) -> Iterator[None]:
        if self._asleep:
            self._llm.wake_up(["weights"])
        yield
        if self._on_cpu:
            self._llm.apply_model(_worker().repack_heads)
        if self._asleep:
            self._llm.wake_up(["kv_cache"])
        self._llm.reset_prefix_cache()  # new weights keep it, and its entries belong to the old ones
        self.version, self._asleep = version, False

    def sleep(self) -> None:
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        return sort_by_request(requests, self.stream(requests, sampling))

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        engine: Any = self._llm.llm_engine
        for number, request in enumerate(requests):
            prompt: Any = {"prompt_token_ids": request.prompt_ids}
            engine.add_request(str(number), prompt, self._params(request, sampling))
        while engine.has_unfinished_requests():
            for out in engine.step():
                if out.finished:
                    request = requests[int(out.request_id)]
                    entropies = self._entropies(request.key) if sampling.entropy else None
                    yield self._trajectory(request, out.outputs[0], entropies)

    def _entropies(self, key: str) -> Mapping[int, float] | None:
        """By position; None if none were recorded."""
        return self._llm.collective_rpc(_worker().take_entropies, args=(key,))[0]

    def _params(self, request: RolloutRequest, sampling: SamplingParams) -> vllm.SamplingParams:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            stop_token_ids=self._ends,
            extra_args={"entropy_of": request.key} if sampling.entropy else None,
        )

    def _trajectory(self, request: RolloutRequest, out: Any, entropies: Mapping[int, float] | None) -> Trajectory:
        ids = np.asarray(out.token_ids, dtype=np.int64)
        logprobs = [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
        recorded = None if entropies is None else np.array([entropies[i] for i in range(len(ids))], dtype=np.float32)
        return Trajectory(
            key=request.key,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            response_ids=ids,
            sampler_logprobs=np.asarray(logprobs, dtype=np.float32),
            finish_reason="stop" if out.finish_reason == "stop" else "length",
            policy_version=self.version,
            sampler_entropy=recorded,
        )


def _worker() -> Any:
    return importlib.import_module(WORKER)


def _prepare(device: str, more: Mapping[str, str] | None = None) -> None:
    """What must hold before vLLM is imported.  Raises ModelError if it is not installed."""
    require_vllm()
    for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if device == "cpu" else {}) | dict(more or {})).items():
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


def _ends(path: str, trust_remote_code: bool) -> list[int]:
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(path)
    except OSError:  # a checkpoint need not have one
        own = None
    return eos_token_ids(own, load_tokenizer(path, trust_remote_code))
