"""The transformers engine: ``model.generate`` with a sampler that draws each response from a seed of that response.

On the CPUs of one machine, a seed gives the same response in any batch; GPU kernels round differently in another batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.stop_texts import stop_length
from onpolicy_skd.models.heap import trim_heap
from onpolicy_skd.models.lm_head import keeps_float32_sums, project, shift_exp, shift_exp_entropy
from onpolicy_skd.models.loading import eos_token_ids, load_model, load_tokenizer, pick_device, pick_dtype
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.rollout.engine import sort_by_request
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory, id_array

STRIDE = 4  # tokens generated between two checks for complete responses
BLOCK = 512  # classes that the sampler sums at once


class TransformersEngine:
    """Engine on ``model.generate``: slower than vLLM, but it runs wherever torch does."""

    def __init__(
        self, model: str, settings: Settings, trust_remote_code: bool = False, shared: SplitModel | None = None
    ) -> None:
        """Load ``model``, or generate with ``shared``, a model that this process trains."""
        device = pick_device(settings.run.device)
        dtype = pick_dtype(settings.rollout.dtype, device)
        self.version = 0
        self._shared = shared is not None
        self._max_sequences = settings.rollout.max_sequences
        self._tokenizer = load_tokenizer(model, trust_remote_code)
        self._model = shared.model if shared else load_model(model, dtype, device, trust_remote_code).eval()
        self._eos = eos_token_ids(self._model.generation_config, self._tokenizer)
        self._autocast = torch.autocast(device, dtype=dtype, enabled=self._shared and dtype != torch.float32)
        head = self._model.get_output_embeddings()
        if type(head) is torch.nn.Linear and head.bias is None:
            if dtype != torch.float32 and keeps_float32_sums(head.weight.device):
                head.forward = partial(_project_to_float32, head, dtype)
            elif device == "cpu":
                head.forward = partial(_project, head)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if not self._shared:
            parameters = dict(self._model.named_parameters())
            with torch.no_grad():
                for name, tensor in weights:
                    parameters[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        """Do nothing: the engine holds no memory except its weights."""

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        return sort_by_request(requests, self.stream(requests, sampling))

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        for start in range(0, len(requests), self._max_sequences):
            yield from self._generate(requests[start : start + self._max_sequences], sampling)
        trim_heap()

    def _decode(self, **options: Any) -> Any:
        """Call ``model.generate`` on a model that may be in training mode."""
        training = self._model.training
        self._model.eval()
        # Not inference mode: training a shared model uses tensors that its forward caches.
        with torch.no_grad(), self._autocast, end_tokens_only(self._model):
            output = self._model.generate(**options)
        self._model.train(training)
        return output

    def new_response(self, request: RolloutRequest) -> Response:
        return Response(request)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        """Generate STRIDE tokens at a time; drop complete responses from the batch in between."""
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(r.prompt_ids) for r in requests)
        pad, device = self._tokenizer.pad_token_id, self._model.device
        ids_BL = torch.tensor([[pad] * (width - len(r.prompt_ids)) + r.prompt_ids for r in requests], device=device)
        mask_BL = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        mask_BL, cache = mask_BL.to(device), None
        running = [self.new_response(r) for r in requests]
        while running and (remaining := sampling.max_tokens - (ids_BL.shape[1] - width)):
            sampler = _Sampler([r.generator for r in running], sampling)
            out = self._decode(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                past_key_values=cache,
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=min(STRIDE, remaining), pad_token_id=pad, eos_token_id=self._eos,
                    return_dict_in_generate=True,
                ),
                logits_processor=LogitsProcessorList([sampler]),
            )  # fmt: skip
            new_BT = out.sequences[:, ids_BL.shape[1] :].cpu().numpy()
            for response, *row in zip(running, new_BT, *sampler.recorded(), strict=True):
                response.add(self._eos, *row)
                response.cut_at_stop(sampling.stop, self._text)
            yield from (r.trajectory(self.version) for r in running if r.ended)
            kept = torch.tensor([not r.ended for r in running], device=device).nonzero()[:, 0]
            ids_BL, cache = out.sequences, out.past_key_values
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(new_BT.shape)], 1)
            if len(kept) < len(running):
                running, ids_BL, mask_BL = [r for r in running if not r.ended], ids_BL[kept], mask_BL[kept]
                cache.batch_select_indices(kept)
        yield from (r.trajectory(self.version) for r in running)


class Response:
    """The response to a request so far."""

    def __init__(self, request: RolloutRequest) -> None:
        self.request = request
        self.generator = torch.Generator().manual_seed(request.seed)
        self.ended = False
        self._strides: list[tuple[np.ndarray, ...]] = []  # ids, log-probabilities and, if recorded, entropies

    def add(self, eos_token_ids: Sequence[int], *new: np.ndarray) -> None:
        """Append a stride of ids, log-probabilities and entropies; drop the padding after an end token."""
        stops = np.flatnonzero(np.isin(new[0], eos_token_ids))
        self.ended = len(stops) > 0
        self._strides.append(tuple(values[: stops[0] + 1] if self.ended else values for values in new))

    def cut_at_stop(self, stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        """End the response at the first token of the last stride after which its text contains a stop text."""
        if not stop:
            return
        before, last = self._strides[:-1], self._strides[-1]
        known = sum(len(values[0]) for values in before)
        ids = np.concatenate([values[0] for values in self._strides]).tolist()
        if (length := stop_length(ids, stop, decode, known)) is not None:
            self._strides[-1] = tuple(values[: length - known] for values in last)
            self.ended = True

    def trajectory(self, version: int) -> Trajectory:
        ids, logprobs, *entropies = (np.concatenate(values) for values in zip(*self._strides, strict=True))
        return Trajectory(
            key=self.request.key,
            prompt_ids=np.asarray(self.request.prompt_ids, dtype=np.int64),
            response_ids=ids.astype(np.int64),
            sampler_logprobs=logprobs.astype(np.float32),
            finish_reason="stop" if self.ended else "length",
            policy_version=version,
            sampler_entropy=entropies[0] if entropies else None,
            teacher_prompt_ids=id_array(self.request.teacher_prompt_ids),
            teacher=self.request.teacher,
        )


@contextmanager
def end_tokens_only(model: Any) -> Iterator[None]:
    """Hide the model's generation settings except its end tokens within the block."""
    saved = model.generation_config
    keep_end_tokens_only(model)
    try:
        yield
    finally:
        model.generation_config = saved


def keep_end_tokens_only(model: Any) -> None:
    """Drop the model's generation settings except its end tokens, since ``generate`` uses them as defaults."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=getattr(model.generation_config, "eos_token_id", None))


def _project(head: torch.nn.Linear, input: Tensor) -> Tensor:
    """Return ``input @ head.T``; for 5 to 15 rows as the transposed product, in which MKL is 1.6 times faster."""
    rows = input.shape[:-1].numel()
    if not 5 <= rows < 16:
        return torch.nn.functional.linear(input, head.weight)
    logits_VB = torch.mm(head.weight, input.reshape(rows, -1).T)
    return logits_VB.T.contiguous().view(*input.shape[:-1], -1)


def _project_to_float32(head: torch.nn.Linear, dtype: torch.dtype, input: Tensor) -> Tensor:
    """Return ``input @ head.T`` in float32 from operands in ``dtype``, as the learner computes it."""
    rows_NH = input.to(dtype).flatten(0, -2)
    logits_NV = torch.empty(len(rows_NH), len(head.weight), device=input.device)
    with torch.autocast(input.device.type, enabled=False):
        return project(rows_NH, head.weight.to(dtype).T, logits_NV).view(*input.shape[:-1], -1)


class _Sampler:
    """A logits processor that chooses each row's token by the inverse of its cumulative distribution.

    It draws a uniform number per row and step from the row's generator, records the chosen token's log-probability
    under the model at temperature 1, and masks all other tokens, so that greedy decoding picks it.
    """

    def __init__(self, generators: Sequence[torch.Generator], sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._generators = generators
        self._logprobs: list[Tensor] = []
        self._entropies: list[Tensor] = []

    def recorded(self) -> list[np.ndarray]:
        """Return log-probabilities ``[B, T]`` of the chosen tokens and, if recorded, entropies, nats."""
        kept = [self._logprobs, self._entropies] if self._sampling.entropy else [self._logprobs]
        return [torch.stack(steps, 1).cpu().numpy() for steps in kept]

    def __call__(self, _: Tensor, scores_BV: Tensor) -> Tensor:
        """Work in place: ``generate`` passes a float32 copy of the logits."""
        if self._sampling.entropy:
            weight_BV, total_B, entropy_B = shift_exp_entropy(scores_BV)
            self._entropies.append(entropy_B)
        else:
            weight_BV, total_B = shift_exp(scores_BV)
        chosen_B = scores_BV.argmax(-1) if self._sampling.temperature == 0 else self._sample(scores_BV, weight_BV)
        self._logprobs.append(scores_BV.gather(1, chosen_B[:, None])[:, 0] - total_B.log())
        return scores_BV.fill_(-torch.inf).scatter_(1, chosen_B[:, None], 0.0)

    def _sample(self, scores_BV: Tensor, weight_BV: Tensor) -> Tensor:
        sampling = self._sampling
        if sampling.temperature != 1.0:
            weight_BV = torch.exp(scores_BV / sampling.temperature)
        if sampling.top_p < 1.0:
            ordered, order = (weight_BV / weight_BV.sum(-1, keepdim=True)).sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the classes before it already fill the nucleus
            weight_BV = weight_BV.scatter(1, order, ordered.masked_fill(outside, 0.0))
        uniform_B = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])
        return sample_inverse_cdf(weight_BV, uniform_B.to(weight_BV.device))


def sample_inverse_cdf(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return ``[B]``: the class at which the cumulative sum of a row's weights (>= 0) first exceeds its uniform share.

    ``uniform_B`` is float64 in [0, 1).  Sums by blocks, then only within the block that holds the class, which is less
    work than the LM head.
    """
    rows, classes = weight_BV.shape
    full_blocks = classes // BLOCK
    blocks = weight_BV[:, : full_blocks * BLOCK].view(rows, full_blocks, BLOCK).sum(-1, dtype=torch.float64)
    rest = weight_BV[:, full_blocks * BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)
    running = torch.cat([blocks, rest], 1).cumsum(-1)
    target_B1 = (uniform_B * running[:, -1])[:, None]
    block_B1 = torch.searchsorted(running, target_B1, right=True).clamp(max=full_blocks)
    before_B1 = torch.where(block_B1 > 0, running.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    places = block_B1 * BLOCK + torch.arange(BLOCK, device=weight_BV.device)
    inside = weight_BV.gather(1, places.clamp(max=classes - 1)).double().masked_fill_(places >= classes, 0.0)
    within_B1 = torch.searchsorted(inside.cumsum(-1).add_(before_B1), target_B1, right=True)
    # Rounding may put the target past the block's sum: then take the last class that has any weight.
    last_B1 = torch.where(inside > 0, torch.arange(BLOCK, device=weight_BV.device), 0).amax(-1, keepdim=True)
    return (block_B1 * BLOCK + torch.minimum(within_B1, last_B1))[:, 0]
