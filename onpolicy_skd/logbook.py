"""What a run has found out: shown, written to metrics.jsonl, and carried in checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from actors.roles import Recovery, Roles
from eval.gsm8k import Evaluation
from onpolicy_skd import timeline
from onpolicy_skd.checkpoint import SaveError
from onpolicy_skd.exits import RunError, cause_of, first_line
from onpolicy_skd.guards import Watch
from onpolicy_skd.learner import UnsoundStepError
from onpolicy_skd.prepare import Run
from onpolicy_skd.report import summary
from onpolicy_skd.report.console import Display
from onpolicy_skd.report.metrics import MetricsLog, read
from onpolicy_skd.stop import Stopped

EMPTY_BATCH_ADVICE = {
    "no_pace": "raise rollout.n: every prompt was always right or always wrong",
    "right": "raise learner.batch_size or set samples.correctness=any",
    "wrong": "raise learner.batch_size or set samples.correctness=any",
}


def worth_of(result: dict[str, Any]) -> float:
    """What the best evaluation has most of: exact match or, where nothing is answered, nearness to the teacher."""
    return result["match"]["share"] if "match" in result else -result["divergence_reference"]


class Clock:
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


class Logbook:
    """What the run has found out: shown, written to metrics.jsonl, and carried in checkpoints."""

    def __init__(self, run: Run, first_step: int, state: dict[str, Any]) -> None:
        self.evaluations: dict[str, Any] = dict(state.get("evaluations", {}))
        self.finished = False
        self._run = run
        self._seconds_before = state.get("seconds", 0.0)
        self.checkpoints = run.folder / "checkpoints"
        self.watched = 0  # step of the last evaluation during training
        self.best_step: int | None = None  # of the best one
        self._best = -math.inf
        self._saved = bool(state)
        self._version = self._skipped = 0
        self._load(state)
        self._started = time.monotonic()
        self._open(first_step, bool(state))
        self._display = Display(run.steps, first_step)

    def __enter__(self) -> Logbook:
        self._display.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._display.__exit__(*problem)
        if isinstance(problem[1], Stopped):
            self.conclude("stopped", f"{problem[1]} outside the steps")
        self._metrics.close()

    def say(self, text: str) -> None:
        self._display.say(text)

    def _open(self, first_step: int, resumed: bool) -> None:
        """The metrics as they were before ``first_step``."""
        self._steps = first_step
        self._metrics = MetricsLog(self._run.folder, first_step, self._run.settings.run.tensorboard, resumed)
        self._watch = Watch(self._run.settings.sync.max_gap)
        self._restarts: Counter[str] = Counter()
        for record in read(self._metrics.path):
            if "loss" in record:
                deque(self._watch.see(record), maxlen=0)  # what there was to say has been said
            self._restarts.update(record.get("restarted", ()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the logbook."""
        return {
            "evaluations": self.evaluations,
            "seconds": self._seconds(),
            "skipped": self._skipped,
            "watched": self.watched,
            "best": [self.best_step, self._best] if self.best_step is not None else None,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._version = state.get("version", 0)  # of the learner after the steps so far
        self._skipped = state.get("skipped", 0)
        self.watched = state.get("watched", 0)
        self.best_step, self._best = state.get("best") or (None, -math.inf)

    def save(self, roles: Roles, step: int, must: bool, ahead: Sequence[Any] = ()) -> None:
        """A checkpoint.  One that cannot be written ends the run if it ``must`` be; else the one before has to do."""
        try:
            self._save(roles, step, ahead)
            self._saved = True
        except SaveError as error:
            problem = str(cause_of(error))
            if must:
                raise RunError(f"{problem}; make room and use resume=auto") from None
            self.say(f"{problem}; going on, with the checkpoint before it")
            with contextlib.suppress(OSError):  # the same disk
                self._metrics.write({"step": step, "event": "unsaved", "reason": problem})

    def _save(self, roles: Roles, step: int, ahead: Sequence[Any] = ()) -> None:
        keep = self._run.settings.run.keep_checkpoints
        roles.save(self.checkpoints, step, self._version, self.state(), keep, ahead)

    def is_best(self, done: Evaluation) -> bool:
        """Of the evaluations during training so far."""
        return worth_of(done.result) > self._best

    def save_best(self, roles: Roles) -> None:
        try:
            roles.save_pretrained(self._run.folder / "best")
        except SaveError as error:
            self.say(f"{cause_of(error)}; going on with the best student of before")

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
        self.say(f"going on with step {back}" + (" from the newest checkpoint" if done.rolled_back else ""))
        return back

    def mended(self, done: Recovery, step: int = 0) -> None:
        self._restarts.update(done.restarted)
        record = {"restarted": done.restarted, "cause": done.cause, "down_seconds": round(done.seconds, 1)}
        self._metrics.write({"step": step, "event": "fault", **record})

    def step(self, step: int, report: Any, found: dict[str, float], clock: Clock) -> None:
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
        for guard, text in self._watch.see(record):
            self._metrics.write({"step": step, "event": "warning", "guard": guard, "text": text})
            self.say(f"warning ({guard}): {text}")

    def timeline(self, roles: Roles, step: int, clock: Clock) -> None:
        """Who was busy when, in a step that has just ended."""
        now = time.time()
        try:
            timeline.write(self._run.folder, timeline.within(roles.spans(), now - clock.total, now), step)
        except OSError as error:
            self.say(f"no timeline: {error}")

    def empty_batch(self, step: int, report: Any) -> None:
        self._steps = step + 1
        self._metrics.write(
            {"step": step, "event": "empty_batch", "generated": report.generated, "dropped": report.dropped}
        )
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        worst = max(report.dropped, key=lambda reason: report.dropped[reason])
        advice = EMPTY_BATCH_ADVICE.get(worst, "raise rollout.max_tokens or set samples.truncated=keep")
        self.say(f"step {step}: no sample left of {report.generated} ({reasons}); no update. If this goes on, {advice}")

    def skipped(self, step: int, report: Any, problem: UnsoundStepError) -> None:
        """A step without an update.  Raises RunError after more than ``learner.max_skipped`` of them."""
        self._steps = step + 1
        self._skipped += 1
        bound = self._run.settings.learner.max_skipped
        why = {"reason": str(problem), "samples": problem.samples}
        self._metrics.write({"step": step, "event": "skipped", "generated": report.generated} | why)
        self.say(f"step {step}: no update, {self._skipped} so far (learner.max_skipped={bound}): {problem}")
        if self._skipped > bound:
            raise RunError(
                f"{self._skipped} steps had a loss or gradient that is not finite, learner.max_skipped={bound}; the "
                f"last: {problem}. The samples of each are in {self._metrics.path}"
            )

    def evaluation(self, name: str, step: int, done: Evaluation) -> None:
        self.evaluations[name] = done.result
        if name == "during":
            self.watched = step
            if self.is_best(done):
                self.best_step, self._best = step, worth_of(done.result)
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
        self.say(f"{name}: " + ", ".join(parts))

    def on_failure(self, roles: Roles) -> Callable[..., bool]:
        """An exit callback that keeps what was earned when a run breaks: a checkpoint, if the learner lives, and the
        summary with the reason."""

        def leave(_: type | None, error: BaseException | None, __: Any) -> bool:
            if isinstance(error, RayError | RunError | OSError):
                try:
                    self._save(roles, self._steps)
                except RayError as lost:
                    self.say(f"no checkpoint of this moment: {first_line(cause_of(lost))}")
                try:
                    self.conclude("failed", str(cause_of(error)))
                except OSError as full:
                    self.say(f"no summary: {full}")
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
                self.say(f"exact match {name:>7}: {summary.percent(shares[name], intervals[name])}")
        self.say(f"{status} after {self._steps} steps, {built['seconds']:.0f} s; report: {report}")
        if status == "stopped":
            self.say("the same command with resume=auto goes on from the last checkpoint")

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started
