"""The LM head, taken a few rows at a time: no ``[N, V]`` tensor of logits ever exists.

Names carry shapes: N rows, V vocabulary, H hidden size.  Logits are formed in the compute dtype of the hidden states
and reduced in float32.  Sizes in rows and elements; entropies and log-probabilities in nats.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
import torch
from torch import Tensor


LOGITS_PER_CHUNK = 20_000_000  # elements of one chunk of logits: 80 MB in float32; more for wide heads
MOST_LOGITS = 400_000_000  # on a GPU with room: larger chunks keep it busier, up to here
BYTES_PER_LOGIT = 16  # student's and teacher's in float32, a scratch, the gradient in the compute dtype
LOGITS_PER_BLOCK = 300_000  # elements that the reductions touch at once on CPU: stays in its cache


def chunk_size(rows: int, head_VH: Tensor, chunk_rows: int | None = None) -> int:
    """Rows of one chunk: ``chunk_rows``, or as many as there is room for and at least H / 8.

    Every chunk reads the head and adds to its gradient, so for a wide head a chunk of few rows would spend its time on
    memory; with H / 8 rows the logits still take an eighth of what the head itself does.
    """
    vocabulary, hidden = head_VH.shape
    return max(1, min(rows, chunk_rows or max(logits_per_chunk(head_VH.device) // vocabulary, hidden // 8)))


def logits_per_chunk(device: torch.device) -> int:
    """LOGITS_PER_CHUNK; on a GPU what an eighth of its free memory holds, if that is more."""
    return _logits_for(_free_memory(device)) if device.type == "cuda" else LOGITS_PER_CHUNK


def _logits_for(free_bytes: int) -> int:
    return min(MOST_LOGITS, max(LOGITS_PER_CHUNK, free_bytes // 8 // BYTES_PER_LOGIT))


@functools.cache  # looked at once: sums would round differently in chunks of another size
def _free_memory(device: torch.device) -> int:
    """Bytes, of the device and in the hands of its allocator."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` rows that cover ``rows``."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def blocks(logits_cV: Tensor) -> Iterator[slice]:
    """Row slices of a chunk that fit a CPU's cache; the whole chunk elsewhere."""
    on_cpu = logits_cV.device.type == "cpu"
    size = max(1, LOGITS_PER_BLOCK // logits_cV.shape[1]) if on_cpu else logits_cV.shape[0]
    for start in range(0, logits_cV.shape[0], size):
        yield slice(start, start + size)


class Projector:
    """Logits of one chunk after another in one float32 buffer: fresh ones would cost their page faults each time.

    What ``__call__`` returns is overwritten by the next call.
    """

    def __init__(self, head_VH: Tensor, size: int) -> None:
        self._head_HV = head_VH.T
        self._buffer = torch.empty(size, len(head_VH), dtype=torch.float32, device=head_VH.device)

    def __call__(self, hidden_cH: Tensor) -> Tensor:
        """float32 logits ``[c, V]``."""
        logits_cV = self._buffer[: len(hidden_cH)]
        if hidden_cH.dtype == torch.float32:
            torch.mm(hidden_cH, self._head_HV, out=logits_cV)
        else:
            logits_cV.copy_(hidden_cH @ self._head_HV)
        return logits_cV


def shift_exp(logits_bV: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts each row **in place** so that its maximum is 0; returns exp of it ``[b, V]`` and the sums of that ``[b]``.

    log softmax is then ``logits - sums.log()``.  What is returned lives in a scratch that the next call overwrites.
    """
    logits_bV.sub_(logits_bV.amax(-1, keepdim=True))
    weight = torch.exp(logits_bV, out=_scratch(logits_bV))
    return weight, weight.sum(-1)


def entropy_of(logits_BV: Tensor, rows_R: Tensor) -> Tensor:
    """``[R]``, nats: of these rows of ``logits_BV``, which stays as it is."""
    entropy_R = torch.empty(len(rows_R), dtype=torch.float32, device=logits_BV.device)
    for block in blocks(logits_BV):
        if len(rows_R[block]):
            entropy_R[block] = draw_statistics(logits_BV[rows_R[block]].float())[2]
    return entropy_R


_scratches: dict[torch.device, Tensor] = {}


def _scratch(like: Tensor) -> Tensor:
    """A float32 tensor of the shape of ``like``; one allocation a device, since fresh memory costs page faults."""
    if like.device.type != "cpu":
        return torch.empty_like(like)
    known = _scratches.get(like.device)
    if known is None or known.numel() < like.numel():
        with torch.inference_mode(False):  # it outlives this call, and may next be used outside inference mode
            known = _scratches[like.device] = torch.empty(like.numel(), device=like.device)
    return known[: like.numel()].view_as(like)


def log_softmax_(logits_bV: Tensor, entropy_b: Tensor | None = None) -> Tensor:
    """log softmax of each row, **in place**; fills ``entropy_b``, nats, if it is given."""
    weight, total = shift_exp(logits_bV)
    if entropy_b is not None:
        entropy_b.copy_(_entropy(logits_bV, weight, total))
    return logits_bV.sub_(total.log_()[:, None])


def _entropy(shifted_bV: Tensor, weight_bV: Tensor, total_b: Tensor) -> Tensor:
    """``[b]``, nats, of what ``shift_exp`` left and returned."""
    return total_b.log() - torch.linalg.vecdot(weight_bV, shifted_bV) / total_b


def draw_statistics(logits_bV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``shift_exp`` returns, and each row's entropy ``[b]``, nats; **shifts** ``logits_bV`` in place."""
    weight, total = shift_exp(logits_bV)
    return weight, total, _entropy(logits_bV, weight, total)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Of N rows, float32 ``[N]`` each, nats."""

    entropy_N: Tensor  # at the distillation temperature
    logprob_N: Tensor  # of the target, at the distillation temperature
    raw_logprob_N: Tensor  # of the target, at temperature 1: what a sampler records

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> RowStatistics:
        """To be filled, at temperature 1."""
        entropy_N, logprob_N = torch.empty(2, rows, device=device)
        return cls(entropy_N, logprob_N, logprob_N)

    def __getitem__(self, part: slice | Tensor) -> RowStatistics:
        return RowStatistics(*(values[part] for values in (self.entropy_N, self.logprob_N, self.raw_logprob_N)))


@torch.no_grad()
def row_statistics(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> RowStatistics:
    """Entropy and log-probability of ``targets_N`` in one pass over the head; nothing is kept for backward."""
    entropy_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
    raw_N = torch.empty_like(entropy_N)
    logprob_N = raw_N if temperature == 1.0 else torch.empty_like(entropy_N)
    size = chunk_size(len(hidden_NH), head_VH, chunk_rows)
    project = Projector(head_VH.to(hidden_NH.dtype), size)
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

