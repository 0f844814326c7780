"""Position-by-position diagnostics of trajectories, for evaluations and reports; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onpolicy_skd.types import Trajectory


@dataclass(frozen=True, slots=True)
class PositionDiagnostics:
    """Statistics at the n eligible positions of a trajectory."""

    key: str
    entropy: np.ndarray  # float32 [n], nats; the student's
    divergence: np.ndarray  # float32 [n], nats; the trained divergence between student and teacher
    selected: np.ndarray  # bool [n]; training would supervise the position now


def means(diagnostics: Sequence[PositionDiagnostics]) -> dict[str, float | None]:
    """Return means in nats over all positions, the selected ones and the others; None for no positions."""
    if not diagnostics:
        return {"divergence": None}
    entropy, divergence, selected = (
        np.concatenate([getattr(d, name) for d in diagnostics]) for name in ("entropy", "divergence", "selected")
    )
    result: dict[str, float | None] = {"divergence": float(divergence.mean())}
    for name, mask in (("selected", selected), ("unselected", ~selected)):
        result[f"entropy_{name}"] = float(entropy[mask].mean()) if mask.any() else None
        result[f"divergence_{name}"] = float(divergence[mask].mean()) if mask.any() else None
    return result


def token_view(trajectory: Trajectory, diagnostics: PositionDiagnostics, tokenizer: Any) -> dict[str, Any]:
    """Return the target tokens of a trajectory with their statistics, for the token view."""
    return {
        "key": trajectory.key,
        "prompt": tokenizer.decode(trajectory.prompt_ids.tolist()),
        "finish_reason": trajectory.finish_reason,
        "tokens": [tokenizer.decode([i]) for i in trajectory.target_ids.tolist()],
        "entropy": [round(float(x), 4) for x in diagnostics.entropy],
        "divergence": [round(float(x), 4) for x in diagnostics.divergence],
        "selected": diagnostics.selected.tolist(),
    }


NGRAM = 8  # tokens


def repetition(ids_n: Sequence[int] | np.ndarray) -> float:
    """Return the share of a response's ``NGRAM``-grams that repeat an earlier one; 0 for short responses."""
    ids = np.asarray(ids_n)
    if len(ids) <= NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, NGRAM)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
