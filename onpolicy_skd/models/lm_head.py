"""The LM head and its logits, a few rows at a time: no ``[N, V]`` tensor of logits ever exists.

Names carry shapes: N rows, V vocabulary, H hidden size.  Logits are products of hidden states and head in the compute
dtype, summed and reduced in float32; ``project`` says where they are rounded in between.  Sizes are in rows and
elements, entropies and log-probabilities in nats.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 20_000_000  # elements in a chunk of logits: 80 MB in float32; more for wide heads
MAX_LOGITS_PER_CHUNK = 400_000_000  # on a GPU with free memory, where larger chunks run faster
BYTES_PER_LOGIT = 16  # the student's and the teacher's in float32, scratch, and the gradient in the compute dtype
GROUP = 64  # columns per group in ``largest``, which first compares the maxima of groups
LOGITS_PER_BLOCK = 300_000  # elements that the reductions touch at once on CPU: fits its cache


@dataclass(frozen=True, slots=True)
class LMHead:
    """The last layer of a model: logits = cap tanh(scale (W h + b) / cap), or scale (W h + b) without a cap.

    Phi and GPT-J have a ``bias_V``, Cohere and Granite a ``scale``, Gemma 2 a soft ``cap``.  For models whose logits
    are W h alone, functions also accept the weight.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, head: Tensor | LMHead) -> LMHead:
        """Return ``head`` if it is an LMHead, else an LMHead with that weight."""
        return head if isinstance(head, LMHead) else cls(head)

    def __len__(self) -> int:
        return len(self.weight_VH)

    @property
    def shape(self) -> torch.Size:
        """The shape (V, H) of the weight."""
        return self.weight_VH.shape

    @property
    def device(self) -> torch.device:
        return self.weight_VH.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_VH.dtype

    def to(self, target: torch.dtype | torch.device | str) -> LMHead:
        """Return the head with its tensors in another dtype or on another device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(target)
        return dataclasses.replace(self, weight_VH=self.weight_VH.to(target), bias_V=bias_V)

    def detach(self) -> LMHead:
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return dataclasses.replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    def logits_(self, products_cV: Tensor) -> Tensor:
        """Turn W h, float32 ``[c, V]``, into logits **in place**; return them."""
        if self.bias_V is not None:
            products_cV.add_(self.bias_V)
        if self.cap is not None:
            return products_cV.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return products_cV if self.scale == 1.0 else products_cV.mul_(self.scale)

    def derivative(self, logits_cV: Tensor) -> Tensor | float:
        """Return d logits / d(W h): scale (1 - (logits / cap)^2), or scale without a cap."""
        if self.cap is None:
            return self.scale
        return torch.div(logits_cV, self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def chunk_size(rows: int, head_VH: Tensor | LMHead, chunk_rows: int | None = None) -> int:
    """Return the rows of one chunk: ``chunk_rows``, or as many as memory allows and at least H / 8.

    Every chunk reads the head and adds to its gradient, so with few rows and a wide head, memory bandwidth would limit
    the speed.  With H / 8 rows the logits still take an eighth of the head's memory.
    """
    vocabulary, hidden = head_VH.shape
    return max(1, min(rows, chunk_rows or max(logits_per_chunk(head_VH.device) // vocabulary, hidden // 8)))


def logits_per_chunk(device: torch.device) -> int:
    """Return LOGITS_PER_CHUNK; on a GPU as many as an eighth of its free memory holds, between both bounds."""
    return _logits_for(_free_memory(device)) if device.type == "cuda" else LOGITS_PER_CHUNK


def _logits_for(free_bytes: int) -> int:
    return min(MAX_LOGITS_PER_CHUNK, max(LOGITS_PER_CHUNK, free_bytes // 8 // BYTES_PER_LOGIT))


_reserved: dict[torch.device, int] = {}  # bytes


def reserve(device: torch.device, size: int) -> None:
    """Exclude ``size`` bytes of a GPU from the memory for chunks; gradients and optimizer state will need them."""
    _reserved[device] = size
    _free_memory.cache_clear()


@functools.cache  # measured once: sums in chunks of another size would round differently
def _free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the device or unused in torch's allocator, minus those of ``reserve``."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, torch.cuda.mem_get_info(device)[0] + held - _reserved.get(device, 0))


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` rows that cover ``rows``."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def blocks(logits_cV: Tensor) -> Iterator[slice]:
    """Yield row slices of a chunk that fit a CPU's cache; on other devices the whole chunk."""
    on_cpu = logits_cV.device.type == "cpu"
    size = max(1, LOGITS_PER_BLOCK // logits_cV.shape[1]) if on_cpu else logits_cV.shape[0]
    for start in range(0, logits_cV.shape[0], size):
        yield slice(start, start + size)


def project(hidden_cH: Tensor, head_HV: Tensor, out_cV: Tensor) -> Tensor:
    """Write the float32 logits of ``hidden_cH`` to ``out_cV`` and return it.

    For 16-bit inputs, the sums stay in float32 on GPUs, as in the engines there (``head_dtype`` of vLLM).  CPU products
    have no such output, so learner, teacher and engine all round the sums to the compute dtype.
    """
    if hidden_cH.dtype == torch.float32:
        return torch.mm(hidden_cH, head_HV, out=out_cV)
    if keeps_float32_sums(hidden_cH.device):
        return torch.mm(hidden_cH, head_HV, out_dtype=torch.float32, out=out_cV)
    return out_cV.copy_(hidden_cH @ head_HV)


def keeps_float32_sums(device: torch.device) -> bool:
    """Return True if products of 16-bit dtypes can have a float32 output on ``device``."""
    return device.type == "cuda"


class Projector:
    """Projection of one chunk after another into one float32 buffer, which avoids page faults of new memory.

    Each call overwrites the result of the previous one.
    """

    def __init__(self, head: Tensor | LMHead, size: int) -> None:
        self._head = LMHead.of(head)
        self._head_HV = self._head.weight_VH.T
        self._buffer = torch.empty(size, len(head), dtype=torch.float32, device=head.device)

    def __call__(self, hidden_cH: Tensor) -> Tensor:
        """Return float32 logits ``[c, V]``."""
        return self._head.logits_(project(hidden_cH, self._head_HV, self._buffer[: len(hidden_cH)]))


def shift_exp(logits_bV: Tensor) -> tuple[Tensor, Tensor]:
    """Shift each row **in place** so that its maximum is 0; return its exponential ``[b, V]`` and the row sums ``[b]``.

    Log softmax is then ``logits - sums.log()``.  The exponential is in a scratch buffer that the next call overwrites.
    """
    logits_bV.sub_(logits_bV.amax(-1, keepdim=True))
    weight = torch.exp(logits_bV, out=_scratch(logits_bV))
    return weight, weight.sum(-1)


def shift_exp_entropy(logits_bV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``shift_exp`` returns and each row's entropy ``[b]``, nats; **shift** ``logits_bV`` in place."""
    weight, total = shift_exp(logits_bV)
    return weight, total, _entropy(logits_bV, weight, total)


def entropy_of(logits_BV: Tensor, rows_R: Tensor) -> Tensor:
    """Return the entropy ``[R]``, nats, of the rows ``rows_R`` of ``logits_BV``, which is not changed."""
    entropy_R = torch.empty(len(rows_R), dtype=torch.float32, device=logits_BV.device)
    for block in blocks(logits_BV):
        if len(rows_R[block]):
            entropy_R[block] = shift_exp_entropy(logits_BV[rows_R[block]].float())[2]
    return entropy_R


def largest(values_bV: Tensor, k: int) -> torch.return_types.topk:
    """Return the ``k`` largest values of each row ``[b, k]``, descending, and their indices, as ``topk`` does.

    The k largest lie in the k groups of columns with the largest maxima: one cheap pass replaces most of the sorting.
    """
    width = values_bV.shape[1]
    groups = width // GROUP
    if groups <= k:
        return values_bV.topk(k)
    maxima_bG = values_bV[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1)  # a group: every groups-th column
    columns = torch.arange(0, groups * GROUP, groups, device=values_bV.device)
    candidates = (maxima_bG.topk(k).indices[:, :, None] + columns).flatten(1)
    rest = torch.arange(groups * GROUP, width, device=values_bV.device).expand(len(values_bV), -1)
    candidates = torch.cat([candidates, rest], 1)
    top = values_bV.gather(1, candidates).topk(k)
    return torch.return_types.topk((top.values, candidates.gather(1, top.indices)))


_scratches: dict[torch.device, Tensor] = {}


def _scratch(like: Tensor) -> Tensor:
    """Return a float32 tensor of the shape of ``like``; on CPU a reused one, to avoid page faults."""
    if like.device.type != "cpu":
        return torch.empty_like(like)
    scratch = _scratches.get(like.device)
    if scratch is None or scratch.numel() < like.numel():
        with torch.inference_mode(False):  # it outlives this call and may be used outside inference mode later
            scratch = _scratches[like.device] = torch.empty(like.numel(), device=like.device)
    return scratch[: like.numel()].view_as(like)


def log_softmax_(logits_bV: Tensor, entropy_b: Tensor | None = None) -> Tensor:
    """Return log softmax of each row, computed **in place**; write the entropies, nats, to ``entropy_b`` if given."""
    weight, total = shift_exp(logits_bV)
    if entropy_b is not None:
        entropy_b.copy_(_entropy(logits_bV, weight, total))
    return logits_bV.sub_(total.log_()[:, None])


def _entropy(shifted_bV: Tensor, weight_bV: Tensor, total_b: Tensor) -> Tensor:
    """Return entropies ``[b]``, nats, from the shifted logits, their exponential and its sums."""
    return total_b.log() - torch.linalg.vecdot(weight_bV, shifted_bV) / total_b


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Entropies and log-probabilities of N rows, float32 ``[N]`` each, nats."""

    entropy_N: Tensor  # at the distillation temperature
    logprob_N: Tensor  # of the target, at the distillation temperature
    raw_logprob_N: Tensor  # of the target, at temperature 1: what a sampler records

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> RowStatistics:
        """Return uninitialized statistics for temperature 1, where both log-probabilities share one tensor."""
        entropy_N, logprob_N = torch.empty(2, rows, device=device)
        return cls(entropy_N, logprob_N, logprob_N)

    def __getitem__(self, rows: slice | Tensor) -> RowStatistics:
        return RowStatistics(*(values[rows] for values in (self.entropy_N, self.logprob_N, self.raw_logprob_N)))


@torch.no_grad()
def row_statistics(
    hidden_NH: Tensor,
    head: Tensor | LMHead,
    targets_N: Tensor,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> RowStatistics:
    """Compute entropies and log-probabilities of ``targets_N`` in one pass over the head, without gradient."""
    entropy_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
    raw_N = torch.empty_like(entropy_N)
    logprob_N = raw_N if temperature == 1.0 else torch.empty_like(entropy_N)
    size = chunk_size(len(hidden_NH), head, chunk_rows)
    project = Projector(head.to(hidden_NH.dtype), size)
    for rows in chunks(len(hidden_NH), size):
        logits_cV = project(hidden_NH[rows])
        for block in blocks(logits_cV):
            logits, targets_b = logits_cV[block], targets_N[rows][block, None]
            weight, total = shift_exp(logits)
            raw_N[rows][block] = logits.gather(1, targets_b)[:, 0] - total.log()
            if temperature != 1.0:
                weight, total = shift_exp(logits.div_(temperature))
                logprob_N[rows][block] = logits.gather(1, targets_b)[:, 0] - total.log()
            entropy_N[rows][block] = _entropy(logits, weight, total)
    return RowStatistics(entropy_N, logprob_N, raw_N)
