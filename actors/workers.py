"""The run's actors as plain methods: what the drivers call, so that a schedule reads as one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster import wait_ready, with_absolute_paths
from actors.faults import GRACE, HUNG, Place, fault_of, faulty_role, kill, unresponsive_reason
from actors.learner_actor import LearnerActor
from actors.placement import Placement, Resources
from actors.rollout_actor import RolloutGroup
from actors.teacher_actor import TeacherActor
from actors.weight_sync import build_sync, sync_method
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.diagnostics import PositionDiagnostics
from onpolicy_skd.learner.metrics import StepRecord
from onpolicy_skd.run.exits import RunError
from onpolicy_skd.run.logger import PhaseTimer
from onpolicy_skd.run.supervisor import GiveUp, Recovery, Supervisor
from onpolicy_skd.selection import samples
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.storage.checkpoint import Checkpoint
from onpolicy_skd.tracing import Span
from onpolicy_skd.types import FilterReport, RolloutRequest, SamplingParams, Trajectory

Refs = list[ray.ObjectRef]
Log = Callable[[str], None]


class Workers:
    """Student rollouts, teacher and learner of one run, started together.

    Methods that take or return ``Refs`` move references only; trajectories and tensors stay with the actors.  Any of
    them may raise a RayError; ``recover`` tells whether that was a fault, and mends it.
    """

    def __init__(self, settings: Settings, resources: Resources, vocabulary: int, pad_id: int, steps: int) -> None:
        method = sync_method(settings, resources)
        settings = with_absolute_paths(
            settings.model_copy(update={"sync": settings.sync.model_copy(update={"method": method})})
        )
        own = settings.student
        self.supervisor = Supervisor(settings.faults)
        self._settings = settings
        self._vocabulary = vocabulary
        self._places: dict[Any, Place] = {}
        self._pushing = False  # new weights to the engines
        self._version = 0  # of the learner: optimizer steps whose answers came back
        self._pushed = 0  # of the engines; they start from the same model
        learner, teacher, rollout = resources.roles
        self._in_learner = settings.rollout.placement == "learner"
        self._colocated, self._awake = resources.colocated, True
        self._placement = placement = Placement(resources)
        self._start_teacher = lambda number: TeacherActor.options(**placement.options(teacher, number)).remote(
            settings, vocabulary, pad_id, number, teacher.count
        )
        self._start_learner = lambda rank: LearnerActor.options(**placement.options(learner, rank)).remote(
            settings, vocabulary, steps, self._teachers, rank
        )
        self.rollouts = RolloutGroup(
            own.model, settings, lambda n: placement.options(rollout, n), rollout.count, own.trust_remote_code
        )
        if 0 < rollout.gpus < 1:
            # vLLM measures its GPU while it starts: alone, lest it count the others' memory.
            wait_ready(self.rollouts.actors)
            self._rest()  # and a colocated engine sleeps before the others take theirs
        self._teachers: list[Any] = [self._start_teacher(number) for number in range(teacher.count)]
        self._learner: list[Any] = [self._start_learner(rank) for rank in range(learner.count)]
        self._joined = False
        if self._in_learner:
            self.rollouts.actors = self._learner
        self._sync = build_sync(settings, self._learner, self.rollouts)

    @property
    def _actors(self) -> list[Any]:
        # Teachers first: what they refuse is the reason why a learner that asked them for something died.
        return [*self._teachers, *self._engines, *self._learner]

    @property
    def _engines(self) -> list[Any]:
        """Those in processes of their own."""
        return [] if self._in_learner else self.rollouts.actors

    def wait_ready(self, log: Log = print) -> None:
        """Blocks until there is room and every actor is up; raises what a start refused, and GetTimeoutError if one
        takes longer than faults.deadline_minutes."""
        self._placement.wait(log)
        self._places = {}
        # Engines last: what the learner says of a model that cannot be loaded is clearer.
        sort_by_request = sorted(self._actors, key=lambda actor: self._role(actor) == "rollout")
        wait_ready(sort_by_request, log, self._timeout_s(), self._places)
        if len(self._learner) > 1 and not self._joined:
            address = ray.get(self._learner[0].meeting.remote())
            self._ask(lambda rank: rank.join_ranks.remote(address))
            self._joined = True
        self._rest()

    # -- a step ----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Refs:
        return self.rollouts.generate(requests, sampling, self._settings.pipeline.streaming)

    def finish(self, parts: Refs) -> None:
        """Blocks until all ``parts`` exist, or one of them never will; then colocated engines sleep."""
        _, missing = ray.wait(parts, num_returns=len(parts), timeout=self._timeout_s(), fetch_local=False)
        if missing:
            raise GetTimeoutError(f"{len(missing)} of {len(parts)} rollout actors do not answer")
        self._rest()

    def as_they_come(self, parts: Refs) -> Iterator[ray.ObjectRef]:
        """Refs to trajectories, some at a time, as soon as they exist; ``parts`` may be generators of such."""
        waiting: list[Any] = list(parts)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=self._timeout_s(), fetch_local=False)
            if not ready:
                raise GetTimeoutError(f"{len(waiting)} of {len(parts)} rollout actors do not answer")
            one: Any = ready[0]
            if not isinstance(one, ray.ObjectRefGenerator):
                yield one
            elif (part := next(one, None)) is not None:
                waiting.append(one)
                yield part

    def filter(
        self, parts: Refs, calls: Sequence[Any] = (), timer: PhaseTimer | None = None
    ) -> tuple[FilterReport, ray.ObjectRef]:
        """Return the sample filter's report and a ref to the kept trajectories.

        The learner works off earlier ``calls`` first; raises what they raised, and gives their time to ``timer``.
        """
        answers = [rank.filter.options(num_returns=2).remote(*parts) for rank in self._learner]
        if timer:
            self._get(calls)
            timer.record("learn")
        return self._get([report for report, _ in answers])[0], answers[0][1]

    def encode(self, kept: ray.ObjectRef) -> Refs:
        """The teachers start on ``kept`` at once; the learner awaits the result when it first wants rows."""
        return [teacher.encode.remote(kept) for teacher in self._teachers]

    def step(self, kept: ray.ObjectRef, encoded: Refs, report: FilterReport) -> StepRecord:
        """One optimizer step; the teacher forgets ``kept`` afterwards."""
        try:
            metrics = self._ask(lambda rank: rank.step.remote(kept, encoded))
        finally:
            self._release(report.kept)
        self._version = metrics.version
        return metrics

    def streamed_step(self, parts: Refs, report: FilterReport, timer: PhaseTimer) -> StepRecord | None:
        """Make one optimizer step on ``parts`` as they complete; the engines generate the others at the same time.

        Fills ``report``, and ``timer`` with the driver's waits: for rollouts, for the learner, for the filter.  Returns
        the metrics, or None if no trajectory is kept.
        """
        expected = float(self._settings.rollouts_per_step)
        calls = [rank.begin.remote(expected) for rank in self._learner]
        try:
            for part in self.as_they_come(parts):
                timer.record("rollout")
                own, kept = self.filter([part], calls, timer)
                timer.record("filter")
                report.add(own)
                calls = []
                if own.kept:
                    encoded = self.encode(kept)
                    calls = [rank.add.remote(kept, encoded) for rank in self._learner]
            if not report.kept:
                return None
            self._get(calls)
            metrics = self._ask(lambda rank: rank.finish.remote())
        finally:
            self._release(report.kept)
        self._version = metrics.version
        return metrics

    # -- everything else -------------------------------------------------------------------------------------------

    def spans(self) -> dict[str, list[Span]]:
        """What each actor did since this was last asked."""
        found = {}
        for role, actors in (("rollout", self._engines), ("teacher", self._teachers), ("learner", self._learner)):
            for number, actor in enumerate(actors):
                name = f"{role} {number}" if role == "rollout" or len(actors) > 1 else role
                found[name] = self._get(actor.drain.remote())
        return found

    def diagnose_positions(self, trajectories: Sequence[Trajectory]) -> list[PositionDiagnostics]:
        """The valid ones of ``trajectories``, position by position.  No update."""
        usable = set(samples.validity(trajectories, self._vocabulary, drop_truncated=False).kept)
        valid = [t for t in trajectories if t.key in usable]
        if not valid:
            return []
        self._rest()
        kept = ray.put(valid)
        try:
            encoded = self.encode(kept)
            return self._ask(lambda rank: rank.diagnose_positions.remote(kept, encoded), len(valid))
        finally:
            self._release([t.key for t in valid])

    def score_samples(self, trajectories: Sequence[Trajectory]) -> list[float]:
        self._rest()
        shared = ray.put(list(trajectories))  # serialized once, not once per rank
        return self._ask(lambda rank: rank.score_samples.remote(shared), len(trajectories))

    def engines(self) -> RolloutGroup:
        """The rollout engines, awake and with the learner's weights."""
        self.push_weights()
        return self.rollouts

    def push_weights(self) -> None:
        """Gives every rollout engine the learner's weights, unless it has them."""
        if self._pushed != self._version and not self._in_learner:
            self._pushing = True
            self._sync.push(self._version, self._timeout_s())
            self._pushing = False
            self._pushed, self._awake = self._version, True

    def _rest(self) -> None:
        """Colocated engines give their memory back, and with it their weights."""
        if self._colocated and self._awake:
            self._get([actor.sleep.remote() for actor in self._engines])
            self._pushed, self._awake = -1, False

    def save(
        self, folder: Path, step: int, version: int, state: dict[str, Any], keep: int, ahead: Sequence[Any] = ()
    ) -> Path:
        """``ahead``: rollouts of ``step``, if they were made before it.

        Raises SaveError, also if the learner is not at ``version``: after a failure it may be new.
        """
        return self._ask(lambda rank: rank.save.remote(folder.absolute(), step, version, state, keep, *ahead))

    def restore(self, path: Path) -> Refs:
        """Loads a checkpoint into the learner; returns the rollouts of the next step, if they were made ahead."""
        self._version, ahead = self._ask(lambda rank: rank.restore.remote(path.absolute()))
        return [ray.put(ahead)] if ahead else []

    def save_pretrained(self, folder: Path) -> None:
        self._ask(lambda rank: rank.save_pretrained.remote(folder.absolute()))

    def _release(self, keys: Sequence[str]) -> None:
        for teacher in self._teachers:
            teacher.release.remote(keys)  # in order with the calls before and after; nothing to wait for

    def _timeout_s(self, trajectories: int = 0) -> float:
        return self._settings.faults.timeout_s(trajectories / self._settings.rollouts_per_step)

    def _ask(self, call: Callable[[Any], ray.ObjectRef], trajectories: int = 0) -> Any:
        """Rank 0's answer to a ``call`` of every rank of the learner; raises as soon as any of them fails."""
        return self._get([call(rank) for rank in self._learner], trajectories)[0]

    def _get(self, refs: Any, trajectories: int = 0) -> Any:
        """What calls on so many ``trajectories`` returned.  Raises GetTimeoutError if they take too long."""
        return ray.get(refs, timeout=self._timeout_s(trajectories))

    # -- faults ----------------------------------------------------------------------------------------------------

    def recover(self, error: RayError, checkpoints: Path | None, log: Log = print) -> Recovery:
        """After ``error`` of any method: new actors in place of those that died or hang, with the current weights.

        A new learner starts from the newest of ``checkpoints``, or anew; with None anew.  The caller does what failed
        again.  Raises ``error`` if it is no fault but would come again, and RunError when the supervisor gives up.
        """
        started, restarted, rolled_back = time.monotonic(), [], False
        first = fault_of(error) or ""
        while True:
            if (cause := fault_of(error)) is None:
                raise error
            log(f"fault: {cause}")
            failed = self._failed(error, cause)
            for actor in failed:
                kill(actor, self._places.get(actor))
            decision = self.supervisor.decide({self._role(a): why for a, why in failed.items()} or {"ray": cause})
            if isinstance(decision, GiveUp):
                raise RunError(decision.reason)
            names = [self._role(a) for a in failed]
            counted = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
            log(f"restarting {counted or 'nothing'} in {decision.seconds:g} s")
            time.sleep(decision.seconds)
            rolled_back |= self._learner[0] in failed
            restarted += names
            try:
                point, ahead = self._restart(failed, checkpoints if rolled_back else None, log)
            except RayError as again:
                error = again
            else:
                return Recovery(first, restarted, rolled_back, point, ahead, time.monotonic() - started)

    def _failed(self, error: RayError, cause: str) -> dict[Any, str]:
        """The actors that are of no use any more, and why."""
        kind = (faulty_role(error) or "").lower()
        # Out of memory: what a process holds is given back by its end alone.
        found = {actor: cause for actor in self._actors if self._role(actor) == kind}
        torn = self._pushing and self._settings.sync.method != "object_store"
        self._pushing = False
        if torn:
            # Half of the new weights is worse than none, and whoever still waits for the rest does so for good.
            found |= dict.fromkeys(self._engines, f"half of its new weights ({cause})")
        if kind and (kind == "learner" or (len(self._learner) == 1 and not torn)):
            return found
        # After a timeout, whoever is at work has been for too long; else the others may finish what they are at.
        timeout_s = GRACE if isinstance(error, GetTimeoutError) else self._timeout_s()
        for actor in (*self._teachers, *self._engines):  # the learner last: it may be waiting for a teacher
            if actor in found:
                continue
            why = unresponsive_reason([actor], timeout_s)
            if why:
                found[actor] = cause if why == HUNG else why
                if actor in self._teachers:
                    kill(actor, self._places.get(actor))  # which lets a learner go that waits for it
        if why := self._learner_fails(error, cause, found, timeout_s):
            found |= dict.fromkeys(self._learner, why)
        return found

    def _learner_fails(self, error: RayError, cause: str, found: Mapping[Any, str], timeout_s: float) -> str | None:
        """Why the learner is of no use any more, all ranks of it: one cannot go on without the others."""
        if len(self._learner) > 1:
            if any(actor in self._teachers for actor in found):
                return f"its ranks may have stopped in different places ({cause})"
            timeout_s = GRACE  # nothing is asked of them now: a rank that is silent waits for another
        if found and self._settings.sync.method == "broadcast":
            timeout_s = GRACE  # it may be sending to an engine that is gone
        if why := unresponsive_reason(self._learner, timeout_s):
            return cause if why == HUNG else why
        try:
            versions = set(self._get([rank.version.remote() for rank in self._learner]))
        except RayError:
            versions = set()  # nobody knows
        return None if versions == {self._version} else f"an update whose answer was lost ({cause})"

    def _role(self, actor: Any) -> str:
        return "teacher" if actor in self._teachers else "learner" if actor in self._learner else "rollout"

    def _restart(self, failed: Mapping[Any, str], checkpoints: Path | None, log: Log) -> tuple[Checkpoint | None, Refs]:
        """Everyone at work again; with ``checkpoints`` the learner is put where the newest is, which is returned, with
        the rollouts it holds."""
        new_learner = self._learner[0] in failed
        if dead := [number for number, actor in enumerate(self._teachers) if actor in failed]:
            for number in dead:
                self._teachers[number] = self._start_teacher(number)
            if not new_learner:
                for rank in self._learner:
                    rank.use_teachers.remote(self._teachers)
        for number, actor in enumerate(self._engines):
            if actor in failed:
                self.rollouts.restart(number)
                self._pushed = -1
        if new_learner:
            self._learner = [self._start_learner(rank) for rank in range(len(self._learner))]
            self._joined, self._version, self._pushed = False, 0, -1
        if self._in_learner:
            self.rollouts.actors = self._learner
        self._sync = build_sync(self._settings, self._learner, self.rollouts)
        self._awake = True
        self.wait_ready(log)
        point = checkpoint.newest(checkpoints) if checkpoints else None
        ahead = self.restore(point.path) if point else []
        return point, ahead

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._placement.remove()
