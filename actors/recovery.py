"""Recovery from faults: find the actors that failed, replace them, and restore the learner from a checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.engine_weights import EngineWeights
from actors.faults import (
    GRACE,
    NO_ANSWER,
    Log,
    fault_of,
    faulty_actor,
    kill,
    needs_restart,
    unresponsive_reason,
)
from actors.groups import ActorGroups
from onpolicy_skd.run.exits import RunError
from onpolicy_skd.run.supervisor import GiveUp, Recovery, Supervisor
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.storage.checkpoint import Checkpoint

Refs = list[ray.ObjectRef]


class FaultRecovery:
    """Replaces failed actors; ``restore`` loads a checkpoint into the learner and returns its prefetched rollouts."""

    def __init__(self, groups: ActorGroups, weights: EngineWeights, restore: Callable[[Path], Refs]) -> None:
        self._groups = groups
        self._weights = weights
        self._restore = restore
        self._supervisor = Supervisor(groups.settings.faults)

    def recover(self, error: RayError, checkpoints: Path | None, log: Log) -> Recovery:
        """Do what ``Workers.recover`` describes."""
        start, restarted, rolled_back = time.monotonic(), [], False
        first = self._described(error)
        while True:
            if (cause := fault_of(error)) is None:
                raise error
            log(f"fault: {self._described(error)}")
            failed = self._failed(error, cause)
            for actor in failed:
                kill(actor, self._groups.place(actor))
            roles = [self._groups.role(actor) for actor in failed]
            decision = self._supervisor.decide(dict(zip(roles, failed.values(), strict=True)) or {"ray": cause})
            if isinstance(decision, GiveUp):
                raise RunError(decision.reason)
            counted = ", ".join(f"{count} x {role}" for role, count in Counter(roles).items())
            log(f"restarting {counted or 'nothing'} in {decision.seconds:g} s")
            time.sleep(decision.seconds)
            rolled_back |= self._groups.learner[0] in failed
            restarted += roles
            try:
                point, prefetched = self._restart(failed, checkpoints if rolled_back else None, log)
            except RayError as another:
                error = another
            else:
                return Recovery(first, restarted, rolled_back, point, prefetched, time.monotonic() - start)

    def _described(self, error: RayError) -> str:
        """Return the cause of ``error``, preceded by the role of the faulty actor if it is known."""
        actor = self._groups.with_id(faulty_actor(error))
        return f"{self._groups.role(actor)}: {fault_of(error)}" if actor else fault_of(error) or ""

    def _failed(self, error: RayError, cause: str) -> dict[Any, str]:
        """Return the actors that must be replaced, each with the reason."""
        groups, failed = self._groups, {}
        interrupted = self._weights.take_interrupted()
        if interrupted:
            # Mixed weights are worse than none, and an engine that still waits for the rest will wait forever.
            failed |= dict.fromkeys(groups.engines, f"half of its new weights ({cause})")
            for engine in groups.engines:
                kill(engine, groups.place(engine))  # a learner that broadcasts to it then stops
        if needs_restart(error) and (actor := groups.with_id(faulty_actor(error))):
            if actor in groups.learner:
                return failed | dict.fromkeys(groups.learner, cause)
            failed[actor] = cause  # only ending the process frees its memory
            if len(groups.learner) == 1 and not interrupted:
                return failed
        # After a timeout, an actor that is still busy has taken too long; after other faults, let them end their calls.
        timeout_s = GRACE if isinstance(error, GetTimeoutError) else groups.timeout_s()
        for actor in (*groups.teachers, *groups.engines):  # the learner last: it may be waiting for a teacher
            if actor not in failed and (reason := unresponsive_reason([actor], timeout_s)):
                failed[actor] = cause if reason == NO_ANSWER else reason
                if actor in groups.teachers:
                    kill(actor, groups.place(actor))  # a learner that waits for it then fails at once
        if reason := self._learner_fails(error, cause, failed, timeout_s):
            failed |= dict.fromkeys(groups.learner, reason)
        return failed

    def _learner_fails(self, error: RayError, cause: str, failed: Mapping[Any, str], timeout_s: float) -> str | None:
        """Return why all ranks of the learner must be replaced; None if they can continue."""
        groups = self._groups
        if len(groups.learner) > 1:
            if any(actor in groups.teachers for actor in failed):
                return f"its ranks may have stopped in different places ({cause})"
            timeout_s = GRACE  # no rank has work now: one that does not answer is waiting for another rank
        if failed and groups.settings.sync.method == "broadcast":
            timeout_s = GRACE  # it may be sending to an engine that is gone
        if reason := unresponsive_reason(groups.learner, timeout_s):
            return cause if reason == NO_ANSWER else reason
        try:
            versions = set(groups.get([rank.version.remote() for rank in groups.learner], "learner"))
        except RayError:
            versions = set()  # unknown
        same = versions == {self._weights.learner_version}
        return None if same else f"an update whose answer was lost ({cause})"

    def _restart(self, failed: Mapping[Any, str], checkpoints: Path | None, log: Log) -> tuple[Checkpoint | None, Refs]:
        """Replace ``failed``; load the newest of ``checkpoints``, if any, into the learner.

        Returns that checkpoint and its prefetched rollouts.
        """
        groups = self._groups
        new_learner = groups.learner[0] in failed
        if new_learner or any(engine in failed for engine in groups.engines):
            self._weights.forget_engines()
        if new_learner:
            self._weights.learner_version = 0
        if groups.shares_gpus and any(engine in failed for engine in groups.engines):
            # A new engine needs its share of the GPU, part of which the other actors' allocators may hold unused.
            alive = {role: [actor for actor in groups.by_role[role] if actor not in failed]
                     for role in ("learner", "teacher")}  # fmt: skip
            for role, actors in alive.items():
                groups.get([actor.free_memory.remote() for actor in actors], role)
        groups.replace(failed)
        groups.wait_ready(log)
        self._weights.connect()
        self._weights.sleep()
        point = checkpoint.newest(checkpoints) if checkpoints else None
        prefetched = self._restore(point.path) if point else []
        return point, prefetched
