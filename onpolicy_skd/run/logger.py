"""The progress of a run: on the console, in metrics.jsonl, in checkpoints and in summary.json."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from onpolicy_skd.config.errors import first_line
from onpolicy_skd.evaluation.evaluate import Evaluation
from onpolicy_skd.learner.learner import GradientOverflowError, NonFiniteLossError
from onpolicy_skd.learner.metrics import StepRecord
from onpolicy_skd.report import card, summary
from onpolicy_skd.report.console import Display
from onpolicy_skd.report.metrics_log import Event, MetricsLog, events_of, read, steps_of
from onpolicy_skd.report.timeline import write_timeline
from onpolicy_skd.report.trackers import Trackers
from onpolicy_skd.run import hub
from onpolicy_skd.run.exits import RunError, cause_of
from onpolicy_skd.run.health import HealthMonitor
from onpolicy_skd.run.prepare import Run
from onpolicy_skd.run.stop import as_stopped
from onpolicy_skd.run.supervisor import Recovery
from onpolicy_skd.storage.files import SaveError, write_text
from onpolicy_skd.tracing import Span, within
from onpolicy_skd.types import FilterReport

EMPTY_BATCH_ADVICE = {
    "no_pace": "raise rollout.n: every prompt was always right or always wrong",
    "right": "raise learner.batch_size or set samples.correctness=any",
    "wrong": "raise learner.batch_size or set samples.correctness=any",
}


def evaluation_value(result: dict[str, Any]) -> float:
    """Return the value to maximize over evaluations: exact match or, on packed text, minus the divergence."""
    return result["match"]["share"] if "match" in result else -result["divergence_reference"]


class TrainingWorkers(Protocol):
    """The methods of ``actors.workers.Workers`` that a logger calls."""

    def save(
        self,
        folder: Path,
        step: int,
        version: int,
        state: dict[str, Any],
        keep: int,
        rollout_refs: Sequence[Any] = (),
        /,
    ) -> Path: ...

    def finish_saving(self) -> None: ...

    def save_pretrained(self, folder: Path) -> None: ...

    def spans(self) -> dict[str, list[Span]]: ...


class PhaseTimer:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("rollout", "filter", "learn", "sync"), 0.0)
        self._last = time.perf_counter()

    def record(self, phase: str) -> None:
        """Add the seconds since the last call to ``phase``."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class RunLogger:
    """Logger of a run: shows its progress; writes its metrics, checkpoints and summary, and resumes them."""

    def __init__(self, run: Run, first_step: int, state: dict[str, Any]) -> None:
        self.evaluations: dict[str, Any] = dict(state.get("evaluations", {}))
        self.finished = False
        self.checkpoints = run.paths.checkpoints
        self._run = run
        self._grows = run.settings.rollout.max_tokens_start is not None
        self._resumed = bool(state)
        self._has_checkpoint = bool(state)
        self._seconds_before = state.get("seconds", 0.0)
        self._start_time = time.monotonic()
        self._display = Display(run.steps, first_step, run.settings.alignment.divergence)
        self._trackers = Trackers(run.settings, first_step, bool(state), self.log)
        self._open(first_step, state, bool(state))

    def __enter__(self) -> RunLogger:
        self._display.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._display.__exit__(*error)
        if stopped := as_stopped(error[1]):
            self.conclude("stopped", f"{stopped} outside the steps")
        self._metrics.close()
        if error[0] is not None:
            self._trackers.close()  # otherwise conclude() has closed them

    def log(self, text: str) -> None:
        self._display.log(text)

    def start(self, roles: Sequence[Any]) -> None:
        """Log what the run is about to do; save which problems are held out for validation."""
        run = self._run
        self.log(f"run folder: {run.folder.absolute()}")
        run.save_validation()
        if run.validation:
            self.log(f"{len(run.validation)} training problems are held out for validation")
        self.log(f"{len(run.train)} prompts, {run.steps} steps of {run.settings.rollouts_per_step} trajectories")
        if self._resumed:
            self.log(f"resuming after step {self._steps}")
        if run.settings.hub.push and not hub.has_login():
            self.log(f"warning: hub.push={run.settings.hub.push}: {hub.NO_LOGIN} before the run ends")
        self.log("starting " + ", ".join(f"{role.count} x {role.name}" for role in roles if role.count))

    def _open(self, first_step: int, state: dict[str, Any], resumed: bool) -> None:
        """Continue the run at ``first_step`` with its metrics up to there and the ``state`` of the checkpoint."""
        self._steps = first_step
        self._version = state.get("version", 0)  # the learner's version after these steps
        self._skipped = state.get("skipped", 0)
        self.last_eval_step = state.get("last_eval_step", 0)  # of the last evaluation during training
        self._metrics = MetricsLog(self._run.folder, first_step, resumed, self._trackers)
        records = read(self._metrics.path)
        self._health = HealthMonitor(self._run.settings.sync.max_gap, self._grows)
        for record in steps_of(records):
            deque(self._health.check(record), maxlen=0)  # only for its state: these warnings are logged already
        self._restarts = Counter(role for r in events_of(records, Event.FAULT) for role in r["restarted"])
        self.best_step, self._best_value = self._read_best(records, resumed)

    def _read_best(self, records: Sequence[dict[str, Any]], resumed: bool) -> tuple[int | None, float]:
        """Return step and value of the best evaluation during training so far.

        With ``run.keep_best`` that is the one whose student is in ``best/``, even if the run has since been rolled back
        to a checkpoint from before it.
        """
        if self._run.settings.run.keep_best:
            file = self._run.paths.best_record
            best = json.loads(file.read_text(encoding="utf-8")) if resumed and file.exists() else {}
            return best.get("step"), best.get("value", -math.inf)
        during = [r for r in events_of(records, Event.EVALUATION) if r["name"] == "during"]
        best = max(during, key=evaluation_value, default=None)
        return (best["step"], evaluation_value(best)) if best else (None, -math.inf)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this logger."""
        return {
            "evaluations": self.evaluations,
            "seconds": self._seconds(),
            "skipped": self._skipped,
            "last_eval_step": self.last_eval_step,
        }

    def save(self, workers: TrainingWorkers, step: int, required: bool, rollout_refs: Sequence[Any] = ()) -> None:
        """Save a checkpoint.  If that fails, raise RunError if the checkpoint is ``required``, else log the failure."""
        try:
            self._save(workers, step, required, rollout_refs)
            self._has_checkpoint |= any(self.checkpoints.glob("step-*"))  # not one that is still being written
        except SaveError as error:
            reason = str(cause_of(error))
            if required:
                raise RunError(f"{reason}; make room and use resume=auto") from None
            self.log(f"{reason}; continuing with the checkpoint before it")
            with contextlib.suppress(OSError):  # the disk may still be full
                self._metrics.write({"step": step, "event": Event.UNSAVED, "reason": reason})

    def _save(self, workers: TrainingWorkers, step: int, wait: bool, rollout_refs: Sequence[Any] = ()) -> None:
        keep = self._run.settings.run.keep_checkpoints
        workers.save(self.checkpoints, step, self._version, self.state(), keep, rollout_refs)
        if wait:
            workers.finish_saving()

    def validated(self, workers: TrainingWorkers, step: int, evaluation: Evaluation) -> None:
        """Log an evaluation during training; with ``run.keep_best`` save the student of the best one as best/."""
        value = evaluation_value(evaluation.result)
        keep_best = self._run.settings.run.keep_best
        if value > self._best_value and (not keep_best or self._save_best(workers, step, value)):
            self.best_step, self._best_value = step, value
        self.last_eval_step = step
        self.evaluation("during", step, evaluation)

    def _save_best(self, workers: TrainingWorkers, step: int, value: float) -> bool:
        """Save best/ and its record; return True if that worked.  A kill in between leaves no record, so no best."""
        self._run.paths.best_record.unlink(missing_ok=True)
        try:
            workers.save_pretrained(self._run.paths.best)
        except SaveError as error:
            self.log(f"{cause_of(error)}; best/ is not updated")
            if self.best_step is not None:
                self._write_best(self.best_step, self._best_value)
            return False
        self._write_best(step, value)
        return True

    def _write_best(self, step: int, value: float) -> None:
        write_text(self._run.paths.best_record, json.dumps({"step": step, "value": value}) + "\n")

    def recovered(self, step: int, recovery: Recovery) -> int:
        """Log a fault in ``step``; return the step to continue with.  Raises RunError if no checkpoint can be read."""
        if recovery.rolled_back and recovery.checkpoint is None and self._has_checkpoint:
            raise RunError(f"{recovery.cause}; and none of the checkpoints in {self.checkpoints} can be read")
        if recovery.rolled_back:  # continue as a resumed run does
            checkpoint = recovery.checkpoint
            step = checkpoint.step if checkpoint else 0
            self._metrics.close()
            self._trackers.rewind(step)
            self._open(step, checkpoint.state if checkpoint else {}, True)
        self.fault(recovery, step)
        origin = " from the newest checkpoint" if recovery.rolled_back else ""
        self.log(f"continuing with step {step + 1}{origin}")
        return step

    def fault(self, recovery: Recovery, step: int = 0) -> None:
        """Record a fault that the workers recovered from."""
        self._restarts.update(recovery.restarted)
        seconds = round(recovery.seconds, 1)
        record = {"restarted": recovery.restarted, "cause": recovery.cause, "down_seconds": seconds}
        self._metrics.write({"step": step, "event": Event.FAULT, **record})

    def step(self, step: int, report: FilterReport, metrics: StepRecord, timer: PhaseTimer) -> None:
        record = {
            "step": step,
            **step_counts(report),
            **metrics.as_dict(),
            **({"max_tokens": self._run.max_tokens(step)} if self._grows else {}),
            "seconds": timer.seconds | {"step": timer.total},
            "tokens_per_second": metrics.train_tokens / timer.total,
        }
        self._metrics.write(record)
        self._steps, self._version = step + 1, metrics.version  # only after the record is written
        self._display.step(record)
        for guard, text in self._health.check(record):
            self.warning(step, guard, text)

    def warning(self, step: int, guard: str, text: str) -> None:
        """Log and record a warning."""
        self._metrics.write({"step": step, "event": Event.WARNING, "guard": guard, "text": text})
        self.log(f"warning ({guard}): {text}")

    def timeline(self, workers: TrainingWorkers, step: int, timer: PhaseTimer) -> None:
        """Write the timeline of the step that has just ended."""
        now = time.time()
        try:
            write_timeline(self._run.folder, within(workers.spans(), now - timer.total, now), step)
        except OSError as error:
            self.log(f"no timeline: {error}")

    def empty_batch(self, step: int, report: FilterReport) -> None:
        """Record a step without an update because the filter kept no sample."""
        self._steps = step + 1
        self._metrics.write({"step": step, "event": Event.EMPTY_BATCH, **step_counts(report)})
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        most = max(report.dropped, key=lambda reason: report.dropped[reason], default="")
        advice = EMPTY_BATCH_ADVICE.get(most, "raise rollout.max_tokens or set samples.truncated=keep")
        self.log(
            f"step {step + 1}: no update, no sample left of {report.generated} ({reasons}). If this repeats, {advice}"
        )

    def skipped(self, step: int, report: FilterReport, error: NonFiniteLossError) -> None:
        """Record a step without an update.

        Raises RunError after more than ``learner.max_skipped`` of them.  Overflows of float16 gradients do not count,
        because each halves the loss scale.
        """
        self._steps = step + 1
        if isinstance(error, GradientOverflowError):
            self._metrics.write({"step": step, "event": Event.OVERFLOW, "generated": report.generated})
            self.log(f"step {step + 1}: no update: {error}")
            return
        self._skipped += 1
        bound = self._run.settings.learner.max_skipped
        reason = {"reason": str(error), "samples": error.samples}
        self._metrics.write({"step": step, "event": Event.SKIPPED, "generated": report.generated} | reason)
        self.log(f"step {step + 1}: no update, {self._skipped} so far (learner.max_skipped={bound}): {error}")
        if self._skipped > bound:
            raise RunError(
                f"{self._skipped} steps had a loss or gradient that is not finite, learner.max_skipped={bound}; the "
                f"last: {error}. The samples of each are in {self._metrics.path}"
            )

    def evaluation(self, name: str, step: int, evaluation: Evaluation) -> None:
        """Log an evaluation; ``name`` is before, during, after or teacher."""
        result = self.evaluations[name] = evaluation.result
        if evaluation.records:
            evaluation.write_records(self._run.paths.evaluation(name, step))
        if name != "teacher":
            self._metrics.write({"step": step, "event": Event.EVALUATION, "name": name, **result})
        figures = []
        if "match" in result:
            match, strict = result["match"], result["strict"]
            share = summary.percent(match["share"], match["interval"])
            figures = [f"exact match {share} of {result['problems']}", f"strict {summary.percent(strict['share'])}"]
        for key, text in (("divergence", "its rollouts"), ("divergence_reference", "reference texts")):
            if result.get(key) is not None:
                figures.append(f"divergence {result[key]:.4f} nats per token on {text}")
        self.log(f"{name}: " + ", ".join(figures))

    def on_failure(self, workers: TrainingWorkers, *failures: type[Exception]) -> Callable[..., bool]:
        """Return an exit callback for a run that fails with RunError, OSError or one of ``failures``.

        It saves a checkpoint, if the learner is alive, and a summary with the reason.
        """

        def leave(_: type | None, error: BaseException | None, __: Any) -> bool:
            if isinstance(error, (RunError, OSError, *failures)):
                try:
                    self._save(workers, self._steps, wait=True)
                except failures as unsaved:
                    self.log(f"no checkpoint of this moment: {first_line(cause_of(unsaved))}")
                try:
                    self.conclude("failed", str(cause_of(error)))
                except OSError as full:
                    self.log(f"no summary: {full}")
            return False

        return leave

    def conclude(self, status: str, reason: str | None = None) -> None:
        """Write summary, report and, for a finished run, the model card; log the closing lines; close the trackers."""
        settings = self._run.settings
        result = summary.build(settings, self.evaluations, status, self._steps, self._seconds(), reason)
        result |= {"restarts": self._restarts, "best_step": self.best_step}
        report = summary.write(self._run.folder, result, settings)
        if status == "finished":
            card.write(settings, result)
        shares, intervals = result["exact_match"], result["exact_match_interval"]
        for name in summary.EVALUATIONS:
            if shares[name] is not None:
                self.log(f"exact match {name:>7}: {summary.percent(shares[name], intervals[name])}")
        self.log(f"{status} after {self._steps} steps, {result['seconds']:.0f} s; report: {report}")
        if status == "stopped":
            self.log("the same command with resume=auto continues from the last checkpoint")
        paths = self._run.paths
        if status == "finished" and settings.generates:
            self.log(f"ask the student: skd chat --model {paths.final}")
        token_views = sorted(paths.evaluations.glob("tokens-*.jsonl"))
        self._trackers.send([paths.curves, paths.timeline_image], token_views, self._steps)
        self._trackers.close()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._start_time


def step_counts(report: FilterReport) -> dict[str, Any]:
    """Return the counts of generated and dropped trajectories; ``truncated`` is a share of the student's rollouts."""
    counts: dict[str, Any] = {"generated": report.generated, "dropped": report.dropped}
    if report.student_rollouts:
        counts["truncated"] = report.truncated / report.student_rollouts
    return counts
