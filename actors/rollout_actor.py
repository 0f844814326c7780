"""Rollout actors: each owns one engine; a group splits every batch among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from actors.cluster import DeferredInitError
from actors.faults import Place, place
from actors.serialization import Packed, unpack_named
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.weight_transfer import Address, WeightSpec
from onpolicy_skd.evaluation.exact_match import with_correctness
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.rollout.engine import sort_by_request
from onpolicy_skd.tracing import Span, Spans
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

PARTS = 4  # of its share that a streaming actor hands over one by one


@ray.remote
class RolloutActor:
    def __init__(self, model: str, settings: Settings, trust_remote_code: bool = False) -> None:
        with DeferredInitError() as self._init_error:
            self._engine: Any = build_engine(model, settings, trust_remote_code)
            self._tokenizer = load_tokenizer(model, trust_remote_code)
        self._spans = Spans()

    def drain(self) -> list[Span]:
        return self._spans.drain()

    def ready(self) -> Place:
        self._init_error.raise_if_failed()
        return place()

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        with self._spans("generate"):
            return with_correctness(self._engine.generate(requests, sampling), requests, self._tokenizer)

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[list[Trajectory]]:
        """As they end, in about PARTS parts."""
        by_key, part = {r.key: r for r in requests}, []
        with self._spans("generate"):
            for t in self._engine.stream(requests, sampling):
                part.append(t)
                if len(part) * PARTS >= len(requests):
                    yield with_correctness(part, [by_key[t.key] for t in part], self._tokenizer)
                    part = []
        if part:
            yield with_correctness(part, [by_key[t.key] for t in part], self._tokenizer)

    def load_weights(self, weights: dict[str, Packed], version: int) -> None:
        with self._spans("load weights"):
            self._engine.load_weights(unpack_named(weights), version)

    def join_group(self, address: Address, first: int, count: int) -> None:
        """The group in which the learner broadcasts weights."""
        self._engine.join(address, first, count)

    def receive(self, weight_spec: WeightSpec, version: int) -> None:
        with self._spans("receive weights"):
            self._engine.receive(weight_spec, version)

    def sleep(self) -> None:
        self._engine.sleep()


class RolloutGroup:
    """Several rollout actors that share each batch; which actor serves a request does not change its response."""

    def __init__(
        self, model: str, settings: Settings, options: Callable[[int], dict[str, Any]], count: int, trust: bool = False
    ) -> None:
        """``options``: Ray's, of each actor by its number."""
        self._start = lambda number: RolloutActor.options(**options(number)).remote(model, settings, trust)
        self._step = settings.rollouts_per_step * settings.rollout.max_tokens  # tokens, at most
        self._faults = settings.faults
        self.actors: list[Any] = [self._start(number) for number in range(count)]

    def restart(self, number: int) -> None:
        """Starts a new actor in place of one that was ended; it has the weights of its checkpoint."""
        self.actors[number] = self._start(number)

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, streaming: bool = False
    ) -> list[Any]:
        """One ref to a list of trajectories per actor or, ``streaming``, a generator of such refs.

        Requests go round, so that actors get like shares.
        """
        shares = [list(requests[i :: len(self.actors)]) for i in range(len(self.actors))]
        busy = [(actor, share) for actor, share in zip(self.actors, shares, strict=True) if share]
        if streaming:
            return [actor.stream.options(num_returns="streaming").remote(share, sampling) for actor, share in busy]
        return [actor.generate.remote(share, sampling) for actor, share in busy]

    def gather(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        """Trajectories brought here in the order asked.  Raises GetTimeoutError if an actor seems to hang."""
        timeout_s = self._faults.timeout_s(len(requests) * sampling.max_tokens / self._step)
        parts = ray.get(self.generate(requests, sampling), timeout=timeout_s)
        return sort_by_request(requests, (t for part in parts for t in part))

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
