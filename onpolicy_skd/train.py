"""On-policy selective distillation: ``python -m onpolicy_skd.train --config configs/demo.yaml [a.b=value ...]``.

``train`` below is the whole schedule of a run.  One step, as data:

    prompts -> rollout actors -> trajectories -> sample filter -> kept trajectories -> teacher (hidden states)
                                                                                    -> learner (entropy, positions,
    rollout actors <- weights <- optimizer step <- gradient <- reverse KL on those rows <- teacher's rows for these)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayError

from actors.cluster import Resources, connect
from actors.roles import Roles
from eval.gsm8k import Evaluation, evaluate
from onpolicy_skd.command_line import load_settings
from onpolicy_skd.config import Settings
from onpolicy_skd.exits import EXIT_OK, EXIT_STOPPED, RunError, cause_of, guarded
from onpolicy_skd.inspection import means, tokens
from onpolicy_skd.learner import UnsoundStepError
from onpolicy_skd.prefilter import as_text
from onpolicy_skd.prepare import Run, open_folder, prepare
from onpolicy_skd.report import summary
from onpolicy_skd.report.console import Display
from onpolicy_skd.report.metrics import MetricsLog
from onpolicy_skd.stop import Stopped, StopSignal
from onpolicy_skd.training_set import add_teacher_references, engine, gather, selected_prompts
from onpolicy_skd.trajectory import Prompt, RolloutRequest, seed_of

TOKEN_VIEWS = 8  # rollouts of an evaluation that are kept token by token
EMPTY_BATCH_ADVICE = {
    "no_pace": "raise rollout.n: every prompt was always right or always wrong",
    "right": "raise learner.batch_size or set samples.correctness=any",
    "wrong": "raise learner.batch_size or set samples.correctness=any",
}


def train(run: Run, roles: Roles, prompts: Sequence[Prompt], book: Logbook, step: int, stop: StopSignal) -> None:
    """From ``step`` to the end, or to a stop signal; leaves a checkpoint behind."""
    own = run.settings.run
    while step < run.steps and not stop.requested:
        clock = Clock()
        parts = trajectories(run, roles, prompts, step)
        ray.wait(parts, num_returns=len(parts), fetch_local=False)
        clock.lap("rollout")
        report, kept = roles.filter(parts)
        clock.lap("filter")
        if report.kept:
            encoded = roles.encode(kept)  # the teacher works while the learner runs its own trunk
            try:
                found = roles.step(kept, encoded, report)
            except UnsoundStepError as problem:
                book.skipped(step, report, problem)
            else:
                clock.lap("learn")
                version = roles.push_weights() if run.samples_student else roles.version()
                clock.lap("sync")
                book.step(step, version, report, found, clock)
        else:
            book.empty_batch(step, report)
        step += 1
        if run.watched and _due(own.evaluate_every, step, run.steps) and not stop.requested:
            book.evaluation("during", step, student_evaluation(run, roles, run.watched))
        if _due(own.checkpoint_every, step, run.steps):
            roles.save(run.folder / "checkpoints", step, book.state(), own.keep_checkpoints)
    roles.save(run.folder / "checkpoints", step, book.state(), own.keep_checkpoints)
    if step >= run.steps:
        roles.save_pretrained(run.folder / "final")
        book.finished = True


def _due(every: int, step: int, steps: int) -> bool:
    return bool(every) and step % every == 0 and step < steps


def trajectories(run: Run, roles: Roles, prompts: Sequence[Prompt], step: int) -> list[ray.ObjectRef]:
    """Refs to the trajectories of ``step``: the student's own rollouts, references, or some of both."""
    requests, references = run.requests(prompts, step), run.references(prompts, step)
    return roles.generate(requests, run.sampling) + ([ray.put(references)] if references else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 finished, 1 failed, 2 bad input, 3 stopped with a checkpoint."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        about = (__doc__ or "").splitlines()[0]
        return guarded(lambda: run_settings(load_settings(sys.argv[1:] if argv is None else argv, about=about)))
    except Stopped as signal:
        print(f"{signal}: stopped outside the steps", file=sys.stderr)
        return EXIT_STOPPED


def run_settings(settings: Settings) -> int:
    """One run from settings to summary.json."""
    run = prepare(settings)
    if run.knows_its_texts:
        run.check_cached(run.train)  # before a folder exists or a model loads
    with (
        connect(settings) as resources,
        StopSignal(settings.run.max_hours) as stop,
    ):  # what the cluster lacks is said before a folder exists
        loaded = open_folder(settings)
        first_step = loaded.step if loaded else 0
        with Logbook(run, first_step, loaded.state if loaded else {}) as book:
            book.say(f"run folder: {run.folder.absolute()}")
            run.save_validation()
            if run.validation:
                book.say(f"{len(run.validation)} training problems are held out for validation")
            book.say(f"{len(run.train)} prompts, {run.steps} steps of {settings.rollouts_per_step} trajectories")
            if loaded:
                book.say(f"resuming after step {first_step}")
            wants_teacher = settings.eval.teacher and settings.generates and run.held_out
            if wants_teacher and "teacher" not in book.evaluations:
                book.evaluation("teacher", 0, teacher_evaluation(run, resources))
            add_teacher_references(run, resources, book.say)
            book.say("starting " + ", ".join(f"{r.count} x {r.name}" for r in resources.roles if r.count))
            roles = Roles(settings, resources, run.vocabulary, run.tokenizer.pad_token_id, run.steps)
            with ExitStack() as stack:
                stack.callback(roles.close)
                stack.push(book.on_failure(roles))
                roles.wait_ready(book.say)
                # By the initial student: before a checkpoint is loaded.
                prompts = selected_prompts(run, roles.rank, lambda: roles.rollouts, book.say)
                if not run.knows_its_texts:
                    run.check_cached(prompts)
                if loaded:
                    roles.restore(loaded.path)
                if settings.eval.before and run.held_out and "before" not in book.evaluations:
                    book.evaluation("before", 0, student_evaluation(run, roles))
                with stop.orderly():
                    train(run, roles, prompts, book, first_step, stop)
                if book.finished and run.held_out:
                    book.evaluation("after", run.steps, student_evaluation(run, roles))
        book.conclude("finished" if book.finished else "stopped")
        return EXIT_OK if book.finished else EXIT_STOPPED


def student_evaluation(run: Run, roles: Roles, prompts: Sequence[Prompt] = ()) -> Evaluation:
    """Greedy exact match of the current student; if asked, how far it is from the teacher on held-out prompts.

    ``divergence`` is over the student's own rollouts, ``divergence_reference`` over the reference answers: a student
    that falls into repetition lowers the first but not the second.  Of packed text there is only the second.
    """
    if not run.settings.generates:
        few = [as_text(p, "prompt", run.tokenizer) for p in run.held_out]
        return Evaluation({"problems": 0, "divergence_reference": means(roles.inspect(few))["divergence"]}, [])
    if not run.samples_student:
        roles.push_weights()  # off-policy, the engines hold old weights between evaluations
    prompts = prompts or run.held_out[: run.settings.eval.problems or None]
    done = evaluate(lambda r, s: gather(roles.rollouts, r, s), prompts, run.tokenizer, run.greedy)
    if run.settings.eval.divergence_prompts:
        few = (run.validation or run.held_out)[: run.settings.eval.divergence_prompts]
        seed = run.settings.run.seed
        requests = [RolloutRequest(p.key, p.token_ids, seed_of(seed, "divergence", p.key)) for p in few]
        rollouts = gather(roles.rollouts, requests, run.sampling)
        inspected = {i.key: i for i in roles.inspect(rollouts)}
        done.result.update(means(list(inspected.values())))
        shown = [t for t in rollouts if t.key in inspected][:TOKEN_VIEWS]
        done.views.extend(tokens(t, inspected[t.key], run.tokenizer) for t in shown)
        answers = [as_text(p, "prompt+answer", run.tokenizer) for p in few]
        done.result["divergence_reference"] = means(roles.inspect(answers))["divergence"]
    return done


def teacher_evaluation(run: Run, resources: Resources) -> Evaluation:
    """Greedy exact match of the teacher."""
    prompts = run.held_out[: run.settings.eval.problems or None]
    with engine(run, resources, "teacher") as group:
        return evaluate(lambda r, s: gather(group, r, s), prompts, run.tokenizer, run.greedy)


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


class Logbook:
    """What the run has found out: shown, written to metrics.jsonl, and carried in checkpoints."""

    def __init__(self, run: Run, first_step: int, state: dict[str, Any]) -> None:
        self.evaluations: dict[str, Any] = dict(state.get("evaluations", {}))
        self.finished = False
        self._run = run
        self._seconds_before = state.get("seconds", 0.0)
        self._skipped = state.get("skipped", 0)
        self._started = time.monotonic()
        self._steps = first_step
        self._metrics = MetricsLog(run.folder, first_step, run.settings.run.tensorboard)
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

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the logbook."""
        return {"evaluations": self.evaluations, "seconds": self._seconds(), "skipped": self._skipped}

    def step(self, step: int, version: int, report: Any, found: dict[str, float], clock: Clock) -> None:
        total = sum(clock.seconds.values())
        record = {
            "step": step,
            "version": version,
            "generated": report.generated,
            "dropped": report.dropped,
            **found,
            "seconds": clock.seconds | {"step": total},
            "tokens_per_second": found["train_tokens"] / total,
        }
        self._steps = step + 1
        self._metrics.write(record)
        self._display.step(record)

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
            if isinstance(error, RayError | RunError):
                folder, keep = self._run.folder / "checkpoints", self._run.settings.run.keep_checkpoints
                try:
                    roles.save(folder, self._steps, self.state(), keep)
                except RayError as lost:
                    self.say(f"no checkpoint of this moment: {cause_of(lost)}")
                self.conclude("failed", str(cause_of(error)))
            return False

        return leave

    def conclude(self, status: str, reason: str | None = None) -> None:
        """summary.json, report.md and the closing lines."""
        settings = self._run.settings
        built = summary.build(settings, self.evaluations, status, self._steps, self._seconds(), reason)
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


if __name__ == "__main__":
    sys.exit(main())
