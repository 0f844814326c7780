"""What both drivers do before they start: the teacher's own answers, and the sample filter that runs once."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from ray.exceptions import RayError

from actors.cluster import located, wait_ready
from actors.faults import fault_of
from actors.placement import Resources
from actors.rollout import RolloutGroup
from onpolicy_skd.config import ConfigError, Settings
from onpolicy_skd.exits import RunError
from onpolicy_skd.prefilter import kept_prompts
from onpolicy_skd.prepare import Run
from onpolicy_skd.references import from_teacher
from onpolicy_skd.selection.samples import TEACHER_METRICS
from onpolicy_skd.supervisor import GiveUp, Supervisor
from onpolicy_skd.trajectory import Prompt, RolloutRequest, Trajectory, seed_of

T = TypeVar("T")
Say = Callable[[str], None]
Rank = Callable[[Sequence[Trajectory]], list[float]]


@contextmanager
def engine(run: Run, resources: Resources, who: str) -> Iterator[RolloutGroup]:
    """A rollout engine with the weights of ``who`` ("student" or "teacher"), gone afterwards."""
    settings = located(run.settings)
    own = settings.teacher if who == "teacher" else settings.student
    group = RolloutGroup(own.model, settings, lambda _: resources.rollout.options(), 1, own.trust_remote_code)
    try:
        wait_ready(group.actors)
        yield group
    finally:
        group.close()


def with_engine(settings: Settings, role: str, action: Callable[[], T], say: Say) -> T:
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
            say(f"fault: {cause}; starting another {role} in {decision.seconds:g} s")
            time.sleep(decision.seconds)


def add_teacher_references(run: Run, resources: Resources, say: Say) -> None:
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

            run.train, run.responses = from_teacher(run.settings, run.train, roll, say)

    with_engine(run.settings, "teacher engine", once, say)


def selected_prompts(run: Run, rank: Rank, rollouts: Callable[[], RolloutGroup], say: Say) -> Sequence[Prompt]:
    """The prompts to train on: all, or those that ``samples.when=prefilter`` keeps by the initial student's scores."""
    if run.settings.samples.when != "prefilter":
        return run.train

    def scored(trajectories: Sequence[Trajectory]) -> list[float]:
        if run.settings.cache.path is not None and run.settings.samples.metric in TEACHER_METRICS:
            raise ConfigError(
                f"samples.metric={run.settings.samples.metric}: no teacher is here to score samples, and the scores of "
                f"the cache's build are not in {run.settings.run.dir / 'prefilter'}; train with the build's run.dir"
            )
        return rank(trajectories)

    def roll(prompts: Sequence[Prompt]) -> list[Trajectory]:
        seed = run.settings.run.seed
        requests = [RolloutRequest(p.key, p.token_ids, seed_of(seed, "prefilter", p.key)) for p in prompts]
        return rollouts().gather(requests, run.sampling)

    return kept_prompts(run.settings, run.train, run.tokenizer, scored, roll, say)
