"""Rollout engines: token ids in, trajectories out.  One interface, two engines: vLLM and transformers.

A request carries its own seed, so that it yields the same response in any batch and on any actor.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config import Settings
from onpolicy_skd.lm_head import draw_statistics, shift_exp
from onpolicy_skd.models import SplitModel, end_ids, load_model, load_tokenizer, pick_device, pick_dtype
from onpolicy_skd.trajectory import RolloutRequest, Sampling, Trajectory

LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
BLOCK = 512  # classes that the sampler sums at once


class RolloutEngine(Protocol):
    """Generates with the weights of ``version``."""

    version: int

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
        """One trajectory per request, in their order; log-probabilities are the unmodified model's, temperature 1."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights by those of a transformers checkpoint's names and drops every cache of the old ones."""
        ...

    def sleep(self) -> None:
        """Gives back what memory it can until the next weights, without which it may not generate any more."""
        ...


def build_engine(model: str, settings: Settings, trust_remote_code: bool = False) -> RolloutEngine:
    """The engine that ``rollout.engine`` asks for, with the weights of ``model``.  Raises ModelError."""
    if settings.rollout.engine == "vllm":
        from onpolicy_skd.vllm_engine import VLLMEngine  # vLLM is an optional part and slow to import

        return VLLMEngine(model, settings, trust_remote_code)
    return TransformersEngine(model, settings, trust_remote_code)


class TransformersEngine:
    """``model.generate`` with our own sampling: slower than vLLM, runs wherever torch does."""

    def __init__(
        self, model: str, settings: Settings, trust_remote_code: bool = False, shared: SplitModel | None = None
    ) -> None:
        """``shared``: a model that is trained in this process; the engine then has no weights of its own."""
        device = pick_device(settings.run.device)
        dtype = pick_dtype(settings.rollout.dtype, device)
        self.version = 0
        self._shared = shared is not None
        self._max_sequences = settings.rollout.max_sequences
        self._tokenizer = load_tokenizer(model, trust_remote_code)
        self._model = shared.model if shared else load_model(model, dtype, device, trust_remote_code).eval()
        self._coarse = torch.autocast(device, dtype=dtype, enabled=self._shared and dtype != torch.float32)
        head = self._model.get_output_embeddings()
        if device == "cpu" and type(head) is torch.nn.Linear and head.bias is None:
            head.forward = partial(_project, head)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if not self._shared:
            own = dict(self._model.named_parameters())
            with torch.no_grad():
                for name, tensor in weights:
                    own[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        """Nothing to give back: it holds its weights alone."""

    @torch.no_grad()  # not inference mode: what a shared model caches must serve its training too
    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
        trajectories: list[Trajectory] = []
        trains = self._model.training
        self._model.eval()
        with self._coarse:
            for start in range(0, len(requests), self._max_sequences):
                trajectories += self._generate(requests[start : start + self._max_sequences], sampling)
        self._model.train(trains)
        give_back_memory()
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
        entropies = torch.stack(sampler.entropies, 1).cpu().numpy() if sampling.entropy else [None] * len(requests)
        rows = zip(requests, responses, logprobs, entropies, strict=True)
        return [self._trajectory(*row, ends) for row in rows]

    def _trajectory(
        self,
        request: RolloutRequest,
        ids: np.ndarray,
        logprobs: np.ndarray,
        entropy: np.ndarray | None,
        ends: list[int],
    ) -> Trajectory:
        stops = np.flatnonzero(np.isin(ids, ends))
        length = int(stops[0]) + 1 if len(stops) else len(ids)
        return Trajectory(
            key=request.key,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int64),
            response_ids=ids[:length].astype(np.int64),
            sampler_logprobs=logprobs[:length].astype(np.float32),
            finish="stop" if len(stops) else "length",
            policy_version=self.version,
            sampler_entropy=None if entropy is None else entropy[:length],
        )


def give_back_memory() -> None:
    """Returns to the system what glibc keeps of the holes between many sizes of logits and caches."""
    if LIBC is not None:
        LIBC.malloc_trim(0)


def _project(head: torch.nn.Linear, input: Tensor) -> Tensor:
    """``input @ head.T``: for 5 to 15 rows MKL takes 1.6 times as long for this as for its transpose."""
    rows = input.shape[:-1].numel()
    if not 5 <= rows < 16:
        return torch.nn.functional.linear(input, head.weight)
    logits_VB = torch.mm(head.weight, input.reshape(rows, -1).T)
    return logits_VB.T.contiguous().view(*input.shape[:-1], -1)


class _Sampler:
    """A logits processor that chooses each row's token itself, by the inverse of its cumulative distribution.

    It draws one uniform number per row and step from the row's own generator, records the chosen token's
    log-probability under the unmodified model, and leaves greedy decoding only that token to pick.
    """

    def __init__(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator().manual_seed(r.seed) for r in requests]
        self.logprobs: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def __call__(self, _: Tensor, scores_BV: Tensor) -> Tensor:
        """Works in place: ``generate`` hands over a float32 copy of the logits."""
        if self._sampling.entropy:
            weight_BV, total_B, entropy_B = draw_statistics(scores_BV)
            self.entropies.append(entropy_B)
        else:
            weight_BV, total_B = shift_exp(scores_BV)
        chosen_B = scores_BV.argmax(-1) if self._sampling.temperature == 0 else self._draw(scores_BV, weight_BV)
        self.logprobs.append(scores_BV.gather(1, chosen_B[:, None])[:, 0] - total_B.log())
        return scores_BV.fill_(-torch.inf).scatter_(1, chosen_B[:, None], 0.0)

    def _draw(self, scores_BV: Tensor, weight_BV: Tensor) -> Tensor:
        own = self._sampling
        if own.temperature != 1.0:
            weight_BV = torch.exp(scores_BV / own.temperature)
        if own.top_p < 1.0:
            ordered, order = (weight_BV / weight_BV.sum(-1, keepdim=True)).sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= own.top_p  # the mass before a token already fills the nucleus
            weight_BV = weight_BV.scatter(1, order, ordered.masked_fill(outside, 0.0))
        uniform_B = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])
        return inverse_cdf(weight_BV, uniform_B.to(weight_BV.device))


def inverse_cdf(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """``[B]``: of each row the class at which the running sum of its weights (>= 0) first exceeds that share of them.

    ``uniform_B`` is float64 in [0, 1).  Sums by blocks, and looks closely only at the block that holds the class:
    less work than the LM head before it.
    """
    rows, classes = weight_BV.shape
    whole = classes // BLOCK
    blocks = weight_BV[:, : whole * BLOCK].view(rows, whole, BLOCK).sum(-1, dtype=torch.float64)
    rest = weight_BV[:, whole * BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)
    running = torch.cat([blocks, rest], 1).cumsum(-1)
    target_B1 = (uniform_B * running[:, -1])[:, None]
    block_B1 = torch.searchsorted(running, target_B1, right=True).clamp(max=whole)
    before_B1 = torch.where(block_B1 > 0, running.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    places = block_B1 * BLOCK + torch.arange(BLOCK, device=weight_BV.device)
    inside = weight_BV.gather(1, places.clamp(max=classes - 1)).double().masked_fill_(places >= classes, 0.0)
    found_B1 = torch.searchsorted(inside.cumsum(-1).add_(before_B1), target_B1, right=True)
    # Rounding may put the target past the block's sum: then it is the last class that has any weight.
    last_B1 = torch.where(inside > 0, torch.arange(BLOCK, device=weight_BV.device), 0).amax(-1, keepdim=True)
    return (block_B1 * BLOCK + torch.minimum(found_B1, last_B1))[:, 0]
