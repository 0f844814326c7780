"""Coarse compute dtypes: the loss scale of float16, and how much of a float32 update remains in the compute dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

INITIAL_SCALE = 2.0**16  # as torch.amp.GradScaler's
LARGEST_SCALE = 2.0**24
GROWTH_INTERVAL = 200  # steps without an overflow after which the scale doubles; a run has a few hundred
SAMPLED_WEIGHTS = 65_536
UNSEEN = 0.5  # a run warns if an update of size lr leaves more than this share of the weights unchanged


class LossScale:
    """Factor of the loss in float16, whose smallest number is 6e-8; gradients are divided by it before the optimizer.

    It is a power of two, so it adds no rounding.  It halves after a gradient overflow and doubles after
    ``GROWTH_INTERVAL`` steps without one.  For other dtypes it is always 1.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.active = dtype == torch.float16
        self.value = INITIAL_SCALE if self.active else 1.0
        self.overflows = 0  # steps skipped so far
        self._steps = 0  # since the last change

    def can_halve(self) -> bool:
        return self.active and self.value > 1.0

    def overflowed(self) -> None:
        """Record a step that was skipped because its gradient overflowed: halve the scale."""
        self.value, self.overflows, self._steps = self.value / 2, self.overflows + 1, 0

    def stepped(self) -> None:
        """Record a step that was made; double the scale if it is time."""
        self._steps += 1
        if self.active and self._steps == GROWTH_INTERVAL:
            self.value, self._steps = min(LARGEST_SCALE, 2 * self.value), 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint; empty where the scale is always 1."""
        state = torch.tensor([self.value, self.overflows, self._steps], dtype=torch.float64)
        return {"state": state} if self.active else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``state_dict`` returned; a checkpoint of another compute dtype has nothing to load."""
        if self.active and state:
            self.value, overflows, steps = state["state"].tolist()
            self.overflows, self._steps = int(overflows), int(steps)


class UpdateSums(NamedTuple):
    """Sums over the sampled weights of one update; the sums of several ranks add up."""

    weights: float  # their number
    changed: float  # weights whose rounded value changed
    visible: float  # sum of |change of the rounded value|
    intended: float  # sum of |change of the master|


@torch.no_grad()
def sampled_weights(named: Mapping[str, Tensor]) -> Tensor:
    """Return about ``SAMPLED_WEIGHTS`` evenly spaced values of the matrices in ``named`` (of this rank's shards).

    Vectors (norms, biases) are left out, because autocast does not round them.
    """
    matrices = [p.to_local() if isinstance(p, DTensor) else p for p in named.values() if p.ndim > 1]
    stride = 1 | sum(p.numel() for p in matrices) // SAMPLED_WEIGHTS  # odd, so that the values spread over the columns
    return torch.cat([p.flatten()[::stride] for p in matrices])


@torch.no_grad()
def update_sums(before: Tensor, after: Tensor, dtype: torch.dtype) -> UpdateSums:
    """Compare the change of sampled weights with its effect on their values in ``dtype``."""
    seen = after.to(dtype).double() - before.to(dtype).double()
    sums = torch.stack([(seen != 0).sum(), seen.abs().sum(), (after.double() - before.double()).abs().sum()])
    return UpdateSums(len(before), *sums.tolist())


@torch.no_grad()
def precision_warning(weights: Tensor, lr: float, dtype: torch.dtype) -> str | None:
    """Return a warning if an update of size ``lr`` leaves most ``weights`` unchanged in ``dtype``."""
    rounded = weights.to(dtype)
    unseen = ((rounded.float() + lr).to(dtype) == rounded).double().mean().item()
    if not unseen > UNSEEN:
        return None
    name = str(dtype).removeprefix("torch.")
    finer = "float32" if dtype == torch.float16 else "float16 or float32"
    return (
        f"learner.lr={lr:g}: a step of this size does not change {unseen:.0%} of the weights in {name}, the type of "
        "the forward; updates gather in the float32 masters and arrive late, many at once. Watch update_visible in the "
        f"metrics; set learner.compute_dtype and rollout.dtype to {finer}, train adapters (student.lora_rank) or raise "
        "learner.lr"
    )
