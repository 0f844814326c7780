"""The run's actors as plain methods: what the drivers call, so that a schedule reads as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.cluster import Resources, located, wait_ready
from actors.learner import LearnerActor
from actors.rollout import RolloutGroup
from actors.sync import ObjectStoreSync
from actors.teacher import TeacherActor
from onpolicy_skd.config import Settings
from onpolicy_skd.inspection import Inspection
from onpolicy_skd.selection import samples
from onpolicy_skd.trajectory import FilterReport, RolloutRequest, Sampling, Trajectory

Refs = list[ray.ObjectRef]


class Roles:
    """Student rollouts, teacher and learner of one run, started together.

    Methods that take or return ``Refs`` move references only; trajectories and tensors stay with the actors.
    """

    def __init__(self, settings: Settings, resources: Resources, vocabulary: int, pad_id: int, steps: int) -> None:
        settings = located(settings)
        own = settings.student
        self._vocabulary = vocabulary
        self.rollouts = RolloutGroup(own.model, settings, resources, resources.rollout.count, own.trust_remote_code)
        if 0 < resources.rollout.gpus < 1:
            # vLLM measures its GPU while it starts: alone, lest it count the others' memory.
            wait_ready(self.rollouts.actors)
        self._teacher: Any = None
        if resources.teacher.count:
            options = resources.teacher.options()
            self._teacher = TeacherActor.options(**options).remote(settings, vocabulary, pad_id)
        self._learner: Any = LearnerActor.options(**resources.learner.options()).remote(
            settings, vocabulary, steps, self._teacher
        )
        self._sync = ObjectStoreSync(self._learner, self.rollouts)

    def wait_ready(self, say: Callable[[str], None] = print) -> None:
        """Blocks until every actor is up; raises what a start refused."""
        # The teacher first: what it refuses is the reason why a learner that asked it for something died.
        wait_ready([a for a in (self._teacher, self._learner) if a] + self.rollouts.actors, say)

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> Refs:
        return self.rollouts.generate(requests, sampling)

    def filter(self, parts: Refs) -> tuple[FilterReport, ray.ObjectRef]:
        """What the sample filter kept, and a reference to the kept trajectories."""
        report, kept = self._learner.filter.options(num_returns=2).remote(*parts)
        return ray.get(report), kept

    def encode(self, kept: ray.ObjectRef) -> Refs:
        """The teacher starts on ``kept`` at once; the learner awaits the result when it first wants rows."""
        return [self._teacher.encode.remote(kept)] if self._teacher else []

    def step(self, kept: ray.ObjectRef, encoded: Refs, report: FilterReport) -> dict[str, float]:
        """One optimizer step; the teacher forgets ``kept`` afterwards."""
        try:
            metrics: Any = ray.get(self._learner.step.remote(kept, encoded))
        finally:
            self._release(report.kept)
        return metrics

    def inspect(self, trajectories: Sequence[Trajectory]) -> list[Inspection]:
        """The valid ones of ``trajectories``, position by position.  No update."""
        usable = set(samples.validity(trajectories, self._vocabulary, drop_truncated=False).kept)
        valid = [t for t in trajectories if t.key in usable]
        if not valid:
            return []
        kept = ray.put(valid)
        found: Any = ray.get(self._learner.inspect.remote(kept, self.encode(kept)))
        self._release([t.key for t in valid])
        return found

    def rank(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return ray.get(self._learner.rank.remote(trajectories))

    def push_weights(self) -> int:
        """Gives every rollout engine the learner's weights; returns their policy version."""
        version = self.version()
        self._sync.push(version)
        return version

    def version(self) -> int:
        """The learner's policy version: optimizer steps done."""
        version: Any = ray.get(self._learner.version.remote())
        return version

    def save(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
        return ray.get(self._learner.save.remote(folder.absolute(), step, state, keep))

    def restore(self, path: Path) -> int:
        """Loads a checkpoint into the learner and its weights into the engines; returns the policy version."""
        ray.get(self._learner.restore.remote(path.absolute()))
        return self.push_weights()

    def save_pretrained(self, folder: Path) -> None:
        ray.get(self._learner.save_pretrained.remote(folder.absolute()))

    def _release(self, keys: Sequence[str]) -> None:
        if self._teacher:
            ray.get(self._teacher.release.remote(keys))

    def close(self) -> None:
        self.rollouts.close()
        for actor in (self._learner, self._teacher):
            if actor:
                ray.kill(actor)
