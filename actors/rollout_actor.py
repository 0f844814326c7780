"""Rollout actors, each with one engine, and the group that splits every batch among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from actors.cluster import DeferredInitError
from actors.faults import Log, Place, get_answers, place, reports_faults
from actors.placement import use_cores
from actors.serialization import Packed, unpack_named
from onpolicy_skd.config.schema import Settings, StudentSettings, TeacherSettings
from onpolicy_skd.distributed.weight_transfer import Address, WeightSpec
from onpolicy_skd.evaluation.judge import with_correctness
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.rollout.build import build_engine
from onpolicy_skd.rollout.engine import sort_by_request
from onpolicy_skd.tracing import Span, Spans
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

BATCHES = 4  # in which a streaming actor returns its share of the responses
ModelSettings = StudentSettings | TeacherSettings


@ray.remote
@reports_faults
class RolloutActor:
    def __init__(self, model_cfg: ModelSettings, settings: Settings) -> None:
        self._init_error = DeferredInitError()
        with self._init_error.keep():
            use_cores(settings.rollout.threads, settings.rollout.actors, settings)
            self._engine: Any = build_engine(model_cfg.model, settings, model_cfg.trust_remote_code)
            self._tokenizer = load_tokenizer(model_cfg.model, model_cfg.trust_remote_code)
        self._judge = settings.eval.judge
        self._spans = Spans()

    def drain(self) -> list[Span]:
        return self._spans.drain()

    def ready(self) -> Place:
        self._init_error.raise_if_failed()
        return place()

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        with self._spans("generate"):
            return self._judged(self._engine.generate(requests, sampling), requests, sampling)

    def stream(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Iterator[list[Trajectory]]:
        """Yield trajectories as they complete, in about BATCHES lists."""
        by_key, batch = {r.key: r for r in requests}, []
        with self._spans("generate"):
            for t in self._engine.stream(requests, sampling):
                batch.append(t)
                if len(batch) * BATCHES >= len(requests):
                    yield self._judged(batch, [by_key[t.key] for t in batch], sampling)
                    batch = []
        if batch:
            yield self._judged(batch, [by_key[t.key] for t in batch], sampling)

    def _judged(
        self, trajectories: Sequence[Trajectory], requests: Sequence[RolloutRequest], sampling: SamplingParams
    ) -> list[Trajectory]:
        return with_correctness(trajectories, requests, self._tokenizer, sampling.stop, self._judge)

    def load_weights(self, weights: dict[str, Packed], version: int) -> None:
        with self._spans("load weights"):
            self._engine.load_weights(unpack_named(weights), version)

    def join_group(self, address: Address, first: int, count: int) -> None:
        """Join the group in which the learner broadcasts weights."""
        self._engine.join(address, first, count)

    def receive(self, weight_spec: WeightSpec, version: int) -> None:
        with self._spans("receive weights"):
            self._engine.receive(weight_spec, version)

    def sleep(self) -> None:
        self._engine.sleep()


class RolloutGroup:
    """Rollout actors that share each batch; the choice of the actor for a request does not change its response."""

    def __init__(
        self,
        model_cfg: ModelSettings,
        settings: Settings,
        options: Callable[[int], dict[str, Any]],
        count: int,
        log: Log = print,
    ) -> None:
        """``options`` returns Ray's options of an actor by its number."""
        self._start = lambda number: RolloutActor.options(**options(number)).remote(model_cfg, settings)
        self._log = log
        self._tokens_per_step = settings.rollouts_per_step * settings.rollout.max_tokens  # at most
        self._faults = settings.faults
        self.actors: list[Any] = [self._start(number) for number in range(count)]

    def restart(self, number: int) -> None:
        """Start a new actor in place of a dead one; it has the weights of its checkpoint."""
        self.actors[number] = self._start(number)

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, streaming: bool = False
    ) -> list[Any]:
        """Return for each actor a ref to a list of trajectories or, if ``streaming``, a generator of such refs.

        Requests are dealt round-robin, so that actors get similar shares.
        """
        shares = [list(requests[i :: len(self.actors)]) for i in range(len(self.actors))]
        busy = [(actor, share) for actor, share in zip(self.actors, shares, strict=True) if share]
        if streaming:
            return [actor.stream.options(num_returns="streaming").remote(share, sampling) for actor, share in busy]
        return [actor.generate.remote(share, sampling) for actor, share in busy]

    def gather(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Trajectory]:
        """Return the trajectories in the order of ``requests``.  Raises GetTimeoutError if an actor seems to hang."""
        timeout_s = self._faults.timeout_s(len(requests) * sampling.max_tokens / self._tokens_per_step)
        answers = get_answers(self.generate(requests, sampling), "rollout", timeout_s, self._log)
        return sort_by_request(requests, (t for trajectories in answers for t in trajectories))

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
