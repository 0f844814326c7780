"""Teacher actors that build a cache in parallel, shard by shard."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.cluster import wait_ready, with_absolute_paths
from actors.learner_actor import LearnerActor
from actors.placement import Resources
from actors.serialization import unpack_head
from actors.teacher_actor import TeacherActor
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.selection.samples import TEACHER_METRICS
from onpolicy_skd.teacher.cache_format import Shard
from onpolicy_skd.types import Trajectory

QUEUED = 2  # shards assigned to each teacher at a time: one in progress, one waiting
Work = tuple[int, Sequence[Trajectory]]  # number of a shard, and its samples


class CacheBuilders:
    """``resources.teacher.count`` teacher actors that write shards; a context manager.

    The actors start at the first use and are killed at the end of the ``with`` block.
    """

    def __init__(
        self,
        settings: Settings,
        resources: Resources,
        vocabulary: int,
        pad_id: int,
        log: Callable[[str], None] = print,
    ) -> None:
        self._settings = with_absolute_paths(settings)
        self._resources = resources
        self._vocabulary = vocabulary
        self._pad_id = pad_id
        self._log = log
        self._teachers: list[Any] = []

    def __enter__(self) -> CacheBuilders:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._teachers:
            ray.kill(actor)

    def _actors(self) -> list[Any]:
        """Return the teachers; start them at the first call."""
        if not self._teachers:
            role = self._resources.teacher
            self._log(f"starting {role.count} x {role.name}")
            remote = TeacherActor.options(**role.options()).remote
            self._teachers = [
                remote(role.on_device(self._settings), self._vocabulary, self._pad_id, processes=role.count)
                for _ in range(role.count)
            ]
            wait_ready({"teacher": self._teachers}, self._log)
        return self._teachers

    @contextmanager
    def sample_scorer(self) -> Iterator[Callable[[Sequence[Trajectory]], list[float]]]:
        """Yield a function that scores samples with the initial student; its learner is killed afterwards."""
        settings = self._settings
        teachers = self._actors()[:1] if settings.samples.metric in TEACHER_METRICS else ()
        learner: Any = LearnerActor.options(**self._resources.learner.options()).remote(
            self._resources.learner.on_device(settings), self._vocabulary, 1, teachers, scoring_only=True
        )
        try:
            wait_ready({"learner": [learner]}, self._log)
            yield lambda trajectories: ray.get(learner.score_samples.remote(trajectories))
        finally:
            ray.kill(learner)

    def head(self) -> LMHead:
        """Return the teacher's LM head ``[V, G]``."""
        packed: Any = ray.get(self._actors()[0].head.remote())
        return unpack_head(packed)

    def write(self, folder: Path, work: Iterable[Work]) -> Iterator[tuple[int, Shard]]:
        """Write the shards of ``work``; yield each shard's number and record as it completes, in any order."""
        waiting: dict[ray.ObjectRef, tuple[int, Any]] = {}
        left = iter(work)
        first = next(left, None)
        if first is None:
            return
        left = itertools.chain([first], left)
        free = [actor for _ in range(QUEUED) for actor in self._actors()]
        while True:
            while free and (item := next(left, None)) is not None:
                actor, (number, trajectories) = free.pop(), item
                waiting[actor.write_shard.remote(folder.absolute(), number, trajectories)] = (number, actor)
            if not waiting:
                return
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            number, actor = waiting.pop(done)
            shard: Any = ray.get(done)
            free.append(actor)
            yield number, shard
