"""New weights from the learner to every rollout engine."""

from __future__ import annotations

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

    def __init__(self, learner: ActorHandle, rollouts: RolloutGroup) -> None:
        self._learner = learner
        self._rollouts = rollouts

    def push(self, version: int, patience: float) -> None:
        weights = self._learner.weights.remote()  # stays in the object store: the driver holds the reference alone
        ray.get([actor.load_weights.remote(weights, version) for actor in self._rollouts.actors], timeout=patience)
