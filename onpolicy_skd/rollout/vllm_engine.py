"""The vLLM engine for rollouts.

vLLM's Python API changes often.  The code that depends on it is in this file, vllm_worker.py, models/vllm_setup.py,
teacher/vllm_teacher.py and distributed/weight_transfer.py.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.weight_transfer import Address, WeightSpec
from onpolicy_skd.evaluation.stop_texts import stop_length
from onpolicy_skd.models.loading import eos_token_ids, load_tokenizer, pick_device, resolve_path
from onpolicy_skd.models.vllm_setup import (
    cannot_run,
    cpu_engine_kwargs,
    engine_kwargs,
    lost_worker,
    on_worker_death,
    set_environment,
    vllm_version,
)
from onpolicy_skd.rollout.engine import sort_by_request
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory, id_array

if TYPE_CHECKING:
    import vllm

_RECORDING = {"VLLM_USE_V2_MODEL_RUNNER": "0"}  # the model runner that EntropyRecorder supports
WORKER = "onpolicy_skd.rollout.vllm_worker"
LM_EVAL_KV_CACHE_MIB = 2048


class VLLMEngine:
    """vLLM behind the RolloutEngine interface.  Raises ModelError if vLLM cannot run the model."""

    def __init__(self, model: str, settings: Settings, trust_remote_code: bool = False) -> None:
        device, cfg = pick_device(settings.run.device), settings.rollout
        set_environment(device, _RECORDING if cfg.entropy == "engine" else {})
        from vllm import LLM

        path = resolve_path(model)
        dtype = cfg.dtype if cfg.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
        max_length = settings.max_model_length
        kwargs = engine_kwargs(device, max_length, cfg.kv_cache_mib, cfg.gpu_memory, cfg.tensor_parallel)
        backend = {"broadcast": "gloo" if device == "cpu" else "nccl", "ipc": "ipc"}.get(settings.sync.method)
        if backend:
            kwargs |= dict(weight_transfer_config={"backend": backend}, worker_extension_cls=f"{WORKER}.Extension")
        self.version = 0
        self._on_cpu = device == "cpu"
        self._timeout_s = settings.faults.timeout_s()  # limit for the learner to send a tensor
        self._devices = cfg.tensor_parallel
        self._sleeps, self._asleep = device == "cuda" and settings.cluster.topology == "colocated", False
        self._tokenizer = load_tokenizer(path, trust_remote_code)
        self._eos_token_ids = _eos_token_ids(path, trust_remote_code)
        self._request_ids = itertools.count()  # never reused: an abandoned request must not answer for another one
        try:
            self._llm = LLM(
                path,
                dtype=dtype,
                load_format="safetensors",  # never a pickle
                max_model_len=max_length,
                max_num_seqs=cfg.max_sequences,
                generation_config="vllm",  # no sampling settings of the checkpoint
                seed=0,
                trust_remote_code=trust_remote_code,
                disable_log_stats=True,
                logits_processors=[f"{WORKER}:EntropyRecorder"] if cfg.entropy == "engine" else None,
                enable_sleep_mode=self._sleeps,
                **kwargs,
            )
        except ValueError as error:  # pydantic's are too; lack of memory, a fault of this actor, is not
            raise cannot_run(error, model) from error

    def on_worker_death(self, action: Callable[[], None]) -> None:
        on_worker_death(self._llm, action)

    def lost_worker(self, timeout_s: float) -> bool:
        return lost_worker(self._llm, timeout_s)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        with self._updated(version):
            iterator = iter(weights) if self._devices == 1 else list(weights)  # a list can be sent to other processes
            self._llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=iterator))

    def init_weight_transfer(self, address: Address, first: int, count: int) -> None:
        """Join the broadcast group of ``count`` processes; this engine's workers are the ranks from ``first`` on.

        With ``sync.method=ipc``, where ``count`` is 0, there is no group: only prepare the engine.
        """
        host, port = address
        info: dict[str, Any] = {}
        if count:
            info = dict(master_address=host, master_port=port, rank_offset=first, world_size=count)
            info |= dict(timeout_s=self._timeout_s) if self._on_cpu else {}
        self._llm.shutdown_weight_transfer_engine()  # leave an earlier group
        self._llm.init_weight_transfer_engine({"init_info": info | {"packed": True}})

    def receive(self, weight_spec: WeightSpec, version: int) -> None:
        """Load the weights that the learner is sending."""
        with self._updated(version):
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": weight_spec.update})
            self._llm.finish_weight_update()

    @contextmanager
    def _updated(self, version: int) -> Iterator[None]:
        """Wake the engine for a weight update, and drop all caches of the old weights afterwards."""
        if self._asleep:
            self._llm.wake_up(["weights"])
        yield
        if self._on_cpu:
            self._llm.apply_model(_worker().repack_heads)
        if self._asleep:
            self._llm.wake_up(["kv_cache"])
        if not self._llm.reset_prefix_cache():  # a weight update keeps it, but its entries belong to the old weights
            raise RuntimeError(
                "vLLM did not drop its prefix cache after a weight update, because a request still holds part of it; "
                "responses would mix old and new weights"
            )
        self.version, self._asleep = version, False

    def sleep(self) -> None:
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        return sort_by_request(requests, self.stream(requests, sampling))

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        engine: Any = self._llm.llm_engine
        pending = {str(next(self._request_ids)): request for request in requests}
        try:
            for request_id, request in pending.items():
                prompt: Any = {"prompt_token_ids": request.prompt_ids}
                engine.add_request(request_id, prompt, self._params(request, sampling))
            while pending:
                for out in engine.step():
                    if out.finished:
                        request = pending.pop(out.request_id)
                        entropies = self._entropies(request.key) if sampling.entropy else None
                        yield self._trajectory(request, out.outputs[0], entropies, sampling.stop)
        finally:  # the caller may have stopped early
            if pending:
                engine.abort_request(list(pending), internal=False)
                for request in pending.values() if sampling.entropy else ():
                    self._entropies(request.key)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _entropies(self, key: str) -> Mapping[int, float] | None:
        """Return and delete the recorded entropies of a request by position, nats; None if there are none."""
        return self._llm.collective_rpc(_worker().take_entropies, args=(key,))[0]

    def _params(self, request: RolloutRequest, sampling: SamplingParams) -> vllm.SamplingParams:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            logprobs=0,  # only of the sampled token
            detokenize=bool(sampling.stop),
            stop=list(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            stop_token_ids=self._eos_token_ids,
            extra_args={"entropy_of": request.key} if sampling.entropy else None,
        )

    def _trajectory(
        self, request: RolloutRequest, out: Any, entropies: Mapping[int, float] | None, stop: Sequence[str]
    ) -> Trajectory:
        length = stop_length(out.token_ids, stop, self._text) if stop else None  # vLLM's detokenizer may lag behind
        ids = np.asarray(out.token_ids[:length], dtype=np.int64)
        logprobs = [entry[int(token)].logprob for token, entry in zip(ids, out.logprobs, strict=length is None)]
        recorded = None if entropies is None else np.array([entropies[i] for i in range(len(ids))], dtype=np.float32)
        return Trajectory(
            key=request.key,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            response_ids=ids,
            sampler_logprobs=np.asarray(logprobs, dtype=np.float32),
            finish_reason="stop" if length is not None or out.finish_reason == "stop" else "length",
            policy_version=self.version,
            sampler_entropy=recorded,
            teacher_prompt_ids=id_array(request.teacher_prompt_ids),
            teacher=request.teacher,
        )


def _worker() -> Any:
    return importlib.import_module(WORKER)


def harness_model(device: str, max_length: int, **arguments: Any) -> Any:
    """Return lm-eval's wrapper around a new vLLM engine.  Raises ModelError if vLLM is not installed."""
    set_environment(device)
    known = metadata.version
    metadata.version = lambda name: vllm_version() if name == "vllm" else known(name)  # the wrapper looks it up
    try:
        vllm_causallms: Any = importlib.import_module("lm_eval.models.vllm_causallms")
    finally:
        metadata.version = known
    kwargs = cpu_engine_kwargs(max_length, LM_EVAL_KV_CACHE_MIB) if device == "cpu" else {}
    return vllm_causallms.VLLM(max_model_len=max_length, disable_log_stats=True, **kwargs, **arguments)


def _eos_token_ids(path: str, trust_remote_code: bool) -> list[int]:
    from transformers import GenerationConfig

    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # a checkpoint need not have one
        generation_config = None
    return eos_token_ids(generation_config, load_tokenizer(path, trust_remote_code))
