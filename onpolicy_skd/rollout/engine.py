"""The interface of rollout engines: token ids in, trajectories out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory


class RolloutEngine(Protocol):
    """Generates with the weights of ``version``."""

    version: int

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        """One trajectory per request, in their order; log-probabilities are the unmodified model's, temperature 1."""
        ...

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        """The same trajectories, each as soon as it has ended."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces the weights by those of a transformers checkpoint's names and drops every cache of the old ones."""
        ...

    def sleep(self) -> None:
        """Gives back what memory it can until the next weights, without which it may not generate any more."""
        ...


def sort_by_request(requests: Sequence[RolloutRequest], found: Iterable[Trajectory]) -> list[Trajectory]:
    """Trajectories of ``requests``, which have a key each, in their order."""
    by_key = {t.key: t for t in found}
    return [by_key[r.key] for r in requests]
