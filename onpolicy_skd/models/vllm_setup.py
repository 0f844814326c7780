"""Setup shared by all vLLM engines: environment variables, common arguments, and a clear error if vLLM cannot run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from multiprocessing import connection
from typing import Any

from pydantic import ValidationError

from onpolicy_skd.config.errors import first_line
from onpolicy_skd.models.errors import ModelError

# The engine lives in the caller's process: it starts in seconds, dies with its actor, and takes weights as objects.
# Compiling the sampler costs seconds for no gain on CPU. Both must be set before vLLM is imported.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
_DEVICE_ENVIRONMENT = {
    "cpu": {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"},
    "cuda": {"VLLM_LOGGING_LEVEL": "WARNING"},
}
_FLOAT32_HEAD = {"head_dtype": "float32"}  # logits as the learner computes them (models/lm_head.py)


def require_vllm(device: str = "auto", setting: str = "rollout.engine") -> None:
    """Raise ModelError if vLLM is not installed, or is its GPU build and ``device`` is cpu; does not import it.

    ``setting``: the setting that asks for vLLM.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModelError(
            f"{setting}=vllm: vLLM is not installed; install this package with its extra 'cpu' or 'gpu', "
            f"or set {setting}=transformers"
        )
    if device == "cpu" and "cpu" not in vllm_version():
        raise ModelError(
            f"{setting}=vllm, run.device=cpu: vLLM here is its GPU build, which would take a GPU that the run was "
            f"not given; accepted with run.device=cpu: {setting}=transformers, or vLLM's CPU build"
        )


def vllm_version() -> str:
    """Return vLLM's version; its CPU build is the distribution vllm-cpu, marked by "cpu" in the version."""
    try:
        return metadata.distribution("vllm").version
    except metadata.PackageNotFoundError:
        return metadata.distribution("vllm-cpu").version + "+cpu"


def set_environment(device: str, more: Mapping[str, str] | None = None, setting: str = "rollout.engine") -> None:
    """Set the environment variables that vLLM reads at import.  Raises ModelError if it is not installed."""
    require_vllm(device, setting)
    for name, value in (_ENVIRONMENT | _DEVICE_ENVIRONMENT[device] | dict(more or {})).items():
        os.environ.setdefault(name, value)


def on_worker_death(llm: Any, action: Callable[[], None]) -> None:
    """Call ``action`` on another thread once a worker process of ``llm`` dies (none without tensor parallelism).

    The running call of vLLM may never return, because the other workers wait for the dead one.
    """
    llm.llm_engine.model_executor.register_failure_callback(action)


def lost_worker(llm: Any, timeout_s: float) -> bool:
    """Return True if a worker process of ``llm`` is dead, or dies within ``timeout_s`` seconds.

    Another worker may report the broken connection before the process is gone.
    """
    sentinels = [handle.proc.sentinel for handle in getattr(llm.llm_engine.model_executor, "workers", ())]
    return bool(sentinels) and bool(connection.wait(sentinels, timeout_s))


def cannot_run(error: Exception, model: str, setting: str = "rollout.engine") -> ModelError:
    """Return a one-line error for a ``model`` that vLLM cannot run: first line of ``error``, or pydantic's reason."""
    if isinstance(error, ValidationError):
        reason = first_line(error.errors()[0]["msg"])
    else:
        reason = f"{type(error).__name__}: {first_line(error)}"
    return ModelError(f"{setting}=vllm: vLLM cannot run {model!r}: {reason}")


def engine_kwargs(
    device: str, max_length: int, kv_cache_mib: int, gpu_memory: float, tensor_parallel: int
) -> dict[str, Any]:
    """Return the arguments of an engine that depend on its device and its number of GPUs."""
    kwargs: dict[str, Any] = dict(gpu_memory_utilization=gpu_memory, hf_overrides=_FLOAT32_HEAD)
    if device == "cpu":
        kwargs = cpu_engine_kwargs(max_length, kv_cache_mib)
    if tensor_parallel > 1:
        kwargs |= dict(tensor_parallel_size=tensor_parallel, distributed_executor_backend="mp")
    return kwargs


def cpu_engine_kwargs(max_length: int, kv_cache_mib: int) -> dict[str, Any]:
    """Return arguments of a CPU engine.

    No chunked prefill: after a split prompt vLLM rewinds the request's generator, which CPU generators cannot do.
    """
    return dict(
        kv_cache_memory_bytes=kv_cache_mib << 20,
        enforce_eager=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(max_length, 4096),
    )
