"""How far a model's confidence is from being right: expected calibration error and its reliability diagram.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv:1706.04599), Eqs. 2-5: predictions are put into
15 bins of equal width by their confidence, and |accuracy - confidence| is averaged over bins by their counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onpolicy_skd.models.batch import collate, micro_batches
from onpolicy_skd.models.lm_head import Projector, blocks, chunk_size, chunks, shift_exp
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.storage.files import replacing
from onpolicy_skd.types import Trajectory

BINS = 15
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True, slots=True)
class Bin:
    low: float
    high: float
    count: int
    confidence: float | None  # mean over the bin; None of an empty one
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """``ece`` in 0..1; 0 of no predictions."""

    ece: float
    count: int
    confidence: float  # means over all predictions
    accuracy: float
    bins: list[Bin]


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Of n predictions: ``confidence`` float ``[n]`` in 0..1, ``correct`` bool ``[n]``.

    Bin i holds confidences in (i / bins, (i + 1) / bins]; the first one also 0.
    """
    confidence = np.asarray(confidence, np.float64)
    correct = np.asarray(correct, bool)
    edges = np.linspace(0.0, 1.0, bins + 1)
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    found, error = [], 0.0
    for i in range(bins):
        inside = places == i
        count = int(inside.sum())
        sure, right = (float(v[inside].mean()) if count else None for v in (confidence, correct))
        if sure is not None and right is not None:
            error += count / len(confidence) * abs(right - sure)
        found.append(Bin(float(edges[i]), float(edges[i + 1]), count, sure, right))
    n = len(confidence)
    return Calibration(error, n, float(confidence.mean()) if n else 0.0, float(correct.mean()) if n else 0.0, found)


def of_choices(logprobs: Sequence[Sequence[float]], gold: Sequence[int]) -> Calibration:
    """Of multiple choice: the softmax over each problem's choices of their log-probabilities, nats."""
    confidence, correct = [], []
    for values, right in zip(logprobs, gold, strict=True):
        scores = np.asarray(values, np.float64)
        shares = np.exp(scores - scores.max())
        confidence.append(shares.max() / shares.sum())
        correct.append(int(scores.argmax()) == right)
    return calibration(np.array(confidence), np.array(correct, bool))


@torch.no_grad()
def of_continuations(
    model: SplitModel, pad_id: int, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Calibration, list[float]]:
    """Of next-token predictions, at every token of the continuations in ``pairs`` of (context, continuation) ids.

    Confidence is the probability of the likeliest token; it is correct if that is the token that stands there.
    Returns the Calibration and the summed log-probability of each continuation, nats.
    """
    texts = [
        Trajectory(str(i), np.array(context), np.array(rest), np.zeros(len(rest), np.float32), "stop", None)
        for i, (context, rest) in enumerate(pairs)
    ]
    parts: dict[int, np.ndarray] = {}
    for group in micro_batches([t.length for t in texts], TOKENS_PER_BATCH):
        batch = collate([texts[i] for i in group], pad_id, model.device)
        found = _predictions(model.hidden(batch), model.head_VH, batch.targets).cpu()
        for i, own in zip(group, found.split(batch.counts), strict=True):
            parts[i] = own.numpy()
    rows = np.concatenate([parts[i] for i in range(len(texts))]) if texts else np.zeros((0, 3))
    return calibration(rows[:, 0], rows[:, 1] > 0), [float(parts[i][:, 2].sum()) for i in range(len(texts))]


def _predictions(hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """float32 ``[N, 3]``: the likeliest token's probability, whether it is the target, the target's log-probability."""
    out_N3 = torch.empty(len(hidden_NH), 3, dtype=torch.float32, device=hidden_NH.device)
    size = chunk_size(len(hidden_NH), head_VH)
    project = Projector(head_VH.to(hidden_NH.dtype), size)
    for rows in chunks(len(hidden_NH), size):
        logits_cV = project(hidden_NH[rows])
        for block in blocks(logits_cV):
            logits, targets_b = logits_cV[block], targets_N[rows][block]
            likeliest_b = logits.argmax(-1)
            _, total_b = shift_exp(logits)
            logprob_b = logits.gather(1, targets_b[:, None])[:, 0] - total_b.log()
            out_N3[rows][block] = torch.stack([1 / total_b, (likeliest_b == targets_b).float(), logprob_b], 1)
    return out_N3


def plot(path: Path, found: Mapping[str, Calibration]) -> None:
    """Reliability diagrams, one panel each: accuracy over confidence, with the share of predictions in each bin."""
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    figure = Figure(figsize=(3.4 * len(found), 3.6), layout="constrained")
    for axis, (name, own) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        for b in own.bins:
            width = b.high - b.low
            axis.bar(b.low, b.count / max(1, own.count), width, align="edge", color="0.85")
            if b.accuracy is not None:
                axis.plot([b.confidence, b.confidence], [b.confidence, b.accuracy], color="#D55E00", linewidth=1.5)
        filled = [b for b in own.bins if b.count]
        axis.plot([b.confidence for b in filled], [b.accuracy for b in filled], "o-", color="#0072B2", markersize=4)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy (grey: share of predictions)")
        axis.set_title(f"{name}: ECE {100 * own.ece:.1f} % of {own.count:,}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
