"""Train a student on its rollouts or on references, under a frozen teacher: one run from settings to report.

``train`` below is the whole schedule of a run.  One step, as data:

    prompts -> rollout actors -> trajectories -> sample filter -> kept trajectories -> teacher (hidden states)
                                                                                    -> learner (entropy, positions,
    rollout actors <- weights <- optimizer step <- gradient <- reverse KL on those rows <- teacher's rows for these)
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster import connect
from actors.placement import Resources
from actors.training_set import add_generated_references, engine, retry_engine_on_fault, selected_prompts
from actors.workers import Refs, Workers
from onpolicy_skd.config import validation
from onpolicy_skd.config.loading import load_settings
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.diagnostics import means, token_view
from onpolicy_skd.evaluation.evaluate import Evaluation, Generate, evaluate
from onpolicy_skd.learner.learner import NonFiniteLossError
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.run.exits import EXIT_OK, EXIT_STOPPED, run_cli
from onpolicy_skd.run.hub import push
from onpolicy_skd.run.logger import PhaseTimer, RunLogger
from onpolicy_skd.run.preflight import preflight
from onpolicy_skd.run.prepare import Run, check_resume, open_folder, prepare
from onpolicy_skd.run.stop import Stopped, StopSignal
from onpolicy_skd.selection.prefilter import as_text
from onpolicy_skd.storage.checkpoint import Checkpoint
from onpolicy_skd.storage.files import RunPaths
from onpolicy_skd.types import FilterReport, Prompt, RolloutRequest, seed_of

T = TypeVar("T")
TOKEN_VIEWS = 8  # rollouts of an evaluation that are kept token by token


def train(
    run: Run,
    workers: Workers,
    prompts: Sequence[Prompt],
    logger: RunLogger,
    step: int,
    stop: StopSignal,
    prefetched_rollouts: Refs | None = None,
) -> None:
    """Train from ``step`` to the end of the run or to a stop signal, and save a checkpoint.

    ``prefetched_rollouts`` are the rollouts of ``step``, if a checkpoint held them.  After a fault the loop continues
    where the learner stands: with the step that failed, or from the newest checkpoint.
    """
    run_cfg, saved_step = run.settings.run, step
    pending_rollouts = {step: prefetched_rollouts} if prefetched_rollouts else {}  # rollout refs by step
    while True:
        try:
            last = step >= run.steps or stop.requested
            if run.validation_prompts and not last and _is_due(run_cfg.evaluate_every, step, logger.last_eval_step):
                evaluation = student_evaluation(run, workers, run.validation_prompts)
                logger.validated(workers, step, evaluation)
            if last or _is_due(run_cfg.checkpoint_every, step, saved_step):
                logger.save(workers, step, last, pending_rollouts.get(step, []))
                saved_step = step
            if step >= run.steps:
                workers.save_pretrained(run.paths.final)
                logger.finished = True
            if last:
                return
            timer = update(run, workers, prompts, logger, step, pending_rollouts)
            step += 1  # before anything that may fail
            if step - 1 == run_cfg.timeline:
                logger.timeline(workers, step - 1, timer)
        except RayError as error:
            recovery = workers.recover(error, logger.checkpoints, logger.log)
            step = logger.recovered(step, recovery)
            if recovery.rolled_back:
                saved_step = step
                pending_rollouts = {step: recovery.prefetched_rollouts} if recovery.prefetched_rollouts else {}
            else:
                pending_rollouts = surviving_rollouts(pending_rollouts)


def update(
    run: Run,
    workers: Workers,
    prompts: Sequence[Prompt],
    logger: RunLogger,
    step: int,
    pending_rollouts: dict[int, Refs],
) -> PhaseTimer:
    """Make the optimizer step ``step``; skip it if no sample is left or the loss is not finite.

    ``pending_rollouts`` holds the rollouts of this step if they were started during the last one, and afterwards those
    of the next.
    """
    timer = PhaseTimer()
    if step not in pending_rollouts:
        if run.samples_student:
            workers.push_weights()
        timer.record("sync")
        pending_rollouts[step] = start_rollouts(run, workers, prompts, step)
    rollout_refs = pending_rollouts[step]
    if run.settings.pipeline.streaming:
        update_streaming(workers, logger, step, rollout_refs, timer)
        del pending_rollouts[step]
        return timer
    workers.wait_for(rollout_refs)
    timer.record("rollout")
    if run.settings.pipeline.max_staleness and step + 1 < run.steps and step + 1 not in pending_rollouts:
        workers.push_weights()
        pending_rollouts[step + 1] = start_rollouts(run, workers, prompts, step + 1)  # generated during this update
        timer.record("sync")
    report, kept = workers.filter(rollout_refs)
    timer.record("filter")
    if not report.kept:
        logger.empty_batch(step, report)
    else:
        encoded = workers.encode(kept)  # the teacher's forward runs at the same time as the learner's
        try:
            metrics = workers.step(kept, encoded, report)
        except NonFiniteLossError as error:
            logger.skipped(step, report, error)
        else:
            timer.record("learn")
            logger.step(step, report, metrics, timer)
    del pending_rollouts[step]
    return timer


def update_streaming(workers: Workers, logger: RunLogger, step: int, rollout_refs: Refs, timer: PhaseTimer) -> None:
    """Make the optimizer step ``step`` on rollouts as they end, while the engines generate the others."""
    report = FilterReport([], 0)
    try:
        metrics = workers.streamed_step(rollout_refs, report, timer)
    except NonFiniteLossError as error:
        logger.skipped(step, report, error)
        return
    timer.record("learn")
    if metrics is None:
        logger.empty_batch(step, report)
    else:
        logger.step(step, report, metrics, timer)


def surviving_rollouts(pending_rollouts: dict[int, Refs]) -> dict[int, Refs]:
    """Return the rollouts that a fault left intact, by step; the others are generated again, with current weights."""
    surviving = {}
    for step, refs in pending_rollouts.items():
        if any(isinstance(ref, ray.ObjectRefGenerator) for ref in refs):
            continue  # a stream that was consumed in part
        try:
            ray.get(refs, timeout=0)
        except GetTimeoutError:
            pass
        except RayError:
            continue
        surviving[step] = refs
    return surviving


def _is_due(interval: int, step: int, done_at: int) -> bool:
    """Return True if ``step`` is a multiple of ``interval`` (0: never) and not ``done_at``, the step last done."""
    return interval > 0 and 0 < step != done_at and step % interval == 0


def retry_on_fault(action: Callable[[], T], workers: Workers, logger: RunLogger, trained: bool = True) -> T:
    """Return what ``action`` returns, repeated after each fault that the workers recover from.

    ``action`` trains nothing.  A new learner gets the newest checkpoint or, unless ``trained``, the initial student.
    """
    while True:
        try:
            return action()
        except RayError as error:
            logger.fault(workers.recover(error, logger.checkpoints if trained else None, logger.log))


def start_rollouts(run: Run, workers: Workers, prompts: Sequence[Prompt], step: int) -> Refs:
    """Start the rollouts of ``step``; return refs to its trajectories, references among them if the mode has them."""
    requests, references = run.requests(prompts, step), run.references(prompts, step)
    return workers.generate(requests, run.sampling_at(step)) + ([ray.put(references)] if references else [])


def main(argv: Sequence[str] | None = None, prog: str = "python -m onpolicy_skd.train") -> int:
    """Run the command line; return the exit code: 0 finished, 1 failed, 2 bad input, 3 stopped with a checkpoint."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        about = (__doc__ or "").splitlines()[0]
        given = sys.argv[1:] if argv is None else argv
        with StopSignal():
            return run_cli(lambda: run_settings(load_settings(given, prog, about)).exit_code, RayError)
    except Stopped as stopped:
        name = str(stopped)
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        name = "SIGTERM"  # ray.init has a handler that exits with the number of the signal
    print(f"{name}: stopped outside the steps", file=sys.stderr)
    return EXIT_STOPPED


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run that has ended: the content of its summary.json (docs/outputs.md) and the files of its folder."""

    summary: dict[str, Any]
    paths: RunPaths

    @property
    def finished(self) -> bool:
        """False for a run that was stopped; the same settings with ``resume="auto"`` continue it."""
        return self.summary["status"] == "finished"

    @property
    def exit_code(self) -> int:
        return EXIT_OK if self.finished else EXIT_STOPPED


def run_settings(settings: Settings) -> RunResult:
    """Make one run, from settings to summary.json; the student is in ``result.paths.final``.

    Joins the running Ray cluster or starts a local one for the time of the run.  Call it in the main thread: Ctrl-C
    and SIGTERM stop the run with a checkpoint.  Raises ConfigError for bad input, RunError or RayError for a failure.
    """
    validation.check(settings)
    preflight(settings)
    run = prepare(settings)
    if run.knows_its_texts:
        run.check_cached(run.train)  # before a folder exists or a model loads
    check_resume(run)
    with (
        connect(run.worker_settings) as resources,
        StopSignal(settings.run.max_hours) as stop,
        open_folder(run) as checkpoint,  # only once the cluster has room
    ):
        first_step = checkpoint.step if checkpoint else 0
        with RunLogger(run, first_step, checkpoint.state if checkpoint else {}) as logger:
            logger.start(resources.roles)
            if settings.eval.teacher and settings.generates and run.held_out and "teacher" not in logger.evaluations:
                logger.evaluation("teacher", 0, teacher_evaluation(run, resources, logger.log))
            add_generated_references(run, resources, logger.log)
            vocabulary, pad_id = run.vocabulary, run.tokenizer.pad_token_id
            workers = Workers(run.worker_settings, resources, vocabulary, pad_id, run.steps, logger.log)
            with ExitStack() as stack:
                stack.callback(workers.close)
                stack.push(logger.on_failure(workers, RayError))
                run_workers(run, workers, logger, checkpoint, stop)
        logger.conclude("finished" if logger.finished else "stopped")
    if logger.finished and settings.hub.push:
        push(settings, print)
    return RunResult(json.loads(run.paths.summary.read_text(encoding="utf-8")), run.paths)


def run_workers(run: Run, workers: Workers, logger: RunLogger, checkpoint: Checkpoint | None, stop: StopSignal) -> None:
    """Select the prompts, restore the checkpoint, evaluate, train, evaluate again.

    The prompts are selected first, because a prefilter uses the initial student's scores.
    """

    def select() -> Sequence[Prompt]:
        return selected_prompts(run, workers.score_samples, workers.engines, logger.log)

    def evaluate_student(name: str, step: int) -> None:
        evaluation = retry_on_fault(lambda: student_evaluation(run, workers), workers, logger)
        logger.evaluation(name, step, evaluation)

    retry_on_fault(lambda: workers.wait_ready(logger.log), workers, logger, trained=False)
    if warning := retry_on_fault(workers.precision_warning, workers, logger, trained=False):
        logger.warning(checkpoint.step if checkpoint else 0, "precision", warning)
    prompts = retry_on_fault(select, workers, logger, trained=False)
    if not run.knows_its_texts:
        run.check_cached(prompts)
    prefetched_rollouts: Refs = []
    if checkpoint:
        prefetched_rollouts = retry_on_fault(lambda: workers.restore(checkpoint.path), workers, logger)
    if run.settings.eval.before and run.held_out and "before" not in logger.evaluations:
        evaluate_student("before", 0)
    with stop.orderly():
        train(run, workers, prompts, logger, checkpoint.step if checkpoint else 0, stop, prefetched_rollouts)
    if logger.finished and run.held_out and run.settings.eval.after:
        evaluate_student("after", run.steps)


def student_evaluation(run: Run, workers: Workers, prompts: Sequence[Prompt] = ()) -> Evaluation:
    """Score the current student by greedy exact match and, if the settings ask for it, measure its divergence.

    ``divergence`` is measured on the student's rollouts of held-out prompts, ``divergence_reference`` on their
    reference answers: a student that falls into repetition lowers the first but not the second.  Packed text has only
    the second.
    """
    if not run.settings.generates:
        samples = [as_text(p, "prompt", run.tokenizer) for p in run.held_out]
        divergence = means(workers.diagnose_positions(samples))["divergence"]
        return Evaluation({"problems": 0, "divergence_reference": divergence}, [])
    prompts = prompts or run.held_out[: run.settings.eval.problems or None]
    evaluation = evaluate_with_progress(run, workers.engines().completed, prompts, "evaluation")
    if count := run.settings.eval.divergence_prompts:
        add_divergences(run, workers, (run.validation or run.held_out)[:count], evaluation)
    return evaluation


def evaluate_with_progress(run: Run, generate: Generate, prompts: Sequence[Prompt], label: str) -> Evaluation:
    """Score greedy answers to ``prompts`` and report progress."""
    with ProgressReporter(label, len(prompts)) as progress:
        judge = run.settings.eval.judge
        return evaluate(
            generate, prompts, run.tokenizer, run.greedy, on_record=lambda _: progress.advance(), judge=judge
        )


def add_divergences(run: Run, workers: Workers, prompts: Sequence[Prompt], evaluation: Evaluation) -> None:
    """Add the student's divergence from the teacher on ``prompts``, and token views, to ``evaluation``."""
    seed = run.settings.run.seed
    requests = [
        RolloutRequest(
            p.key, p.token_ids, seed_of(seed, "divergence", p.key), teacher_prompt_ids=p.teacher_ids, teacher=p.teacher
        )
        for p in prompts
    ]
    rollouts = workers.engines().gather(requests, run.sampling)
    diagnostics = {d.key: d for d in workers.diagnose_positions(rollouts)}
    evaluation.result.update(means(list(diagnostics.values())))
    shown = [t for t in rollouts if t.key in diagnostics][:TOKEN_VIEWS]
    evaluation.views.extend(token_view(t, diagnostics[t.key], run.tokenizer) for t in shown)
    annotations = run.settings.references.annotations
    answers = [as_text(p, "prompt+answer", run.tokenizer, annotations) for p in prompts if p.has_reference]
    if answers:
        evaluation.result["divergence_reference"] = means(workers.diagnose_positions(answers))["divergence"]


def teacher_evaluation(run: Run, resources: Resources, log: Callable[[str], None]) -> Evaluation:
    """Score the teacher by greedy exact match."""
    prompts = run.held_out[: run.settings.eval.problems or None]

    def action() -> Evaluation:
        with engine(run, resources, "teacher", log) as group:
            return evaluate_with_progress(run, group.completed, prompts, "evaluation of the teacher")

    return retry_engine_on_fault(run.settings, "teacher engine", action, log)


class _CallableModule(ModuleType):
    """The class of this module, which makes it callable: ``from onpolicy_skd import train; train(settings)``."""

    def __call__(self, settings: Settings) -> RunResult:
        return run_settings(settings)

    __call__.__doc__ = run_settings.__doc__


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
