"""A closer look at trajectories, position by position: what evaluations and reports show; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onpolicy_skd.types import Trajectory


@dataclass(frozen=True, slots=True)
class PositionDiagnostics:
    """One trajectory's n eligible positions."""

    key: str
    entropy: np.ndarray  # float32 [n], nats; of the student
    divergence: np.ndarray  # float32 [n], nats; between student and teacher, of the kind that is trained
    selected: np.ndarray  # bool [n]; whether training would supervise it now


def means(inspections: Sequence[PositionDiagnostics]) -> dict[str, float | None]:
    """Over all positions, and over those that are selected and those that are not, nats; None of no positions."""
    if not inspections:
        return {"divergence": None}
    entropy, divergence, selected = (
        np.concatenate([getattr(i, name) for i in inspections]) for name in ("entropy", "divergence", "selected")
    )
    found: dict[str, float | None] = {"divergence": float(divergence.mean())}
    for name, part in (("selected", selected), ("unselected", ~selected)):
        found[f"entropy_{name}"] = float(entropy[part].mean()) if part.any() else None
        found[f"divergence_{name}"] = float(divergence[part].mean()) if part.any() else None
    return found


def tokens(trajectory: Trajectory, inspection: PositionDiagnostics, tokenizer: Any) -> dict[str, Any]:
    """What a token view shows of a trajectory: the text of each token with its numbers."""
    return {
        "key": trajectory.key,
        "prompt": tokenizer.decode(trajectory.prompt_ids.tolist()),
        "finish_reason": trajectory.finish_reason,
        "tokens": [tokenizer.decode([i]) for i in trajectory.response_ids.tolist()],
        "entropy": [round(float(x), 4) for x in inspection.entropy],
        "divergence": [round(float(x), 4) for x in inspection.divergence],
        "selected": inspection.selected.tolist(),
    }


NGRAM = 8  # tokens


def repetition(ids_n: Sequence[int] | np.ndarray) -> float:
    """Share of a response's ``NGRAM``-grams that occurred in it before; 0 for short ones."""
    ids = np.asarray(ids_n)
    if len(ids) <= NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, NGRAM)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
