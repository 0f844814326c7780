"""The interface of rollout engines: token ids in, trajectories out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory


class RolloutEngine(Protocol):
    """Engine that generates with the weights of policy ``version``."""

    version: int

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        """Return one trajectory per request, in their order, with log-probabilities of the model at temperature 1."""
        ...

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        """Yield the same trajectories, each as soon as it is complete."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights, named as in a transformers checkpoint, and drop all caches of the old ones."""
        ...

    def sleep(self) -> None:
        """Free memory until the next ``load_weights``, before which the engine must not generate."""
        ...


def sort_by_request(requests: Sequence[RolloutRequest], trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Return ``trajectories`` in the order of ``requests``, by their keys."""
    by_key = {t.key: t for t in trajectories}
    return [by_key[r.key] for r in requests]
