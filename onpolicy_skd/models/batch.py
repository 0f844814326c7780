"""Padded and packed micro-batches of trajectories, and how the trajectories of a step are divided into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from onpolicy_skd.types import Trajectory


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded micro-batch of B sequences with N eligible positions in total, ordered by sequence, then by time."""

    input_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # int64 [B, L]
    position_ids: torch.Tensor  # int64 [B, L]; counted from each document's start
    rows: torch.Tensor  # int64 [N]; row of each eligible position
    columns: torch.Tensor  # int64 [N]; its column: the token *before* its target
    targets: torch.Tensor  # int64 [N]; y_t
    counts: list[int]  # eligible positions of each sequence; sums to N
    right_padded: bool = False  # padded on the right and one document per row, so that the causal mask alone suffices
    cu_seq_lens: torch.Tensor | None = None  # int32; document starts in the flattened rows (padding is one), and B * L
    max_length: int = 0  # tokens of the longest document

    def eligible(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """Return the hidden states at the eligible positions ``[N, H]``."""
        return hidden_BLH[self.rows, self.columns]

    def document_mask(self) -> torch.Tensor:
        """Return the causal mask within documents, bool ``[B, 1, L, L]``: query attends to key."""
        assert self.cu_seq_lens is not None
        lengths, (rows, length) = self.cu_seq_lens.diff(), self.input_ids.shape
        document_T = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        document_BL = document_T.view(rows, length)
        return (document_BL[:, None, :, None] == document_BL[:, None, None, :]).tril()


def collate(
    trajectories: Sequence[Trajectory],
    pad_id: int,
    device: torch.device | str = "cpu",
    padding_side: Literal["right", "left"] = "right",
    packed: bool = False,
) -> Batch:
    """Pad ``trajectories`` to the longest or, with ``packed``, put several into a row, as separate documents.

    Raises ValueError if one has no response or no prompt.
    """
    length = max(t.length for t in trajectories)
    if packed:
        places = first_fit([t.length for t in trajectories], length)
    else:
        places = [(i, 0 if padding_side == "right" else length - t.length) for i, t in enumerate(trajectories)]
    ids = np.full((1 + max(row for row, _ in places), length), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    positions = np.zeros_like(ids)
    document = np.zeros_like(ids)  # number of the document that each token belongs to; 0: padding
    documents = 0
    rows, columns, targets = [], [], []
    for (row, start), t in zip(places, trajectories, strict=True):
        if not len(t.target_ids) or not len(t.prompt_ids):
            raise ValueError(f"trajectory {t.key}: needs at least one prompt and one response token")
        ids[row, start : start + t.length] = np.concatenate([t.prompt_ids, t.response_ids])
        mask[row, start : start + t.length] = 1
        for begin in [0, *(() if t.documents is None else t.documents)]:
            documents += 1
            document[row, start + begin : start + t.length] = documents
        positions[row, start : start + t.length] = _restarting(document[row, start : start + t.length])
        first = start + len(t.prompt_ids) - 1  # the last prompt token predicts y_1
        offsets = np.arange(len(t.response_ids)) if t.supervised is None else np.flatnonzero(t.supervised)
        rows.append(np.full(len(offsets), row))
        columns.append(first + offsets)
        targets.append(t.target_ids)
    padded = (torch.as_tensor(a, device=device) for a in (ids, mask, positions))
    flat = (torch.as_tensor(np.concatenate(a), device=device) for a in (rows, columns, targets))
    counts = [len(t.target_ids) for t in trajectories]
    if documents == len(ids):
        return Batch(*padded, *flat, counts=counts, right_padded=padding_side == "right")
    bounds = np.append(np.flatnonzero(np.diff(document, prepend=-1)), ids.size)
    cu_seq_lens = torch.as_tensor(bounds, dtype=torch.int32, device=device)
    return Batch(*padded, *flat, counts=counts, cu_seq_lens=cu_seq_lens, max_length=int(np.diff(bounds).max()))


def first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Return row and start of each of ``lengths`` in rows of ``width``: the first row with space, or a new one."""
    filled: list[int] = []
    places = []
    for length in lengths:
        row = next((i for i, used in enumerate(filled) if used + length <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        places.append((row, filled[row]))
        filled[row] += length
    return places


def _restarting(document_L: np.ndarray) -> np.ndarray:
    """Return positions that restart at 0 in each document."""
    places = np.arange(len(document_L))
    starts = np.where(np.diff(document_L, prepend=-1) != 0, places, 0)
    return places - np.maximum.accumulate(starts)


def micro_batches(lengths: Sequence[int], token_budget: int, packed: bool = False) -> list[list[int]]:
    """Group the indices of ``lengths``, longest first, into at most ``token_budget`` tokens each, padding included.

    Sorting by length keeps padding small; the longest group comes first so that memory peaks at the start.
    A single sequence over the budget is a group by itself.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and _tokens([lengths[i] for i in [*groups[-1], index]], packed) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _tokens(lengths: Sequence[int], packed: bool) -> int:
    """Return the tokens, padding included, of a batch of ``lengths``, longest first.

    If packed, rows are counted up to that of the last sequence; earlier rows passed when they were opened.
    """
    return lengths[0] * (1 + first_fit(lengths, lengths[0])[-1][0] if packed else len(lengths))


def balance_by_tokens(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Divide the indices of ``lengths``, longest first, each to the share with the fewest tokens so far.

    Indices ascend within a share; a share is empty if there are more shares than lengths.
    """
    divided: list[list[int]] = [[] for _ in range(shares)]
    tokens = [0] * shares
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        share = tokens.index(min(tokens))
        divided[share].append(index)
        tokens[share] += lengths[index]
    return [sorted(share) for share in divided]
