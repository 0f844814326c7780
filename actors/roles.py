"""The run's actors as plain methods: what the drivers call, so that a schedule reads as one."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster import Resources, located, wait_ready
from actors.faults import GRACE, HUNG, Place, blamed, end, fault_of, silent
from actors.learner import LearnerActor
from actors.rollout import RolloutGroup
from actors.sync import ObjectStoreSync
from actors.teacher import TeacherActor
from onpolicy_skd import checkpoint
from onpolicy_skd.checkpoint import Checkpoint
from onpolicy_skd.config import Settings
from onpolicy_skd.exits import RunError
from onpolicy_skd.inspection import Inspection
from onpolicy_skd.selection import samples
from onpolicy_skd.supervisor import GiveUp, Supervisor
from onpolicy_skd.timeline import Span
from onpolicy_skd.trajectory import FilterReport, RolloutRequest, Sampling, Trajectory

Refs = list[ray.ObjectRef]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was done about a fault."""

    cause: str
    restarted: list[str]  # roles, one entry an actor
    rolled_back: bool  # the learner is new; it stands where its newest checkpoint, or its model, does
    checkpoint: Checkpoint | None
    ahead: Refs  # rollouts of the step to go on with, from that checkpoint
    seconds: float


class Roles:
    """Student rollouts, teacher and learner of one run, started together.

    Methods that take or return ``Refs`` move references only; trajectories and tensors stay with the actors.  Any of
    them may raise a RayError; ``recover`` tells whether that was a fault, and mends it.
    """

    def __init__(self, settings: Settings, resources: Resources, vocabulary: int, pad_id: int, steps: int) -> None:
        settings = located(settings)
        own = settings.student
        self.supervisor = Supervisor(settings.faults)
        self._settings = settings
        self._vocabulary = vocabulary
        self._places: dict[Any, Place] = {}
        self._version = 0  # of the learner: optimizer steps whose answers came back
        self._pushed = 0  # of the engines; they start from the same model
        self._start_teacher = lambda: TeacherActor.options(**resources.teacher.options()).remote(
            settings, vocabulary, pad_id
        )
        self._start_learner = lambda: LearnerActor.options(**resources.learner.options()).remote(
            settings, vocabulary, steps, self._teacher
        )
        self.rollouts = RolloutGroup(own.model, settings, resources, resources.rollout.count, own.trust_remote_code)
        if 0 < resources.rollout.gpus < 1:
            # vLLM measures its GPU while it starts: alone, lest it count the others' memory.
            wait_ready(self.rollouts.actors)
        self._teacher: Any = self._start_teacher() if resources.teacher.count else None
        self._learner: Any = self._start_learner()
        self._shares = settings.rollout.placement == "learner"
        if self._shares:
            self.rollouts.actors = [self._learner]

    @property
    def _actors(self) -> list[Any]:
        # The teacher first: what it refuses is the reason why a learner that asked it for something died.
        engines = [] if self._shares else self.rollouts.actors
        return [a for a in (self._teacher, *engines, self._learner) if a]

    def wait_ready(self, say: Say = print, patience: float = math.inf) -> None:
        """Blocks until every actor is up; raises what a start refused, GetTimeoutError after ``patience`` seconds."""
        self._places = {}
        # Engines last: what the learner says of a model that cannot be loaded is clearer.
        in_order = sorted(self._actors, key=lambda actor: self._role(actor) == "rollout")
        wait_ready(in_order, say, patience, self._places)

    # -- a step ----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> Refs:
        return self.rollouts.generate(requests, sampling)

    def finish(self, parts: Refs) -> None:
        """Blocks until all ``parts`` exist, or one of them never will."""
        _, missing = ray.wait(parts, num_returns=len(parts), timeout=self._patience(), fetch_local=False)
        if missing:
            raise GetTimeoutError(f"{len(missing)} of {len(parts)} rollout actors do not answer")

    def filter(self, parts: Refs) -> tuple[FilterReport, ray.ObjectRef]:
        """What the sample filter kept, and a reference to the kept trajectories."""
        report, kept = self._learner.filter.options(num_returns=2).remote(*parts)
        found: Any = self._get(report)
        return found, kept

    def encode(self, kept: ray.ObjectRef) -> Refs:
        """The teacher starts on ``kept`` at once; the learner awaits the result when it first wants rows."""
        return [self._teacher.encode.remote(kept)] if self._teacher else []

    def step(self, kept: ray.ObjectRef, encoded: Refs, report: FilterReport) -> dict[str, float]:
        """One optimizer step; the teacher forgets ``kept`` afterwards."""
        try:
            metrics = self._get(self._learner.step.remote(kept, encoded))
        finally:
            self._release(report.kept)
        self._version = metrics["version"]
        return metrics

    # -- everything else -------------------------------------------------------------------------------------------

    def spans(self) -> dict[str, list[Span]]:
        """What each actor did since this was last asked."""
        found: dict[str, list[Span]] = {}
        for actor in self._actors:
            role = self._role(actor)
            number = sum(name.split()[0] == role for name in found)
            found[f"{role} {number}" if role == "rollout" else role] = self._get(actor.drain.remote())
        return dict(sorted(found.items(), key=lambda item: ("rollout", "teacher", "learner").index(item[0].split()[0])))

    def inspect(self, trajectories: Sequence[Trajectory]) -> list[Inspection]:
        """The valid ones of ``trajectories``, position by position.  No update."""
        usable = set(samples.validity(trajectories, self._vocabulary, drop_truncated=False).kept)
        valid = [t for t in trajectories if t.key in usable]
        if not valid:
            return []
        kept = ray.put(valid)
        try:
            return self._get(self._learner.inspect.remote(kept, self.encode(kept)), len(valid))
        finally:
            self._release([t.key for t in valid])

    def rank(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return self._get(self._learner.rank.remote(trajectories), len(trajectories))

    def push_weights(self) -> None:
        """Gives every rollout engine the learner's weights, unless it has them."""
        if self._pushed != self._version and not self._shares:
            ObjectStoreSync(self._learner, self.rollouts).push(self._version, self._patience())
            self._pushed = self._version

    def save(
        self, folder: Path, step: int, version: int, state: dict[str, Any], keep: int, ahead: Sequence[Any] = ()
    ) -> Path:
        """``ahead``: rollouts of ``step``, if they were made before it.

        Raises SaveError, also if the learner is not at ``version``: after a failure it may be new.
        """
        return self._get(self._learner.save.remote(folder.absolute(), step, version, state, keep, *ahead))

    def restore(self, path: Path) -> Refs:
        """Loads a checkpoint into the learner; returns the rollouts of the next step, if they were made ahead."""
        self._version, ahead = self._get(self._learner.restore.remote(path.absolute()))
        return [ray.put(ahead)] if ahead else []

    def save_pretrained(self, folder: Path) -> None:
        self._get(self._learner.save_pretrained.remote(folder.absolute()))

    def _release(self, keys: Sequence[str]) -> None:
        if self._teacher:
            self._teacher.release.remote(keys)  # in order with the calls before and after; nothing to wait for

    def _patience(self, trajectories: int = 0) -> float:
        return self._settings.faults.patience(trajectories / self._settings.rollouts_per_step)

    def _get(self, ref: Any, trajectories: int = 0) -> Any:
        """What a call on so many ``trajectories`` returned.  Raises GetTimeoutError if it takes too long."""
        return ray.get(ref, timeout=self._patience(trajectories))

    # -- faults ----------------------------------------------------------------------------------------------------

    def recover(self, error: RayError, checkpoints: Path | None, say: Say = print) -> Recovery:
        """After ``error`` of any method: new actors in place of those that died or hang, with the current weights.

        A new learner starts from the newest of ``checkpoints``, or anew; with None anew.  The caller does what failed
        again.  Raises ``error`` if it is no fault but would come again, and RunError when the supervisor gives up.
        """
        started, restarted, rolled_back = time.monotonic(), [], False
        first = fault_of(error) or ""
        while True:
            if (cause := fault_of(error)) is None:
                raise error
            say(f"fault: {cause}")
            failed = self._failed(error, cause)
            for actor in failed:
                end(actor, self._places.get(actor))
            decision = self.supervisor.decide({self._role(a): why for a, why in failed.items()} or {"ray": cause})
            if isinstance(decision, GiveUp):
                raise RunError(decision.reason)
            names = [self._role(a) for a in failed]
            say(f"restarting {', '.join(names) or 'nothing'} in {decision.seconds:g} s")
            time.sleep(decision.seconds)
            rolled_back |= self._learner in failed
            restarted += names
            try:
                point, ahead = self._restart(failed, checkpoints if rolled_back else None, say)
            except RayError as again:
                error = again
            else:
                return Recovery(first, restarted, rolled_back, point, ahead, time.monotonic() - started)

    def _failed(self, error: RayError, cause: str) -> dict[Any, str]:
        """The actors that are of no use any more, and why."""
        kind = blamed(error)
        if kind:  # out of memory: what a process holds is given back by its end alone
            role = kind.lower()
            return {a: cause for a in self._actors if self._role(a) == role}
        # After a timeout, whoever is at work has been for too long; else the others may finish what they are at.
        patience = GRACE if isinstance(error, GetTimeoutError) else self._patience()
        found = {}
        for actor in self._actors:  # the learner last: it may be waiting for the teacher
            why = silent(actor, patience)
            if why:
                found[actor] = cause if why == HUNG else why
                if actor is self._teacher:
                    end(actor, self._places.get(actor))  # which lets a learner go that waits for it
        if self._learner not in found and self._made_a_lost_update():
            found[self._learner] = f"an update whose answer was lost ({cause})"
        return found

    def _made_a_lost_update(self) -> bool:
        try:
            return self._get(self._learner.version.remote()) != self._version
        except RayError:
            return True  # nobody knows

    def _role(self, actor: Any) -> str:
        return "teacher" if actor is self._teacher else "learner" if actor is self._learner else "rollout"

    def _restart(self, failed: Mapping[Any, str], checkpoints: Path | None, say: Say) -> tuple[Checkpoint | None, Refs]:
        """Everyone at work again; with ``checkpoints`` the learner is put where the newest is, which is returned, with
        the rollouts it holds."""
        if self._teacher in failed:
            self._teacher = self._start_teacher()
            if self._learner not in failed:
                self._learner.use_teacher.remote(self._teacher)
        for number, actor in enumerate(self.rollouts.actors):
            if actor in failed and not self._shares:
                self.rollouts.restart(number)
                self._pushed = -1
        if self._learner in failed:
            self._learner, self._version, self._pushed = self._start_learner(), 0, -1
        if self._shares:
            self.rollouts.actors = [self._learner]
        self.wait_ready(say, self._patience())
        point = checkpoint.newest(checkpoints) if checkpoints else None
        ahead = self.restore(point.path) if point else []
        return (dataclasses.replace(point, tensors={}) if point else None), ahead

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
