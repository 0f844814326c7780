"""New weights from the learner to every rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import ray
from ray.actor import ActorHandle

from actors.rollout import RolloutGroup


class WeightSync(Protocol):
    """Makes every rollout engine hold the learner's weights, under their policy version."""

    def push(self, version: int, patience: float) -> None:
        """Raises GetTimeoutError after ``patience`` seconds."""
        ...


class ObjectStoreSync:
    """Through Ray's object store: one copy out of the learner, read by every engine; works anywhere."""

    def __init__(self, learner: Sequence[ActorHandle], rollouts: RolloutGroup) -> None:
        self._learner = learner
        self._rollouts = rollouts

    def push(self, version: int, patience: float) -> None:
        # Stays in the object store: the driver holds the reference alone.  The other ranks help rank 0 to gather it.
        weights, *_ = [rank.weights.remote() for rank in self._learner]
        ray.get([actor.load_weights.remote(weights, version) for actor in self._rollouts.actors], timeout=patience)
