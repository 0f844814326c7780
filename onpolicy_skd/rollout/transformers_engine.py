"""Rollout engines: token ids in, trajectories out.  One interface, two engines: vLLM and transformers.

A request carries its own seed, so that it yields the same response in any batch and on any actor.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.lm_head import shift_exp, shift_exp_entropy
from onpolicy_skd.models.loading import eos_token_ids, load_model, load_tokenizer, pick_device, pick_dtype
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.rollout.engine import sort_by_request
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
STRETCH = 4  # tokens of each response between two looks at which have ended
BLOCK = 512  # classes that the sampler sums at once


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
        self._ends = eos_token_ids(self._model.generation_config, self._tokenizer)
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

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        return sort_by_request(requests, self.stream(requests, sampling))

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        for start in range(0, len(requests), self._max_sequences):
            yield from self._generate(requests[start : start + self._max_sequences], sampling)
        give_back_memory()

    def _decode(self, **options: Any) -> Any:
        """``model.generate`` of a model that may be training."""
        trains = self._model.training
        self._model.eval()
        with torch.no_grad(), self._coarse:  # not inference mode: what a shared model caches serves its training too
            found = self._model.generate(**options)
        self._model.train(trains)
        return found

    def start(self, request: RolloutRequest) -> Response:
        """What the tokens drawn for ``request`` will be added to."""
        return Response(request)

    def _generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        """A stretch of tokens at a time; responses that have ended are left out of the next."""
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(r.prompt_ids) for r in requests)
        pad, device = self._tokenizer.pad_token_id, self._model.device
        ids_BL = torch.tensor([[pad] * (width - len(r.prompt_ids)) + r.prompt_ids for r in requests], device=device)
        mask_BL = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        mask_BL, cache = mask_BL.to(device), None
        going = [self.start(r) for r in requests]
        while going and (left := sampling.max_tokens - (ids_BL.shape[1] - width)):
            sampler = _Sampler([r.generator for r in going], sampling)
            out = self._decode(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                past_key_values=cache,
                generation_config=GenerationConfig(  # a fresh one: nothing is inherited from the model's own
                    do_sample=False, max_new_tokens=min(STRETCH, left), pad_token_id=pad, eos_token_id=self._ends,
                    return_dict_in_generate=True,
                ),
                logits_processor=LogitsProcessorList([sampler]),
            )  # fmt: skip
            drawn_BT = out.sequences[:, ids_BL.shape[1] :].cpu().numpy()
            for response, *row in zip(going, drawn_BT, *sampler.recorded(), strict=True):
                response.add(self._ends, *row)
            yield from (r.trajectory(self.version) for r in going if r.ended)
            on = torch.tensor([not r.ended for r in going], device=device).nonzero()[:, 0]
            ids_BL, cache = out.sequences, out.past_key_values
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(drawn_BT.shape)], 1)
            if len(on) < len(going):
                going, ids_BL, mask_BL = [r for r in going if not r.ended], ids_BL[on], mask_BL[on]
                cache.batch_select_indices(on)
        yield from (r.trajectory(self.version) for r in going)


class Response:
    """What was drawn for a request so far."""

    def __init__(self, request: RolloutRequest) -> None:
        self.request = request
        self.generator = torch.Generator().manual_seed(request.seed)
        self.ended = False
        self._parts: list[tuple[np.ndarray, ...]] = []  # ids, log-probabilities and, if recorded, entropies

    def add(self, ends: Sequence[int], *drawn: np.ndarray) -> None:
        """Another stretch; what follows an end is padding."""
        stops = np.flatnonzero(np.isin(drawn[0], ends))
        self.ended = len(stops) > 0
        self._parts.append(tuple(part[: stops[0] + 1] if self.ended else part for part in drawn))

    def trajectory(self, version: int) -> Trajectory:
        ids, logprobs, *entropies = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        return Trajectory(
            key=self.request.key,
            prompt_ids=np.asarray(self.request.prompt_ids, dtype=np.int64),
            response_ids=ids.astype(np.int64),
            sampler_logprobs=logprobs.astype(np.float32),
            finish_reason="stop" if self.ended else "length",
            policy_version=version,
            sampler_entropy=entropies[0] if entropies else None,
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

    def __init__(self, generators: Sequence[torch.Generator], sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._generators = generators
        self._logprobs: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def recorded(self) -> list[np.ndarray]:
        """Log-probabilities ``[B, T]`` of what was drawn and, if the sampling asks for them, entropies, nats."""
        kept = [self._logprobs, self._entropies] if self._sampling.entropy else [self._logprobs]
        return [torch.stack(steps, 1).cpu().numpy() for steps in kept]

    def __call__(self, _: Tensor, scores_BV: Tensor) -> Tensor:
        """Works in place: ``generate`` hands over a float32 copy of the logits."""
        if self._sampling.entropy:
            weight_BV, total_B, entropy_B = shift_exp_entropy(scores_BV)
            self._entropies.append(entropy_B)
        else:
            weight_BV, total_B = shift_exp(scores_BV)
        chosen_B = scores_BV.argmax(-1) if self._sampling.temperature == 0 else self._draw(scores_BV, weight_BV)
        self._logprobs.append(scores_BV.gather(1, chosen_B[:, None])[:, 0] - total_B.log())
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
        return sample_inverse_cdf(weight_BV, uniform_B.to(weight_BV.device))


def sample_inverse_cdf(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
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
