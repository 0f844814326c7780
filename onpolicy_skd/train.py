"""On-policy selective distillation: ``python -m onpolicy_skd.train --config configs/demo.yaml [a.b=value ...]``.

``train`` below is the whole schedule of a run.  One step, as data:

    prompts -> rollout actors -> trajectories -> sample filter -> kept trajectories -> teacher (hidden states)
                                                                                    -> learner (entropy, positions,
    rollout actors <- weights <- optimizer step <- gradient <- reverse KL on those rows <- teacher's rows for these)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster import connect
from actors.placement import Resources
from actors.training_set import add_teacher_references, engine, retry_engine_on_fault, selected_prompts
from actors.workers import Refs, Workers
from onpolicy_skd.config.loading import load_settings
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.diagnostics import means, tokens
from onpolicy_skd.evaluation.evaluate import Evaluation, evaluate
from onpolicy_skd.learner.learner import NonFiniteLossError
from onpolicy_skd.run.exits import EXIT_OK, EXIT_STOPPED, run_cli
from onpolicy_skd.run.logger import PhaseTimer, RunLogger
from onpolicy_skd.run.prepare import Run, open_folder, prepare
from onpolicy_skd.run.stop import Stopped, StopSignal
from onpolicy_skd.selection.prefilter import as_text
from onpolicy_skd.types import FilterReport, Prompt, RolloutRequest, seed_of

T = TypeVar("T")
TOKEN_VIEWS = 8  # rollouts of an evaluation that are kept token by token


def train(
    run: Run,
    workers: Workers,
    prompts: Sequence[Prompt],
    book: RunLogger,
    step: int,
    stop: StopSignal,
    ahead: Sequence[ray.ObjectRef] = (),
) -> None:
    """From ``step``, whose rollouts may have been made ``ahead``, to the end or to a stop signal; leaves a checkpoint.

    After a fault the loop goes on where the learner stands: with the step that failed, or from the newest checkpoint.
    """
    own, saved = run.settings.run, step
    started = {step: list(ahead)} if ahead else {}  # rollouts by step
    while True:
        try:
            ending = step >= run.steps or stop.requested
            if run.validation_prompts and not ending and _due(own.evaluate_every, step) and book.last_eval_step < step:
                done = student_evaluation(run, workers, run.validation_prompts)
                if own.keep_best and book.is_best(done):
                    book.save_best(workers)
                book.evaluation("during", step, done)
            if ending or (_due(own.checkpoint_every, step) and saved != step):
                book.save(workers, step, ending, started.get(step, []))
                saved = step
            if step >= run.steps:
                workers.save_pretrained(run.folder / "final")
                book.finished = True
            if ending:
                return
            clock = update(run, workers, prompts, book, step, started)
            step += 1  # before anything else that may fail
            if step - 1 == own.timeline:
                book.timeline(workers, step - 1, clock)
        except RayError as error:
            mended = workers.recover(error, book.checkpoints, book.log)
            step = book.recovered(step, mended)
            if mended.rolled_back:
                saved, started = step, {step: mended.ahead} if mended.ahead else {}
            else:
                started = surviving_rollouts(started)


def update(
    run: Run, workers: Workers, prompts: Sequence[Prompt], book: RunLogger, step: int, started: dict[int, Refs]
) -> PhaseTimer:
    """The optimizer step ``step``; none if no sample is left or the loss is not finite.

    ``started`` holds the rollouts of this step if they were begun during the last one, and then those of the next.
    """
    clock = PhaseTimer()
    if step not in started:
        if run.samples_student:
            workers.push_weights()
        clock.lap("sync")
        started[step] = trajectories(run, workers, prompts, step)
    parts = started[step]
    if run.settings.pipeline.streaming:
        update_as_they_come(run, workers, book, step, parts, clock)
        del started[step]
        return clock
    workers.finish(parts)
    clock.lap("rollout")
    if run.settings.pipeline.max_staleness and step + 1 < run.steps and step + 1 not in started:
        workers.push_weights()
        started[step + 1] = trajectories(run, workers, prompts, step + 1)  # the engines work during this update
        clock.lap("sync")
    report, kept = workers.filter(parts)
    clock.lap("filter")
    if not report.kept:
        book.empty_batch(step, report)
    else:
        encoded = workers.encode(kept)  # the teacher works while the learner runs its own backbone
        try:
            found = workers.step(kept, encoded, report)
        except NonFiniteLossError as problem:
            book.skipped(step, report, problem)
        else:
            clock.lap("learn")
            book.step(step, report, found, clock)
    del started[step]
    return clock


def update_as_they_come(run: Run, workers: Workers, book: RunLogger, step: int, parts: Refs, clock: PhaseTimer) -> None:
    """As ``update``, on ``parts`` while others are still being generated."""
    report = FilterReport([], 0)
    try:
        found = workers.streamed_step(parts, report)
    except NonFiniteLossError as problem:
        book.skipped(step, report, problem)
        return
    clock.lap("learn")
    if found is None:
        book.empty_batch(step, report)
    else:
        book.step(step, report, found, clock)


def surviving_rollouts(started: dict[int, Refs]) -> dict[int, Refs]:
    """Those rollouts that a fault has left or left under way; the others are made again, by the weights of now."""
    kept = {}
    for step, parts in started.items():
        if any(isinstance(part, ray.ObjectRefGenerator) for part in parts):
            continue  # some of it was taken
        try:
            ray.get(parts, timeout=0)
        except GetTimeoutError:
            pass
        except RayError:
            continue
        kept[step] = parts
    return kept


def _due(every: int, step: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


def retry_on_fault(action: Callable[[], T], workers: Workers, book: RunLogger, trained: bool = True) -> T:
    """``action``, which trains nothing, again after each fault that could be mended; ``trained``: by the newest
    checkpoint's student, not the initial one."""
    while True:
        try:
            return action()
        except RayError as error:
            book.mended(workers.recover(error, book.checkpoints if trained else None, book.log))


def trajectories(run: Run, workers: Workers, prompts: Sequence[Prompt], step: int) -> Refs:
    """Refs to the trajectories of ``step``: the student's own rollouts, references, or some of both."""
    requests, references = run.requests(prompts, step), run.references(prompts, step)
    return workers.generate(requests, run.sampling) + ([ray.put(references)] if references else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 finished, 1 failed, 2 bad input, 3 stopped with a checkpoint."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        about = (__doc__ or "").splitlines()[0]
        return run_cli(
            lambda: run_settings(load_settings(sys.argv[1:] if argv is None else argv, about=about)), RayError
        )
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
        with RunLogger(run, first_step, loaded.state if loaded else {}) as book:
            book.log(f"run folder: {run.folder.absolute()}")
            run.save_validation()
            if run.validation:
                book.log(f"{len(run.validation)} training problems are held out for validation")
            book.log(f"{len(run.train)} prompts, {run.steps} steps of {settings.rollouts_per_step} trajectories")
            if loaded:
                book.log(f"resuming after step {first_step}")
            wants_teacher = settings.eval.teacher and settings.generates and run.held_out
            if wants_teacher and "teacher" not in book.evaluations:
                book.evaluation("teacher", 0, teacher_evaluation(run, resources, book.log))
            add_teacher_references(run, resources, book.log)
            book.log("starting " + ", ".join(f"{r.count} x {r.name}" for r in resources.roles if r.count))
            workers = Workers(settings, resources, run.vocabulary, run.tokenizer.pad_token_id, run.steps)
            with ExitStack() as stack:
                stack.callback(workers.close)
                stack.push(book.on_failure(workers, RayError))
                retry_on_fault(lambda: workers.wait_ready(book.log), workers, book, trained=False)

                def select() -> Sequence[Prompt]:
                    return selected_prompts(run, workers.score_samples, workers.engines, book.log)

                prompts = retry_on_fault(
                    select, workers, book, trained=False
                )  # by the initial student: before a checkpoint is loaded
                if not run.knows_its_texts:
                    run.check_cached(prompts)
                ahead = retry_on_fault(lambda: workers.restore(loaded.path), workers, book) if loaded else []
                if settings.eval.before and run.held_out and "before" not in book.evaluations:
                    book.evaluation(
                        "before", 0, retry_on_fault(lambda: student_evaluation(run, workers), workers, book)
                    )
                with stop.orderly():
                    train(run, workers, prompts, book, first_step, stop, ahead)
                if book.finished and run.held_out:
                    book.evaluation(
                        "after", run.steps, retry_on_fault(lambda: student_evaluation(run, workers), workers, book)
                    )
        book.conclude("finished" if book.finished else "stopped")
        return EXIT_OK if book.finished else EXIT_STOPPED


def student_evaluation(run: Run, workers: Workers, prompts: Sequence[Prompt] = ()) -> Evaluation:
    """Greedy exact match of the current student; if asked, how far it is from the teacher on held-out prompts.

    ``divergence`` is over the student's own rollouts, ``divergence_reference`` over the reference answers: a student
    that falls into repetition lowers the first but not the second.  Of packed text there is only the second.
    """
    if not run.settings.generates:
        few = [as_text(p, "prompt", run.tokenizer) for p in run.held_out]
        return Evaluation(
            {"problems": 0, "divergence_reference": means(workers.diagnose_positions(few))["divergence"]}, []
        )
    prompts = prompts or run.held_out[: run.settings.eval.problems or None]
    done = evaluate(workers.engines().gather, prompts, run.tokenizer, run.greedy)
    if run.settings.eval.divergence_prompts:
        few = (run.validation or run.held_out)[: run.settings.eval.divergence_prompts]
        seed = run.settings.run.seed
        requests = [RolloutRequest(p.key, p.token_ids, seed_of(seed, "divergence", p.key)) for p in few]
        rollouts = workers.engines().gather(requests, run.sampling)
        inspected = {i.key: i for i in workers.diagnose_positions(rollouts)}
        done.result.update(means(list(inspected.values())))
        shown = [t for t in rollouts if t.key in inspected][:TOKEN_VIEWS]
        done.views.extend(tokens(t, inspected[t.key], run.tokenizer) for t in shown)
        answers = [as_text(p, "prompt+answer", run.tokenizer) for p in few]
        done.result["divergence_reference"] = means(workers.diagnose_positions(answers))["divergence"]
    return done


def teacher_evaluation(run: Run, resources: Resources, log: Callable[[str], None]) -> Evaluation:
    """Greedy exact match of the teacher."""
    prompts = run.held_out[: run.settings.eval.problems or None]

    def once() -> Evaluation:
        with engine(run, resources, "teacher") as group:
            return evaluate(group.gather, prompts, run.tokenizer, run.greedy)

    return retry_engine_on_fault(run.settings, "teacher engine", once, log)


if __name__ == "__main__":
    sys.exit(main())
