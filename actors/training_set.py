"""What both drivers do before they start: the teacher's own answers, and the sample filter that runs once."""

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
from onpolicy_skd.data.references import teacher_responses
from onpolicy_skd.run.exits import RunError
from onpolicy_skd.run.prepare import Run
from onpolicy_skd.run.supervisor import GiveUp, Supervisor
from onpolicy_skd.selection.prefilter import kept_prompts
from onpolicy_skd.selection.samples import TEACHER_METRICS
from onpolicy_skd.types import Prompt, RolloutRequest, Trajectory, seed_of

T = TypeVar("T")
Log = Callable[[str], None]
Rank = Callable[[Sequence[Trajectory]], list[float]]


@contextmanager
def engine(run: Run, resources: Resources, who: str) -> Iterator[RolloutGroup]:
    """A rollout engine with the weights of ``who`` ("student" or "teacher"), gone afterwards."""
    settings = with_absolute_paths(run.settings)
    own = settings.teacher if who == "teacher" else settings.student
    group = RolloutGroup(own.model, settings, lambda _: resources.rollout.options(), 1, own.trust_remote_code)
    try:
        wait_ready(group.actors)
        yield group
    finally:
        group.close()


def retry_engine_on_fault(settings: Settings, role: str, action: Callable[[], T], log: Log) -> T:
    """``action``, which starts an engine of its own, again after each fault.  Raises RunError after too many."""
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
            log(f"fault: {cause}; starting another {role} in {decision.seconds:g} s")
            time.sleep(decision.seconds)


def add_teacher_references(run: Run, resources: Resources, log: Log) -> None:
    """Where the settings ask for it, gives ``run`` the teacher's answers, and leaves out prompts that have none.

    They are made once and read from disk afterwards.
    """
    if run.settings.mode == "on_policy" or run.settings.references.source != "teacher":
        return
    sampling = dataclasses.replace(run.sampling, temperature=run.settings.references.temperature)

    def once() -> None:
        with ExitStack() as stack:
            teacher = functools.cache(lambda: stack.enter_context(engine(run, resources, "teacher")))

            def roll(requests: Sequence[RolloutRequest]) -> list[Trajectory]:
                return teacher().gather(requests, sampling)  # which starts when something is missing on disk

            run.train, run.responses = teacher_responses(run.settings, run.train, roll, log)

    retry_engine_on_fault(run.settings, "teacher engine", once, log)


def selected_prompts(run: Run, rank: Rank, rollouts: Callable[[], RolloutGroup], log: Log) -> Sequence[Prompt]:
    """The prompts to train on: all, or those that ``samples.when=prefilter`` keeps by the initial student's scores."""
    if run.settings.samples.when != "prefilter":
        return run.train

    def scored(trajectories: Sequence[Trajectory]) -> list[float]:
        if run.settings.cache.path is not None and run.settings.samples.metric in TEACHER_METRICS:
            raise ConfigError(
                f"samples.metric={run.settings.samples.metric}: no teacher is here to score samples, and the scores of "
                f"the cache's build are not in {run.paths.prefilter}; train with the build's run.dir"
            )
        return rank(trajectories)

    def roll(prompts: Sequence[Prompt]) -> list[Trajectory]:
        seed = run.settings.run.seed
        requests = [RolloutRequest(p.key, p.token_ids, seed_of(seed, "prefilter", p.key)) for p in prompts]
        return rollouts().gather(requests, run.sampling)

    return kept_prompts(run.settings, run.train, run.tokenizer, scored, roll, log)
