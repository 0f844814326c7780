"""The actors of a run behind plain methods, so that a driver's schedule reads like an algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster import with_absolute_paths
from actors.engine_weights import EngineWeights
from actors.faults import Log
from actors.groups import ActorGroups
from actors.placement import Resources
from actors.recovery import FaultRecovery, Refs
from actors.rollout_actor import RolloutGroup, iter_completed
from actors.weight_sync import sync_method
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.diagnostics import PositionDiagnostics
from onpolicy_skd.learner.metrics import StepRecord
from onpolicy_skd.run.logger import PhaseTimer
from onpolicy_skd.run.supervisor import Recovery
from onpolicy_skd.selection import samples
from onpolicy_skd.tracing import Span
from onpolicy_skd.types import FilterReport, RolloutRequest, SamplingParams, Trajectory

__all__ = ["Refs", "Workers"]


class Workers:
    """Rollout engines, teachers and learner of one run.

    Methods that take or return ``Refs`` move references only; trajectories and tensors stay with the actors.  Any of
    them may raise a RayError: pass it to ``recover``, which replaces failed actors.
    """

    def __init__(
        self, settings: Settings, resources: Resources, vocabulary: int, pad_id: int, steps: int, log: Log = print
    ) -> None:
        method = sync_method(settings, resources)
        settings = with_absolute_paths(
            settings.model_copy(update={"sync": settings.sync.model_copy(update={"method": method})})
        )
        self._settings = settings
        self._vocabulary = vocabulary
        self._groups = groups = ActorGroups(settings, resources, vocabulary, pad_id, steps, log)
        self._weights = EngineWeights(groups, resources.colocated, vocabulary)
        self._recovery = FaultRecovery(groups, self._weights, self.restore)
        if 0 < resources.rollout.gpus < 1:
            # vLLM measures its GPU's memory while it starts, so the engines start before the other actors use any.
            groups.wait_engines(log)
            self._weights.sleep()
        groups.start_trainers()

    def wait_ready(self, log: Log = print) -> None:
        """Block until the cluster has room, however long that takes, and every actor is up.

        Raises what an actor's constructor raised, and GetTimeoutError if starting the actors takes longer than
        ``faults.deadline_minutes``.
        """
        self._groups.wait_ready(log)
        self._weights.connect()
        self._weights.sleep()

    def precision_warning(self) -> str | None:
        """Return a warning if an update of size ``learner.lr`` leaves most weights unchanged in the compute dtype."""
        return self._groups.call_ranks(lambda rank: rank.precision_warning.remote())

    # -- a step ----------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> Refs:
        """Start the rollouts; return for each engine a ref or, with ``pipeline.streaming``, a generator of refs."""
        rollouts = self._groups.rollouts
        return (rollouts.stream if self._settings.pipeline.streaming else rollouts.generate)(requests, sampling)

    def wait_for(self, rollout_refs: Refs) -> None:
        """Block until every rollout exists or has failed; then let colocated engines sleep."""
        _, missing = ray.wait(
            rollout_refs, num_returns=len(rollout_refs), timeout=self._groups.timeout_s(), fetch_local=False
        )
        if missing:
            raise GetTimeoutError(f"{len(missing)} of {len(rollout_refs)} rollout actors do not answer")
        self._weights.sleep()

    def filter(
        self, rollout_refs: Refs, calls: Sequence[Any] = (), timer: PhaseTimer | None = None
    ) -> tuple[FilterReport, ray.ObjectRef]:
        """Return the sample filter's report and a ref to the kept trajectories.

        With ``timer``, waits for the learner's earlier ``calls`` first: raises what they raised, and records the wait
        as the phase "learn".
        """
        answers = [rank.filter.options(num_returns=2).remote(*rollout_refs) for rank in self._groups.learner]
        if timer:
            self._groups.get(calls, "learner")
            timer.record("learn")
        return self._groups.get([report for report, _ in answers], "learner")[0], answers[0][1]

    def encode(self, kept: ray.ObjectRef) -> Refs:
        """Start the teachers on ``kept``; the learner awaits the result when it first asks for rows."""
        return [teacher.encode.remote(kept) for teacher in self._groups.teachers]

    def step(self, kept: ray.ObjectRef, encoded: Refs, report: FilterReport) -> StepRecord:
        """Make one optimizer step on ``kept`` and return its metrics; the teachers forget ``kept`` afterwards."""
        try:
            metrics = self._groups.call_ranks(lambda rank: rank.step.remote(kept, encoded))
        finally:
            self._release(report.kept)
        self._weights.learner_version = metrics.version
        return metrics

    def streamed_step(self, rollout_refs: Refs, report: FilterReport, timer: PhaseTimer) -> StepRecord | None:
        """Make one optimizer step on rollouts as they complete; the learner and the engines work at the same time.

        Fills ``report``, and ``timer`` with the driver's waits: for rollouts, for the learner, for the filter.  Returns
        the metrics, or None if no trajectory is kept.
        """
        expected = float(self._settings.rollouts_per_step)
        calls = [rank.begin_step.remote(expected) for rank in self._groups.learner]
        try:
            for ref in iter_completed(rollout_refs, self._groups.timeout_s()):
                timer.record("rollout")
                new, kept = self.filter([ref], calls, timer)
                timer.record("filter")
                report.add(new)
                calls = []
                if new.kept:
                    encoded = self.encode(kept)
                    calls = [rank.add_to_step.remote(kept, encoded) for rank in self._groups.learner]
            if not report.kept:
                return None
            self._groups.get(calls, "learner")
            metrics = self._groups.call_ranks(lambda rank: rank.finish_step.remote())
        finally:
            self._release(report.kept)
        self._weights.learner_version = metrics.version
        return metrics

    # -- everything else -------------------------------------------------------------------------------------------

    def spans(self) -> dict[str, list[Span]]:
        """Return the spans of each actor since the last call, by role (and number)."""
        spans = {}
        for role in ("rollout", "teacher", "learner"):
            actors = self._groups.by_role[role]
            for number, actor in enumerate(actors):
                name = f"{role} {number}" if role == "rollout" or len(actors) > 1 else role
                spans[name] = self._groups.get(actor.drain.remote(), role)
        return spans

    def diagnose_positions(self, trajectories: Sequence[Trajectory]) -> list[PositionDiagnostics]:
        """Return diagnostics of every position of the valid ``trajectories``; makes no update."""
        usable = set(samples.validity(trajectories, self._vocabulary, drop_truncated=False).kept)
        valid = [t for t in trajectories if t.key in usable]
        if not valid:
            return []
        self._weights.sleep()
        kept = ray.put(valid)
        try:
            encoded = self.encode(kept)
            return self._groups.call_ranks(lambda rank: rank.diagnose_positions.remote(kept, encoded), len(valid))
        finally:
            self._release([t.key for t in valid])

    def score_samples(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return the score of each sample under ``samples.metric``."""
        self._weights.sleep()
        ref = ray.put(list(trajectories))  # serialized once, not once for each rank
        return self._groups.call_ranks(lambda rank: rank.score_samples.remote(ref), len(trajectories))

    def engines(self) -> RolloutGroup:
        """Return the rollout engines, awake and with the learner's weights."""
        self._weights.push()
        return self._groups.rollouts

    def push_weights(self) -> None:
        """Send the learner's weights to every rollout engine, unless the engines hold them already."""
        self._weights.push()

    def save(
        self,
        folder: Path,
        step: int,
        version: int,
        state: dict[str, Any],
        keep: int,
        prefetched_rollouts: Sequence[Any] = (),
    ) -> Path:
        """Write a checkpoint, with the rollouts of ``step`` if they were prefetched.

        Writing may continue in the background after the return; ``finish_saving`` waits.  Raises SaveError if this
        checkpoint or the one before cannot be written, or if the learner is not at policy ``version``, for example
        because it was restarted after a fault.
        """
        return self._groups.call_ranks(
            lambda rank: rank.save.remote(folder.absolute(), step, version, state, keep, *prefetched_rollouts)
        )

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on disk.  Raises SaveError."""
        self._groups.call_ranks(lambda rank: rank.finish_saving.remote())

    def restore(self, path: Path) -> Refs:
        """Load a checkpoint into the learner; return the next step's rollouts, if the checkpoint holds them."""
        version, prefetched = self._groups.call_ranks(lambda rank: rank.restore.remote(path.absolute()))
        self._weights.learner_version = version
        return [ray.put(prefetched)] if prefetched else []

    def save_pretrained(self, folder: Path) -> None:
        """Write the student as a transformers checkpoint."""
        self._groups.call_ranks(lambda rank: rank.save_pretrained.remote(folder.absolute()))

    def recover(self, error: RayError, checkpoints: Path | None, log: Log = print) -> Recovery:
        """Replace the actors that died or hang after a method raised ``error``; the caller then repeats the method.

        A new learner starts from the newest of ``checkpoints``, or from its model if there is none.  Raises ``error``
        itself if code raised it and would raise it again, and RunError when the supervisor gives up.
        """
        return self._recovery.recover(error, checkpoints, log)

    def close(self) -> None:
        self._groups.close()

    def _release(self, keys: Sequence[str]) -> None:
        for teacher in self._groups.teachers:
            teacher.release.remote(keys)  # Ray keeps the order of calls; nothing to wait for
