"""Rollout engines: token ids in, trajectories out.  One interface, two engines: vLLM and transformers.

A request carries its own seed, so that it yields the same response in any batch and on any actor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config import Settings
from onpolicy_skd.models import end_ids, load_model, load_tokenizer, pick_device, pick_dtype
from onpolicy_skd.trajectory import RolloutRequest, Sampling, Trajectory


class RolloutEngine(Protocol):
    """Generates with the weights of ``version``."""

    version: int

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
        """One trajectory per request, in their order; log-probabilities are the unmodified model's, temperature 1."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights by those of a transformers checkpoint's names and drops every cache of the old ones."""
        ...


def build_engine(model: str, settings: Settings, trust_remote_code: bool = False) -> RolloutEngine:
    """The engine that ``rollout.engine`` asks for, with the weights of ``model``.  Raises ModelError."""
    if settings.rollout.engine == "vllm":
        from onpolicy_skd.vllm_engine import VLLMEngine  # vLLM is an optional part and slow to import

        return VLLMEngine(model, settings, trust_remote_code)
    return TransformersEngine(model, settings, trust_remote_code)


class TransformersEngine:
    """``model.generate`` with our own sampling: slower than vLLM, runs wherever torch does."""

    def __init__(self, model: str, settings: Settings, trust_remote_code: bool = False) -> None:
        device = pick_device(settings.run.device)
        self.version = 0
        self._max_sequences = settings.rollout.max_sequences
        self._tokenizer = load_tokenizer(model, trust_remote_code)
        self._model = load_model(model, pick_dtype(settings.rollout.dtype, device), device, trust_remote_code).eval()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
        self.version = version

    @torch.inference_mode()
    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
        trajectories: list[Trajectory] = []
        for start in range(0, len(requests), self._max_sequences):
            trajectories += self._generate(requests[start : start + self._max_sequences], sampling)
        return trajectories

    def _generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(r.prompt_ids) for r in requests)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(r.prompt_ids)) + r.prompt_ids for r in requests])
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        sampler = _Sampler(requests, sampling)
        ends = end_ids(self._model.generation_config, self._tokenizer)
        out = self._model.generate(
            input_ids=ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=GenerationConfig(  # a fresh one: nothing is inherited from the model's own
                do_sample=False, max_new_tokens=sampling.max_tokens, pad_token_id=pad, eos_token_id=ends
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
        responses = out[:, width:].cpu().numpy()
        logprobs = torch.stack(sampler.logprobs, 1).cpu().numpy()
        return [self._trajectory(*row, ends) for row in zip(requests, responses, logprobs, strict=True)]

    def _trajectory(self, request: RolloutRequest, ids: np.ndarray, logprobs: np.ndarray, ends: list[int]):
        stops = np.flatnonzero(np.isin(ids, ends))
        length = int(stops[0]) + 1 if len(stops) else len(ids)
        return Trajectory(
            key=request.key,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            response_ids=ids[:length].astype(np.int64),
            sampler_logprobs=logprobs[:length].astype(np.float32),
            finish="stop" if len(stops) else "length",
            policy_version=self.version,
        )


class _Sampler:
    """A logits processor that chooses each row's token itself, by the inverse of its cumulative distribution.

    It draws one uniform number per row and step from the row's own generator, records the chosen token's
    log-probability under the unmodified model, and leaves greedy decoding only that token to pick.  One softmax and
    one cumulative sum: cheaper than the LM head before it.
    """

    def __init__(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        self.logprobs: list[Tensor] = []

    def __call__(self, _: Tensor, scores_BV: Tensor) -> Tensor:
        log_q = torch.log_softmax(scores_BV.float(), -1)
        chosen = log_q.argmax(-1) if self._sampling.temperature == 0 else self._draw(log_q)
        self.logprobs.append(log_q.gather(1, chosen[:, None])[:, 0])
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _draw(self, log_q: Tensor) -> Tensor:
        own = self._sampling
        q = log_q.exp() if own.temperature == 1.0 else torch.softmax(log_q / own.temperature, -1)
        if own.top_p < 1.0:
            ordered, order = q.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= own.top_p  # the mass before a token already fills the nucleus
            q = q.scatter(1, order, ordered.masked_fill(outside, 0.0))
        cumulative = q.cumsum(-1, dtype=torch.float64)
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])
        target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=q.shape[-1] - 1)
