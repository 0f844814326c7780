"""Preparation of the training set, before training: responses of a model, and the sample filter."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from ray.exceptions import RayError

from actors.cluster import wait_ready, with_absolute_paths
from actors.faults import fault_of
from actors.placement import Resources
from actors.rollout_actor import RolloutGroup
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data.references import generated_responses
from onpolicy_skd.run.exits import RunError
from onpolicy_skd.run.prepare import Run
from onpolicy_skd.run.supervisor import GiveUp, Supervisor
from onpolicy_skd.selection.prefilter import kept_prompts
from onpolicy_skd.selection.samples import TEACHER_METRICS
from onpolicy_skd.types import Prompt, RolloutRequest, Trajectory, seed_of

T = TypeVar("T")
Log = Callable[[str], None]
ScoreSamples = Callable[[Sequence[Trajectory]], list[float]]


@contextmanager
def engine(run: Run, resources: Resources, who: str) -> Iterator[RolloutGroup]:
    """Yield one rollout engine with the weights of ``who`` ("student" or "teacher"); kill it afterwards."""
    settings = with_absolute_paths(run.settings)
    model_cfg = settings.teacher_model if who == "teacher" else settings.student
    role = resources.rollout
    group = RolloutGroup(model_cfg, role.on_device(settings), lambda _: role.options(), 1)
    try:
        wait_ready({f"{who} engine": group.actors})
        yield group
    finally:
        group.close()


def retry_engine_on_fault(settings: Settings, role: str, action: Callable[[], T], log: Log) -> T:
    """Return ``action()``, which starts an engine itself; repeat it after a fault.  Raises RunError after too many."""
    supervisor = Supervisor(settings.faults)
    while True:
        try:
            return action()
        except RayError as error:
            if (cause := fault_of(error)) is None:
                raise
            decision = supervisor.decide({role: cause})
            if isinstance(decision, GiveUp):
                raise RunError(decision.reason) from None
            log(f"fault: {role}: {cause}; starting another one in {decision.seconds:g} s")
            time.sleep(decision.seconds)


def add_generated_references(run: Run, resources: Resources, log: Log) -> None:
    """Give ``run`` the responses of teacher or initial student if it asks for them; drop prompts without one.

    The responses are generated once and read from disk afterwards.
    """
    if not run.settings.generates_references:
        return
    source = run.settings.references.source
    sampling = dataclasses.replace(run.sampling, temperature=run.settings.references.temperature, entropy=False)

    def once() -> None:
        with ExitStack() as stack:
            model = functools.cache(lambda: stack.enter_context(engine(run, resources, source)))

            def generate(requests: Sequence[RolloutRequest]) -> list[Trajectory]:
                return model().gather(requests, sampling)  # starts the engine only if a response is not on disk

            run.train, run.responses = generated_responses(run.settings, run.train, generate, log)

    retry_engine_on_fault(run.settings, f"{source} engine", once, log)


def selected_prompts(
    run: Run, score_samples: ScoreSamples, rollouts: Callable[[], RolloutGroup], log: Log
) -> Sequence[Prompt]:
    """Return the prompts to train on: all, or those that ``samples.when=prefilter`` keeps.

    The prefilter uses the scores of the initial student.
    """
    if run.settings.samples.when != "prefilter":
        return run.train

    def scored(trajectories: Sequence[Trajectory]) -> list[float]:
        if run.settings.cache.path is not None and run.settings.samples.metric in TEACHER_METRICS:
            raise ConfigError(
                f"samples.metric={run.settings.samples.metric}: there is no teacher to score samples, and "
                f"the scores of the cache's build are not in {run.paths.prefilter}; train with "
                "the build's run.dir"
            )
        return score_samples(trajectories)

    def generate(prompts: Sequence[Prompt]) -> list[Trajectory]:
        seed = run.settings.run.seed
        requests = [
            RolloutRequest(
                p.key,
                p.token_ids,
                seed_of(seed, "prefilter", p.key),
                teacher_prompt_ids=p.teacher_ids,
                teacher=p.teacher,
            )
            for p in prompts
        ]
        return rollouts().gather(requests, run.sampling)

    return kept_prompts(run.settings, run.train, run.tokenizer, scored, generate, log)
