"""The LM head, taken a few rows at a time: no ``[N, V]`` tensor of logits ever exists.

Names carry shapes: N rows, V vocabulary, H hidden size.  Logits are formed in the compute dtype of the hidden states
and reduced in float32.  Sizes in rows and elements; entropies and log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 20_000_000  # elements of one chunk of logits: 80 MB in float32
LOGITS_PER_BLOCK = 600_000  # elements that the reductions touch at once on CPU: stays in its cache


def chunks(rows: int, vocabulary: int, chunk_rows: int | None = None) -> Iterator[slice]:
    """Row slices that cover ``rows``, each of ``chunk_rows`` or as many as LOGITS_PER_CHUNK allows."""
    size = chunk_rows or max(1, LOGITS_PER_CHUNK // vocabulary)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def blocks(logits_cV: Tensor) -> Iterator[slice]:
    """Row slices of a chunk that fit a CPU's cache; the whole chunk elsewhere."""
    on_cpu = logits_cV.device.type == "cpu"
    size = max(1, LOGITS_PER_BLOCK // logits_cV.shape[1]) if on_cpu else logits_cV.shape[0]
    for start in range(0, logits_cV.shape[0], size):
        yield slice(start, start + size)


def project(hidden_cH: Tensor, head_VH: Tensor, temperature: float = 1.0) -> Tensor:
    """float32 logits ``[c, V]`` over the temperature."""
    logits_cV = (hidden_cH @ head_VH.T).float()
    return logits_cV if temperature == 1.0 else logits_cV.div_(temperature)


@torch.no_grad()
def row_statistics(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy at ``temperature`` and log-probability of ``targets_N`` at temperature 1, both float32 ``[N]``, nats.

    One pass over the head for both; nothing is kept for backward.
    """
    entropy_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
    logprob_N = torch.empty_like(entropy_N)
    head_VH = head_VH.to(hidden_NH.dtype)
    for rows in chunks(len(hidden_NH), len(head_VH), chunk_rows):
        logits_cV = project(hidden_NH[rows], head_VH)
        entropy_c, logprob_c = entropy_N[rows], logprob_N[rows]
        for block in blocks(logits_cV):
            log_q = torch.log_softmax(logits_cV[block], -1)
            logprob_c[block] = log_q.gather(1, targets_N[rows][block, None])[:, 0]
            if temperature != 1.0:
                log_q = torch.log_softmax(log_q.div_(temperature), -1)
            entropy_c[block] = -torch.linalg.vecdot(log_q.exp(), log_q)
    return entropy_N, logprob_N
