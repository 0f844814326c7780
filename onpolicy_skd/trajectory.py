"""The few typed records that travel between rollout, teacher, learner and driver, and how they become a batch.

Notation (docs/method.md): a trajectory is prompt ids followed by response ids ``y_1..y_n``.  Position t predicts
``y_t``; the **eligible positions** are exactly the n positions whose target is a response token.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, or a stretch of packed text, which asks for nothing and is its own response."""

    key: str  # names the data row, the same in every run
    token_ids: list[int]
    question: str
    answer: str  # reference answer, in GSM8K's format for GSM8K-like data
    documents: np.ndarray | None = None  # packed text: as in Trajectory; its tokens are all in token_ids


@dataclass(frozen=True, slots=True)
class Trajectory:
    key: str  # "PROMPT KEY/SAMPLE", unique within a step
    prompt_ids: np.ndarray  # int64 [prompt tokens]
    response_ids: np.ndarray  # int64 [n]; ends with the end-of-sequence token if one was produced
    sampler_logprobs: np.ndarray  # float32 [n]; nats, of the unmodified model at temperature 1
    finish: FinishReason  # "length": no end of sequence within the limit
    policy_version: int | None  # optimizer steps behind the weights that sampled it; None: not the student's own
    correct: bool | None = None  # whether its answer equals the reference's; None: not judged
    weight: float = 1.0  # of this sample in the batch's mean
    documents: np.ndarray | None = None  # int64; tokens, after the first, at which attention starts anew
    sampler_entropy: np.ndarray | None = None  # float32 [n]; nats, as sampler_logprobs; None: not recorded

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def digest(self) -> bytes:
        """Eight bytes that name what the models see: tokens, which of them are eligible, and document starts."""
        found = hashlib.sha256(len(self.prompt_ids).to_bytes(8, "little"))
        for part in (self.prompt_ids, self.response_ids, () if self.documents is None else self.documents):
            found.update(np.asarray(part, dtype="<i8").tobytes())
        return found.digest()[:8]

    @property
    def prompt_key(self) -> str:
        """Names the prompt among those of its step."""
        return self.key.rpartition("/")[0] or self.key


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to generate; temperature 0 is greedy decoding."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    entropy: bool = False  # whether entropies are recorded


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One response to generate; its seed makes it the same in any batch, on any actor."""

    key: str
    prompt_ids: list[int]
    seed: int
    answer: str | None = None  # the reference answer, where the response is to be judged


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Teacher distributions over a few classes at each of N positions: C slots, unused ones with probability 0.

    ``ids_NC`` are unique within a row's used slots.  What a row's probabilities lack to 1 is handled as ``residual``
    says: nothing, given to one ``ghost`` class that stands for all others, or spread evenly (``smooth``) over all.
    """

    ids_NC: torch.Tensor  # int64
    probs_NC: torch.Tensor  # float32
    residual: Literal["none", "ghost", "smooth"] = "none"

    def __getitem__(self, rows: slice) -> SparseTargets:
        return SparseTargets(self.ids_NC[rows], self.probs_NC[rows], self.residual)

    def to(self, device: torch.device | str) -> SparseTargets:
        return SparseTargets(self.ids_NC.to(device), self.probs_NC.to(device), self.residual)


@dataclass(slots=True)
class FilterReport:
    """What a sample filter kept of one batch and why it dropped the rest."""

    kept: list[str]  # trajectory keys
    generated: int
    dropped: dict[str, int] = field(default_factory=dict)  # count per reason

    def count(self, reason: str, dropped: int) -> None:
        if dropped:
            self.dropped[reason] = self.dropped.get(reason, 0) + dropped

    def add(self, other: FilterReport) -> None:
        """Of another part of the same batch."""
        self.kept += other.kept
        self.generated += other.generated
        for reason, dropped in other.dropped.items():
            self.count(reason, dropped)


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


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
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


def check_version(trajectories: Iterable[Trajectory], version: int, max_staleness: int = 0) -> None:
    """Refuses trajectories that another policy than ``version`` sampled (design: staleness is this comparison).

    Those that no policy of the student sampled pass.  Raises RuntimeError naming the first one that is too old or comes
    from the future.
    """
    for t in trajectories:
        if t.policy_version is not None and not 0 <= version - t.policy_version <= max_staleness:
            raise RuntimeError(
                f"trajectory {t.key} was sampled by policy version {t.policy_version}, the learner is at {version}; "
                f"at most {max_staleness} steps of staleness are allowed"
            )


ARRAYS = ("prompt_ids", "response_ids", "sampler_logprobs", "sampler_entropy", "documents")


def packed_trajectories(
    trajectories: Sequence[Trajectory],
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """As JSON records and named tensors, for a checkpoint."""
    records, tensors = [], {}
    for number, t in enumerate(trajectories):
        fields = {f.name: getattr(t, f.name) for f in dataclasses.fields(t)}
        for name in ARRAYS:
            if (array := fields.pop(name)) is not None:
                tensors[f"ahead/{number}/{name}"] = torch.from_numpy(np.array(array))
        records.append(fields)
    return records, tensors


def unpacked_trajectories(
    records: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> list[Trajectory]:
    """Inverse of ``packed_trajectories``."""
    found = []
    for number, fields in enumerate(records):
        known = {name: tensors.get(f"ahead/{number}/{name}") for name in ARRAYS}
        arrays: dict[str, Any] = {name: None if t is None else t.numpy() for name, t in known.items()}
        found.append(Trajectory(**fields, **arrays))
    return found


def seed_of(*parts: object) -> int:
    """A 31-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
