"""What a run has found out: shown, written to metrics.jsonl, and carried in checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from onpolicy_skd.evaluation.evaluate import Evaluation
from onpolicy_skd.learner.learner import NonFiniteLossError
from onpolicy_skd.report import summary
from onpolicy_skd.report.console import Display
from onpolicy_skd.report.metrics_log import MetricsLog, read
from onpolicy_skd.report.timeline import write_timeline
from onpolicy_skd.run.exits import RunError, cause_of, first_line
from onpolicy_skd.run.health import HealthMonitor
from onpolicy_skd.run.prepare import Run
from onpolicy_skd.run.stop import Stopped
from onpolicy_skd.run.supervisor import Recovery
from onpolicy_skd.storage.files import SaveError
from onpolicy_skd.tracing import Span, within

EMPTY_BATCH_ADVICE = {
    "no_pace": "raise rollout.n: every prompt was always right or always wrong",
    "right": "raise learner.batch_size or set samples.correctness=any",
    "wrong": "raise learner.batch_size or set samples.correctness=any",
}


def evaluation_value(result: dict[str, Any]) -> float:
    """What the best evaluation has most of: exact match or, where nothing is answered, nearness to the teacher."""
    return result["match"]["share"] if "match" in result else -result["divergence_reference"]


class TrainingWorkers(Protocol):
    """The methods of ``actors.workers.Workers`` that a logger calls."""

    def save(
        self, folder: Path, step: int, version: int, state: dict[str, Any], keep: int, ahead: Sequence[Any] = ()
    ) -> Path: ...

    def save_pretrained(self, folder: Path) -> None: ...

    def spans(self) -> dict[str, list[Span]]: ...


class PhaseTimer:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("rollout", "filter", "learn", "sync"), 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class RunLogger:
    """What the run has found out: shown, written to metrics.jsonl, and carried in checkpoints."""

    def __init__(self, run: Run, first_step: int, state: dict[str, Any]) -> None:
        self.evaluations: dict[str, Any] = dict(state.get("evaluations", {}))
        self.finished = False
        self._run = run
        self._seconds_before = state.get("seconds", 0.0)
        self.checkpoints = run.folder / "checkpoints"
        self.last_eval_step = 0  # step of the last evaluation during training
        self.best_step: int | None = None  # of the best one
        self._best = -math.inf
        self._saved = bool(state)
        self._version = self._skipped = 0
        self._load(state)
        self._started = time.monotonic()
        self._open(first_step, bool(state))
        self._display = Display(run.steps, first_step)

    def __enter__(self) -> RunLogger:
        self._display.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._display.__exit__(*problem)
        if isinstance(problem[1], Stopped):
            self.conclude("stopped", f"{problem[1]} outside the steps")
        self._metrics.close()

    def log(self, text: str) -> None:
        self._display.log(text)

    def _open(self, first_step: int, resumed: bool) -> None:
        """The metrics as they were before ``first_step``."""
        self._steps = first_step
        self._metrics = MetricsLog(self._run.folder, first_step, self._run.settings.run.tensorboard, resumed)
        self._health = HealthMonitor(self._run.settings.sync.max_gap)
        self._restarts: Counter[str] = Counter()
        for record in read(self._metrics.path):
            if "loss" in record:
                deque(self._health.see(record), maxlen=0)  # what there was to say has been said
            self._restarts.update(record.get("restarted", ()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the logbook."""
        return {
            "evaluations": self.evaluations,
            "seconds": self._seconds(),
            "skipped": self._skipped,
            "last_eval_step": self.last_eval_step,
            "best": [self.best_step, self._best] if self.best_step is not None else None,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._version = state.get("version", 0)  # of the learner after the steps so far
        self._skipped = state.get("skipped", 0)
        self.last_eval_step = state.get("last_eval_step", 0)
        self.best_step, self._best = state.get("best") or (None, -math.inf)

    def save(self, workers: TrainingWorkers, step: int, must: bool, ahead: Sequence[Any] = ()) -> None:
        """A checkpoint.  One that cannot be written ends the run if it ``must`` be; else the one before has to do."""
        try:
            self._save(workers, step, ahead)
            self._saved = True
        except SaveError as error:
            problem = str(cause_of(error))
            if must:
                raise RunError(f"{problem}; make room and use resume=auto") from None
            self.log(f"{problem}; going on, with the checkpoint before it")
            with contextlib.suppress(OSError):  # the same disk
                self._metrics.write({"step": step, "event": "unsaved", "reason": problem})

    def _save(self, workers: TrainingWorkers, step: int, ahead: Sequence[Any] = ()) -> None:
        keep = self._run.settings.run.keep_checkpoints
        workers.save(self.checkpoints, step, self._version, self.state(), keep, ahead)

    def is_best(self, done: Evaluation) -> bool:
        """Of the evaluations during training so far."""
        return evaluation_value(done.result) > self._best

    def save_best(self, workers: TrainingWorkers) -> None:
        try:
            workers.save_pretrained(self._run.folder / "best")
        except SaveError as error:
            self.log(f"{cause_of(error)}; going on with the best student of before")

    def recovered(self, step: int, done: Recovery) -> int:
        """The step to go on with after a fault in ``step``."""
        if done.rolled_back and done.checkpoint is None and self._saved:
            raise RunError(f"{done.cause}; and none of the checkpoints in {self.checkpoints} can be read")
        back = (done.checkpoint.step if done.checkpoint else 0) if done.rolled_back else step
        if done.rolled_back:  # as a resumed run would
            self._load(done.checkpoint.state if done.checkpoint else {})
            self._metrics.close()
            self._open(back, True)
        self.mended(done, back)
        self.log(f"going on with step {back}" + (" from the newest checkpoint" if done.rolled_back else ""))
        return back

    def mended(self, done: Recovery, step: int = 0) -> None:
        self._restarts.update(done.restarted)
        record = {"restarted": done.restarted, "cause": done.cause, "down_seconds": round(done.seconds, 1)}
        self._metrics.write({"step": step, "event": "fault", **record})

    def step(self, step: int, report: Any, found: dict[str, float], clock: PhaseTimer) -> None:
        total = clock.total
        record = {
            "step": step,
            "generated": report.generated,
            "dropped": report.dropped,
            **found,
            "seconds": clock.seconds | {"step": total},
            "tokens_per_second": found["train_tokens"] / total,
        }
        self._metrics.write(record)
        self._steps, self._version = step + 1, int(found["version"])  # not before the record is safe
        self._display.step(record)
        for guard, text in self._health.see(record):
            self._metrics.write({"step": step, "event": "warning", "guard": guard, "text": text})
            self.log(f"warning ({guard}): {text}")

    def timeline(self, workers: TrainingWorkers, step: int, clock: PhaseTimer) -> None:
        """Who was busy when, in a step that has just ended."""
        now = time.time()
        try:
            write_timeline(self._run.folder, within(workers.spans(), now - clock.total, now), step)
        except OSError as error:
            self.log(f"no timeline: {error}")

    def empty_batch(self, step: int, report: Any) -> None:
        self._steps = step + 1
        self._metrics.write(
            {"step": step, "event": "empty_batch", "generated": report.generated, "dropped": report.dropped}
        )
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        worst = max(report.dropped, key=lambda reason: report.dropped[reason])
        advice = EMPTY_BATCH_ADVICE.get(worst, "raise rollout.max_tokens or set samples.truncated=keep")
        self.log(f"step {step}: no sample left of {report.generated} ({reasons}); no update. If this goes on, {advice}")

    def skipped(self, step: int, report: Any, problem: NonFiniteLossError) -> None:
        """A step without an update.  Raises RunError after more than ``learner.max_skipped`` of them."""
        self._steps = step + 1
        self._skipped += 1
        bound = self._run.settings.learner.max_skipped
        why = {"reason": str(problem), "samples": problem.samples}
        self._metrics.write({"step": step, "event": "skipped", "generated": report.generated} | why)
        self.log(f"step {step}: no update, {self._skipped} so far (learner.max_skipped={bound}): {problem}")
        if self._skipped > bound:
            raise RunError(
                f"{self._skipped} steps had a loss or gradient that is not finite, learner.max_skipped={bound}; the "
                f"last: {problem}. The samples of each are in {self._metrics.path}"
            )

    def evaluation(self, name: str, step: int, done: Evaluation) -> None:
        self.evaluations[name] = done.result
        if name == "during":
            self.last_eval_step = step
            if self.is_best(done):
                self.best_step, self._best = step, evaluation_value(done.result)
        if done.records:
            done.write_records(self._run.folder / "evaluations" / f"{name}-{step:06d}.jsonl")
        if name != "teacher":
            self._metrics.write({"step": step, "event": "evaluation", "name": name, **done.result})
        parts = []
        if "match" in done.result:
            match, strict = done.result["match"], done.result["strict"]
            share = summary.percent(match["share"], match["interval"])
            parts = [f"exact match {share} of {done.result['problems']}", f"strict {summary.percent(strict['share'])}"]
        for key, where in (("divergence", "its rollouts"), ("divergence_reference", "reference texts")):
            if done.result.get(key) is not None:
                parts.append(f"divergence {done.result[key]:.4f} nats per token on {where}")
        self.log(f"{name}: " + ", ".join(parts))

    def on_failure(self, workers: TrainingWorkers, *failures: type[Exception]) -> Callable[..., bool]:
        """An exit callback that keeps what was earned when a run breaks: a checkpoint, if the learner lives, and the
        summary with the reason."""

        def leave(_: type | None, error: BaseException | None, __: Any) -> bool:
            if isinstance(error, (RunError, OSError, *failures)):
                try:
                    self._save(workers, self._steps)
                except failures as lost:
                    self.log(f"no checkpoint of this moment: {first_line(cause_of(lost))}")
                try:
                    self.conclude("failed", str(cause_of(error)))
                except OSError as full:
                    self.log(f"no summary: {full}")
            return False

        return leave

    def conclude(self, status: str, reason: str | None = None) -> None:
        """summary.json, report.md and the closing lines."""
        settings = self._run.settings
        built = summary.build(settings, self.evaluations, status, self._steps, self._seconds(), reason)
        built |= {"restarts": self._restarts, "best_step": self.best_step}
        report = summary.write(self._run.folder, built, settings)
        shares, intervals = built["exact_match"], built["exact_match_interval"]
        for name in summary.WHEN:
            if shares[name] is not None:
                self.log(f"exact match {name:>7}: {summary.percent(shares[name], intervals[name])}")
        self.log(f"{status} after {self._steps} steps, {built['seconds']:.0f} s; report: {report}")
        if status == "stopped":
            self.log("the same command with resume=auto goes on from the last checkpoint")

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started
