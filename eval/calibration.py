"""Expected calibration error (ECE) of a model's predictions, and its reliability diagram.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv:1706.04599), Eqs. 2-5: sort predictions into 15
bins of equal width by confidence, then average |accuracy - confidence| over the bins, weighted by their counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onpolicy_skd.models.batch import collate, micro_batches
from onpolicy_skd.models.lm_head import LMHead, Projector, blocks, chunk_size, chunks, shift_exp
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.storage.files import replacing
from onpolicy_skd.types import Trajectory

BINS = 15
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True, slots=True)
class Bin:
    low: float
    high: float
    count: int
    confidence: float | None  # mean over the bin; None if it is empty
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration of ``count`` predictions; ``ece`` is in 0..1, and 0 without predictions."""

    ece: float
    count: int
    confidence: float  # means over all predictions
    accuracy: float
    bins: list[Bin]


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Compute the calibration of n predictions: ``confidence`` float ``[n]`` in 0..1, ``correct`` bool ``[n]``.

    Bin i holds confidences in (i / bins, (i + 1) / bins]; bin 0 also holds 0.
    """
    confidence = np.asarray(confidence, np.float64)
    correct = np.asarray(correct, bool)
    edges = np.linspace(0.0, 1.0, bins + 1)
    indices = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    filled, ece = [], 0.0
    for i in range(bins):
        in_bin = indices == i
        count = int(in_bin.sum())
        mean_confidence, accuracy = (float(v[in_bin].mean()) if count else None for v in (confidence, correct))
        if mean_confidence is not None and accuracy is not None:
            ece += count / len(confidence) * abs(accuracy - mean_confidence)
        filled.append(Bin(float(edges[i]), float(edges[i + 1]), count, mean_confidence, accuracy))
    n = len(confidence)
    return Calibration(ece, n, float(confidence.mean()) if n else 0.0, float(correct.mean()) if n else 0.0, filled)


def choice_calibration(logprobs: Sequence[Sequence[float]], gold: Sequence[int]) -> Calibration:
    """Compute the calibration of multiple choice from the log-probability (nats) of each choice of each problem."""
    confidence, correct = [], []
    for values, label in zip(logprobs, gold, strict=True):
        scores = np.asarray(values, np.float64)
        exponentials = np.exp(scores - scores.max())
        confidence.append(exponentials.max() / exponentials.sum())
        correct.append(int(scores.argmax()) == label)
    return calibration(np.array(confidence), np.array(correct, bool))


@torch.no_grad()
def next_token_calibration(
    model: SplitModel, pad_id: int, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Calibration, list[float]]:
    """Compute the calibration of next-token predictions over ``pairs`` of (context, continuation) token ids.

    Every token of the continuations counts.  Confidence is the probability of the likeliest token; a prediction is
    correct if that token is the continuation's.  Also return the summed log-probability (nats) of each continuation.
    """
    texts = [
        Trajectory(str(i), np.array(context), np.array(rest), np.zeros(len(rest), np.float32), "stop", None)
        for i, (context, rest) in enumerate(pairs)
    ]
    predictions: dict[int, np.ndarray] = {}
    with ProgressReporter("calibration", len(texts)) as progress:
        for group in micro_batches([t.length for t in texts], TOKENS_PER_BATCH):
            batch = collate([texts[i] for i in group], pad_id, model.device)
            rows_N3 = _predictions(model.hidden(batch), model.head, batch.targets).cpu()
            for i, rows in zip(group, rows_N3.split(batch.counts), strict=True):
                predictions[i] = rows.numpy()
            progress.advance(len(group))
    ordered = [predictions[i] for i in range(len(texts))]
    all_N3 = np.concatenate(ordered) if ordered else np.zeros((0, 3))
    return calibration(all_N3[:, 0], all_N3[:, 1] > 0), [float(rows[:, 2].sum()) for rows in ordered]


def _predictions(hidden_NH: torch.Tensor, head: LMHead, targets_N: torch.Tensor) -> torch.Tensor:
    """Return float32 ``[N, 3]``: top token's probability, 1 if it is the target, target's log-probability (nats)."""
    out_N3 = torch.empty(len(hidden_NH), 3, dtype=torch.float32, device=hidden_NH.device)
    size = chunk_size(len(hidden_NH), head)
    project = Projector(head.to(hidden_NH.dtype), size)
    for rows in chunks(len(hidden_NH), size):
        logits_cV = project(hidden_NH[rows])
        for block in blocks(logits_cV):
            logits, targets_b = logits_cV[block], targets_N[rows][block]
            likeliest_b = logits.argmax(-1)
            _, total_b = shift_exp(logits)
            logprob_b = logits.gather(1, targets_b[:, None])[:, 0] - total_b.log()
            out_N3[rows][block] = torch.stack([1 / total_b, (likeliest_b == targets_b).float(), logprob_b], 1)
    return out_N3


def plot(path: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Draw a reliability diagram per task: accuracy over confidence, with the share of predictions in each bin."""
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    figure = Figure(figsize=(3.4 * len(calibrations), 3.6), layout="constrained")
    axes = figure.subplots(1, len(calibrations), squeeze=False)[0]
    for axis, (name, measured) in zip(axes, calibrations.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        for b in measured.bins:
            width = b.high - b.low
            axis.bar(b.low, b.count / max(1, measured.count), width, align="edge", color="0.85")
            if b.accuracy is not None:
                axis.plot([b.confidence, b.confidence], [b.confidence, b.accuracy], color="#D55E00", linewidth=1.5)
        filled = [b for b in measured.bins if b.count]
        axis.plot([b.confidence for b in filled], [b.accuracy for b in filled], "o-", color="#0072B2", markersize=4)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy (grey: share of predictions)")
        axis.set_title(f"{name}: ECE {100 * measured.ece:.1f} % of {measured.count:,}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
