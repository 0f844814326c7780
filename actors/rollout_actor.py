"""Rollout actors, each with one engine, and the group that divides every batch among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from actors.cluster import DeferredInitError
from actors.faults import Log, Place, get_answers, place, reports_faults, watch_workers
from actors.placement import use_cores
from actors.serialization import Packed, unpack_named
from onpolicy_skd.config.schema import Settings, StudentSettings, TeacherSettings
from onpolicy_skd.distributed.weight_transfer import Address, WeightSpec
from onpolicy_skd.evaluation.judge import with_correctness
from onpolicy_skd.models.heap import trim_heap
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.rollout.engine import RolloutEngine, sort_by_request
from onpolicy_skd.tracing import Span, Spans
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

BATCHES = 4  # number of batches in which a streaming actor returns its share of a step's responses
EVALUATED_TOGETHER = 8  # responses of an evaluation that an actor returns at a time
ModelSettings = StudentSettings | TeacherSettings


@ray.remote
@reports_faults
class RolloutActor:
    """One rollout engine, which also judges the correctness of its responses."""

    def __init__(self, model_cfg: ModelSettings, settings: Settings) -> None:
        self._init_error = DeferredInitError()
        with self._init_error.keep():
            use_cores(settings.rollout.threads, settings.rollout.actors, settings)
            self._engine: Any = build_engine(model_cfg.model, settings, model_cfg.trust_remote_code)
            self._tokenizer = load_tokenizer(model_cfg.model, model_cfg.trust_remote_code)
            watch_workers(self._engine)
        trim_heap()  # vLLM packs its weights from a copy
        self._judge = settings.eval.judge
        self._spans = Spans()

    def drain(self) -> list[Span]:
        return self._spans.drain()

    def ready(self) -> Place:
        self._init_error.raise_if_failed()
        return place()

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        with self._spans("generate"):
            trajectories = self._engine.generate(requests, sampling)
            return with_correctness(trajectories, requests, self._tokenizer, sampling.stop, self._judge)

    def stream(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, size: int
    ) -> Iterator[list[Trajectory]]:
        """Yield trajectories as they complete, ``size`` at a time."""
        with self._spans("generate"):
            yield from judged_batches(self._engine, requests, sampling, self._tokenizer, self._judge, size)

    def load_weights(self, weights: dict[str, Packed], version: int) -> None:
        with self._spans("load weights"):
            self._engine.load_weights(unpack_named(weights), version)
        trim_heap()

    def init_process_group(self, address: Address, first: int, count: int) -> None:
        """Join the group in which the learner broadcasts weights."""
        self._engine.init_weight_transfer(address, first, count)

    def receive(self, weight_spec: WeightSpec, version: int) -> None:
        with self._spans("receive weights"):
            self._engine.receive(weight_spec, version)

    def sleep(self) -> None:
        self._engine.sleep()


class RolloutGroup:
    """Rollout actors that share each batch.

    Each request carries the seed of its response, so the actor that serves a request affects only rounding.
    """

    def __init__(
        self,
        model_cfg: ModelSettings,
        settings: Settings,
        options: Callable[[int], dict[str, Any]],
        count: int,
        log: Log = print,
    ) -> None:
        """Start ``count`` actors; ``options`` maps an actor's number to its Ray options."""
        self._start = lambda number: RolloutActor.options(**options(number)).remote(model_cfg, settings)
        self._log = log
        self._tokens_per_step = settings.rollouts_per_step * settings.rollout.max_tokens  # at most
        self._faults = settings.faults
        self.actors: list[Any] = [self._start(number) for number in range(count)]

    def restart(self, number: int) -> None:
        """Start a new actor in place of a dead one; it begins with the model's initial weights."""
        self.actors[number] = self._start(number)

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Any]:
        """Return a ref to a list of trajectories for each actor that has requests."""
        return [actor.generate.remote(share, sampling) for actor, share in self._shares(requests)]

    def stream(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, size: int | None = None
    ) -> list[Any]:
        """Return a generator of refs for each actor that has requests.

        Each ref is to a list of ``size`` trajectories, by default a quarter of the actor's share.
        """
        return [
            actor.stream.options(num_returns="streaming").remote(share, sampling, size or -(-len(share) // BATCHES))
            for actor, share in self._shares(requests)
        ]

    def gather(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        """Return the trajectories in the order of ``requests``.  Raises GetTimeoutError if an actor seems to hang."""
        answers = get_answers(
            self.generate(requests, sampling), "rollout", self._timeout_s(requests, sampling), self._log
        )
        return sort_by_request(requests, (t for trajectories in answers for t in trajectories))

    def completed(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[Trajectory]:
        """Yield the trajectories as they complete.  Raises GetTimeoutError if an actor seems to hang."""
        streams = self.stream(requests, sampling, EVALUATED_TOGETHER)
        for ref in iter_completed(streams, self._timeout_s(requests, sampling)):
            yield from ray.get(ref)

    def _shares(self, requests: Sequence[RolloutRequest]) -> list[tuple[Any, list[RolloutRequest]]]:
        """Divide the requests round-robin, so that actors get similar shares; leave out actors without any."""
        shares = [list(requests[i :: len(self.actors)]) for i in range(len(self.actors))]
        return [(actor, share) for actor, share in zip(self.actors, shares, strict=True) if share]

    def _timeout_s(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> float:
        return self._faults.timeout_s(len(requests) * sampling.max_tokens / self._tokens_per_step)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def judged_batches(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    sampling: SamplingParams,
    tokenizer: Any,
    judge: str,
    size: int,
) -> Iterator[list[Trajectory]]:
    """Yield the engine's trajectories as they complete, with their correctness, ``size`` at a time."""
    by_key = {r.key: r for r in requests}
    trajectories = engine.stream(requests, sampling)
    while batch := list(itertools.islice(trajectories, size)):
        yield with_correctness(batch, [by_key[t.key] for t in batch], tokenizer, sampling.stop, judge)


def iter_completed(rollout_refs: Sequence[Any], timeout_s: float) -> Iterator[ray.ObjectRef]:
    """Yield refs to lists of trajectories as each becomes available.

    ``rollout_refs`` holds such refs or generators of them.  Raises GetTimeoutError if there is no new one within
    ``timeout_s`` seconds.
    """
    pending: list[Any] = list(rollout_refs)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=timeout_s, fetch_local=False)
        if not ready:
            raise GetTimeoutError(f"{len(pending)} of {len(rollout_refs)} rollout actors do not answer")
        source: Any = ready[0]
        if not isinstance(source, ray.ObjectRefGenerator):
            yield source
        elif (ref := next(source, None)) is not None:
            pending.append(source)
            yield ref
