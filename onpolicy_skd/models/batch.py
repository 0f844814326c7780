"""Padded and packed micro-batches of trajectories, and how a step is cut into them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
import numpy as np
import torch
from onpolicy_skd.types import Trajectory



@dataclass(frozen=True, slots=True)
class Batch:
    """A padded micro-batch of B sequences with N eligible positions in all, ordered by sequence, then by time."""

    input_ids: torch.Tensor  # int64 [B, L]
    attention_mask: torch.Tensor  # int64 [B, L]; with documents bool [B, 1, L, L]: who looks at whom
    position_ids: torch.Tensor  # int64 [B, L]; counted from each document's start
    rows: torch.Tensor  # int64 [N]; sequence of each eligible position
    columns: torch.Tensor  # int64 [N]; its column: the token *before* its target
    targets: torch.Tensor  # int64 [N]; y_t
    counts: list[int]  # eligible positions of each sequence; sums to N

    def eligible(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """``[N, H]``: the hidden states at the eligible positions."""
        return hidden_BLH[self.rows, self.columns]


def collate(
    trajectories: Sequence[Trajectory],
    pad_id: int,
    device: torch.device | str = "cpu",
    padding_side: Literal["right", "left"] = "right",
    packed: bool = False,
) -> Batch:
    """Pads ``trajectories`` to the longest or, ``packed``, puts several in a row, kept apart by the attention mask.

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
    document = np.zeros_like(ids)  # which of its row's documents a token belongs to
    documents = 0
    rows, columns, targets = [], [], []
    for (row, start), t in zip(places, trajectories, strict=True):
        if not len(t.response_ids) or not len(t.prompt_ids):
            raise ValueError(f"trajectory {t.key}: needs at least one prompt and one response token")
        ids[row, start : start + t.length] = np.concatenate([t.prompt_ids, t.response_ids])
        mask[row, start : start + t.length] = 1
        first_one = [0] if start and packed else []
        for begin in [*first_one, *(() if t.documents is None else t.documents)]:
            documents += 1
            document[row, start + begin : start + t.length] = documents
        positions[row, start : start + t.length] = _restarting(document[row, start : start + t.length])
        first = start + len(t.prompt_ids) - 1  # the last prompt token predicts y_1
        rows.append(np.full(len(t.response_ids), row))
        columns.append(np.arange(first, first + len(t.response_ids)))
        targets.append(t.response_ids)
    if document.any():
        together = (document[:, None, :, None] == document[:, None, None, :]) & mask[:, None, None, :].astype(bool)
        mask = (together & np.tri(length, dtype=bool)) | np.eye(length, dtype=bool)  # padding sees itself alone
    moved = (torch.as_tensor(a, device=device) for a in (ids, mask, positions))
    flat = (torch.as_tensor(np.concatenate(a), device=device) for a in (rows, columns, targets))
    return Batch(*moved, *flat, counts=[len(t.response_ids) for t in trajectories])


def first_fit(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Row and start of each of ``lengths`` in rows of ``width``: the first row that has room, or a new one."""
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
    """0, 1, 2, ... from the start of each document."""
    places = np.arange(len(document_L))
    starts = np.where(np.diff(document_L, prepend=-1) != 0, places, 0)
    return places - np.maximum.accumulate(starts)


def micro_batches(lengths: Sequence[int], token_budget: int, packed: bool = False) -> list[list[int]]:
    """Indices of ``lengths`` cut into groups of at most ``token_budget`` tokens, padding included, longest first.

    Sorting by length keeps padding small; the longest group comes first so that memory peaks at the start.
    A single sequence over the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and _tokens([lengths[i] for i in [*groups[-1], index]], packed) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _tokens(lengths: Sequence[int], packed: bool) -> int:
    """Of a batch of such sequences, the longest first, with its padding."""
    return lengths[0] * (1 + first_fit(lengths, lengths[0])[-1][0] if packed else len(lengths))


def balance_by_tokens(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of ``lengths`` dealt to so many hands, longest first, each to the hand with the fewest tokens so far.

    Ascending within a hand; a hand is empty if there are more hands than lengths.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        hand = tokens.index(min(tokens))
        dealt[hand].append(index)
        tokens[hand] += lengths[index]
    return [sorted(hand) for hand in dealt]

