"""The frozen teacher in vLLM: last hidden states after the final norm, from its pooling runner.

vLLM brings tensor parallelism, mixtures of experts, quantized weights and long contexts; the divergence stays exact
over the full vocabulary, because the LM head, read from the checkpoint, is applied to the hidden states here.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.batch import micro_batches
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.models.head_weights import read_head
from onpolicy_skd.models.lm_head import LMHead, Projector, log_softmax_
from onpolicy_skd.models.loading import load_tokenizer, pick_device, pick_dtype, resolve_path
from onpolicy_skd.models.vllm_setup import cannot_run, engine_kwargs, lost_worker, on_worker_death, set_environment
from onpolicy_skd.teacher.teacher import HiddenRowsTeacher
from onpolicy_skd.types import Trajectory

CHECKED_TEXTS = ("2 + 3 = 5", "Question: A train travels 60 miles in 2 hours. How fast is it?", "To be or not to be, ")
CHECKED_TOKENS = 20  # number of most likely tokens to compare at each position: vLLM returns no more by default
MAX_GAP = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # mean absolute difference, nats
Logprobs = list[list[dict[int, float]]]  # by text, by position: log-probabilities of the next token, by token id


class VLLMTeacher(HiddenRowsTeacher):
    """A vLLM engine that encodes trajectories in batches of a token budget, and the LM head of its checkpoint.

    Raises ModelError if vLLM cannot run the model, or if head and hidden states do not give vLLM's distribution.
    """

    def __init__(self, settings: Settings, vocabulary: int) -> None:
        cfg, named = settings.teacher, settings.teacher_model
        self._device = pick_device(settings.run.device)
        self._dtype = pick_dtype(cfg.dtype, self._device)
        self._tokens_per_batch = cfg.tokens_per_batch
        # Actors build and encode on different threads, but vLLM's CPU kernels need the one that started the engine.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        head = read_head(named.model, vocabulary, self._dtype, "cpu", named.trust_remote_code)
        kwargs = _llm_kwargs(settings, self._device, self._dtype)
        texts = checked_ids(settings)
        # In a process that exits, so that its memory is free before this engine measures the device.
        expected = _in_new_process(prompt_logprobs, kwargs, self._device, texts)
        self._llm = self._thread.submit(_start, kwargs, self._device, pooling=True).result()
        super().__init__(head.to(self._device), settings.alignment.temperature, settings.alignment.chunk_rows)
        gap = mean_gap(self._hidden_of_ids(texts), self._head, expected)
        check_gap(gap, self._dtype, named.model)

    def on_worker_death(self, action: Callable[[], None]) -> None:
        on_worker_death(self._llm, action)

    def lost_worker(self, timeout_s: float) -> bool:
        return lost_worker(self._llm, timeout_s)

    def _hidden_of(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Tensor]]:
        read = [t.as_teacher_reads() for t in trajectories]
        for group in micro_batches([t.length for t in read], self._tokens_per_batch):
            documents = [documents_of(read[i]) for i in group]
            hidden = iter(self._hidden_of_ids([ids for pieces in documents for ids in pieces]))
            for i, pieces in zip(group, documents, strict=True):
                hidden_LG = torch.cat([next(hidden) for _ in pieces])
                columns = torch.as_tensor(eligible_columns(read[i]))
                yield trajectories[i], hidden_LG[columns].to(self._device, self._dtype)

    def _hidden_of_ids(self, sequences: Sequence[list[int]]) -> list[Tensor]:
        """Return the hidden states ``[L, G]`` of each sequence."""
        from vllm import PoolingParams

        outputs = self._thread.submit(
            self._llm.encode,
            [{"prompt_token_ids": ids} for ids in sequences],
            PoolingParams(use_activation=False),  # an activation would normalize the states
            pooling_task="token_embed",
            use_tqdm=False,
        )
        return [out.outputs.data for out in outputs.result()]


def documents_of(trajectory: Trajectory) -> list[list[int]]:
    """Return the token ids of each document; attention restarts there, so vLLM gets each as a separate sequence."""
    ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids])
    starts = [] if trajectory.documents is None else trajectory.documents
    return [piece.tolist() for piece in np.split(ids, starts)]


def eligible_columns(trajectory: Trajectory) -> np.ndarray:
    """Return the n positions that predict the targets, int64, counted from the prompt's first token."""
    offsets = np.arange(len(trajectory.response_ids))
    if trajectory.supervised is not None:
        offsets = offsets[trajectory.supervised]
    return len(trajectory.prompt_ids) - 1 + offsets


def checked_ids(settings: Settings) -> list[list[int]]:
    """Return the token ids of ``CHECKED_TEXTS``, cut so that the engine can generate one more token."""
    named = settings.teacher_model
    tokenizer = load_tokenizer(named.model, named.trust_remote_code)
    return [tokenizer.encode(text)[: settings.max_teacher_sequence - 1] for text in CHECKED_TEXTS]


def prompt_logprobs(kwargs: dict[str, Any], device: str, sequences: Sequence[list[int]]) -> Logprobs:
    """Return vLLM's log-probabilities of the likeliest tokens after each nonempty prefix of ``sequences``."""
    llm = _start(kwargs, device)
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=CHECKED_TOKENS, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
    return [
        [{token: entry.logprob for token, entry in position.items()} for position in out.prompt_logprobs[1:]]
        for out in outputs
    ]


@torch.no_grad()
def mean_gap(hidden: Sequence[Tensor], head: LMHead, expected: Logprobs) -> float:
    """Return the mean absolute difference of log_softmax(head h) and ``expected``, nats, over the expected tokens."""
    gaps = []
    for hidden_LG, positions in zip(hidden, expected, strict=True):
        rows = hidden_LG[: len(positions)].detach().to(head.device, head.dtype)
        logprobs_LV = log_softmax_(Projector(head, len(rows))(rows))
        for row, by_token in zip(logprobs_LV, positions, strict=True):
            tokens = [token for token in by_token if token < len(head)]  # the others are padding of the vocabulary
            reference = torch.tensor([by_token[token] for token in tokens], device=row.device)
            gaps.append((row[tokens] - reference).abs())
    return float(torch.cat(gaps).mean())


def check_gap(gap: float, dtype: torch.dtype, model: str) -> None:
    """Raise ModelError unless ``gap``, nats, is within the rounding of ``dtype``."""
    if not gap <= MAX_GAP[dtype]:
        raise ModelError(
            f"teacher.engine=vllm: log softmax of the LM head of {model!r} on vLLM's hidden states differs from vLLM's "
            f"prompt_logprobs by {gap:.3g} nats on average, more than {MAX_GAP[dtype]:g}; vLLM's pooling runner "
            "does not give this model's last hidden states, or its logits are more than its head's output; accepted: "
            "teacher.engine=transformers"
        )


def _llm_kwargs(settings: Settings, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return arguments of ``vllm.LLM`` for the teacher's model with any runner."""
    cfg, named, length = settings.teacher, settings.teacher_model, settings.max_teacher_sequence
    kwargs = engine_kwargs(device, length, settings.rollout.kv_cache_mib, cfg.gpu_memory, cfg.tensor_parallel)
    return kwargs | dict(
        model=resolve_path(named.model),
        dtype=str(dtype).removeprefix("torch."),
        quantization=cfg.quantization,  # None: as the checkpoint says
        load_format="safetensors",  # never a pickle
        max_model_len=length,
        max_num_batched_tokens=max(length, cfg.tokens_per_batch),
        enable_chunked_prefill=False,
        enable_prefix_caching=False,  # the states of cached tokens would be missing
        generation_config="vllm",
        seed=0,
        trust_remote_code=named.trust_remote_code,
        disable_log_stats=True,
    )


def _start(kwargs: dict[str, Any], device: str, pooling: bool = False) -> Any:
    """Start vLLM to generate or, if ``pooling``, to return hidden states.  Raises ModelError with vLLM's reason."""
    set_environment(device, setting="teacher.engine")
    from vllm import LLM
    from vllm.config import PoolerConfig

    if pooling:
        kwargs = kwargs | dict(runner="pooling", convert="embed", pooler_config=PoolerConfig(task="token_embed"))
    try:
        return LLM(**kwargs)
    except Exception as error:  # vLLM raises many kinds; each means that it cannot run this model here
        raise cannot_run(error, kwargs["model"], "teacher.engine") from error


def _in_new_process(function: Any, *arguments: Any) -> Any:
    """Return ``function(*arguments)``, computed in a new process.  Raises ModelError if that is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise ModelError(
                "teacher.engine=vllm: the process that checks the teacher was killed; check the free memory"
            ) from None
