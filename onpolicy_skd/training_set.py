"""What both drivers do before they start: the teacher's own answers, and the sample filter that runs once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import ray

from actors.cluster import Resources, located, wait_ready
from actors.rollout import RolloutGroup
from onpolicy_skd.config import ConfigError
from onpolicy_skd.prefilter import kept_prompts
from onpolicy_skd.prepare import Run
from onpolicy_skd.references import from_teacher
from onpolicy_skd.selection.samples import TEACHER_METRICS
from onpolicy_skd.trajectory import Prompt, RolloutRequest, Sampling, Trajectory, seed_of

Say = Callable[[str], None]
Rank = Callable[[Sequence[Trajectory]], list[float]]


def gather(group: RolloutGroup, requests: Sequence[RolloutRequest], sampling: Sampling) -> list[Trajectory]:
    """Trajectories brought to the driver in the order asked."""
    by_key = {t.key: t for part in ray.get(group.generate(requests, sampling)) for t in part}
    return [by_key[r.key] for r in requests]


@contextmanager
def engine(run: Run, resources: Resources, who: str) -> Iterator[RolloutGroup]:
    """A rollout engine with the weights of ``who`` ("student" or "teacher"), gone afterwards."""
    settings = located(run.settings)
    own = settings.teacher if who == "teacher" else settings.student
    group = RolloutGroup(own.model, settings, resources, 1, own.trust_remote_code)
    try:
        wait_ready(group.actors)
        yield group
    finally:
        group.close()


def add_teacher_references(run: Run, resources: Resources, say: Say) -> None:
    """Where the settings ask for it, gives ``run`` the teacher's answers, and leaves out prompts that have none.

    They are made once and read from disk afterwards.
    """
    if run.settings.mode == "on_policy" or run.settings.references.source != "teacher":
        return
    sampling = dataclasses.replace(run.sampling, temperature=run.settings.references.temperature)
    with ExitStack() as stack:
        teacher = functools.cache(lambda: stack.enter_context(engine(run, resources, "teacher")))

        def roll(requests: Sequence[RolloutRequest]) -> list[Trajectory]:
            return gather(teacher(), requests, sampling)  # which starts when something is missing on disk

        run.train, run.responses = from_teacher(run.settings, run.train, roll, say)


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
        return gather(rollouts(), requests, run.sampling)

    return kept_prompts(run.settings, run.train, run.tokenizer, scored, roll, say)
