"""Full KD by TRL's ``DistillationTrainer`` from a run's settings: an external baseline for comparisons.

Trains the same student on the same prompts in the same order with the same optimizer, and writes a run folder like
``onpolicy_skd.train``'s.  TRL's choices stay as they are: it averages the loss over a batch's tokens (``onpolicy_skd``
over its sequences) and trains on truncated answers.  It runs in one process on one device, without Ray; evaluations
generate with transformers and measure exact match only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from actors.learner_actor import peak_memory_mib
from onpolicy_skd.config.loading import load_settings
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.config.validation import check_trl
from onpolicy_skd.evaluation.evaluate import evaluate
from onpolicy_skd.learner.optimizer import build_optimizer, learner_threads, learning_rate
from onpolicy_skd.models import loading as models
from onpolicy_skd.report import summary
from onpolicy_skd.report.metrics_log import Event, MetricsLog, read
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.rollout.transformers_engine import TransformersEngine, end_tokens_only
from onpolicy_skd.run.exits import EXIT_OK, EXIT_STOPPED, run_cli
from onpolicy_skd.run.prepare import Run, open_folder, prepare
from onpolicy_skd.run.stop import Stopped, StopSignal
from onpolicy_skd.types import Prompt

VLLM_GPU_MEMORY = 0.25  # largest share for the engine: student, teacher and optimizer are on the same GPU
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}  # TRL's beta by divergence; that of jsd is alignment.beta


class Trainer(DistillationTrainer):
    """TRL's trainer on token ids: it applies no template or tokenizer to the prompts."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [[int(i) for i in text.split()] for text in prompts], None, {}


class Recorder(TrainerCallback):
    """Writes TRL's log under this project's names, evaluates every ``run.evaluate_every`` steps, stops on a signal."""

    def __init__(self, run: Run, metrics: MetricsLog, stop: StopSignal, student: Any) -> None:
        self.evaluations: dict[str, Any] = {}
        self._run, self._metrics, self._stop, self._student = run, metrics, stop, student
        self._engine: TransformersEngine | None = None
        self._step_start = self._seconds = 0.0
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tokens = int(state.num_input_tokens_seen)  # not 0 in a resumed run

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._step_start
        control.should_log = True
        if self._stop.requested:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        if "loss" not in logs:
            return
        settings, step = self._run.settings, state.global_step - 1
        batch_size, every_steps = settings.learner.batch_size, settings.run.evaluate_every
        positions = round(logs["completions/mean_length"] * batch_size)
        tokens, self._tokens = int(logs["num_tokens"]) - self._tokens, int(logs["num_tokens"])
        self._metrics.write(
            {
                "step": step,
                "version": step + 1,
                "generated": batch_size,
                "dropped": {},
                "loss": logs["loss"],
                "entropy": logs["entropy"],
                "entropy_selected": logs["entropy"],
                "k": 1.0,
                "samples": batch_size,
                "positions": positions,
                "positions_selected": positions,
                "response_tokens": logs["completions/mean_length"],
                "truncated": logs["completions/clipped_ratio"],
                "train_tokens": tokens,
                "learner_memory_mib": peak_memory_mib(),
                "grad_norm": logs["grad_norm"],
                "lr": logs["learning_rate"],
                "seconds": {"step": self._seconds},
            }
        )
        if every_steps and state.global_step % every_steps == 0 and state.global_step < self._run.steps:
            self.evaluate("during", state.global_step, self._run.validation_prompts)

    def evaluate(self, name: str, step: int, prompts: Sequence[Prompt]) -> None:
        """Measure greedy exact match of the current student."""
        settings = self._run.settings
        if self._engine is None:
            self._engine = TransformersEngine(settings.student.model, settings, settings.student.trust_remote_code)
        weights: Iterable[Any] = self._student.named_parameters()
        self._engine.load_weights(weights, step)
        with ProgressReporter("evaluation", len(prompts)) as progress:
            evaluation = evaluate(
                self._engine.stream, prompts, self._run.tokenizer, self._run.greedy,
                on_record=lambda _: progress.advance(), judge=settings.eval.judge,
            )  # fmt: skip
        self.evaluations[name] = evaluation.result
        evaluation.write_records(self._run.paths.evaluation(name, step))
        self._metrics.write({"step": step, "event": Event.EVALUATION, "name": name, **evaluation.result})
        print(f"{name} {step}: exact match {summary.percent(evaluation.result['match']['share'])}", flush=True)


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; transformers writes a checkpoint in place, trainer_state.json last."""
    complete = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def trainer_for(run: Run, student: Any, recorder: TrainerCallback) -> Trainer:
    """Build TRL's trainer on the prompts of every step of ``run``, in order."""
    settings, device = run.settings, models.pick_device(run.settings.run.device)
    dtype = models.pick_dtype(settings.learner.compute_dtype, device)
    requests = [r for step in range(run.steps) for r in run.requests(run.train, step)]
    rows = max(1, settings.learner.tokens_per_micro_batch // settings.max_sequence)
    rows = max(
        n for n in range(1, settings.learner.batch_size + 1) if settings.learner.batch_size % n == 0 and n <= rows
    )
    vllm = settings.rollout.engine == "vllm"
    arguments = DistillationConfig(
        output_dir=str(run.paths.checkpoints),
        max_steps=run.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings.learner.batch_size // rows,
        max_grad_norm=settings.learner.clip,
        gradient_checkpointing=settings.student.activation_checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device == "cpu",
        disable_dropout=True,
        shuffle_dataset=False,
        beta=BETA.get(settings.alignment.divergence, settings.alignment.beta),
        temperature=settings.rollout.temperature,
        top_p=settings.rollout.top_p,
        max_completion_length=settings.rollout.max_tokens,
        use_vllm=vllm,
        vllm_gpu_memory_utilization=min(settings.rollout.gpu_memory, VLLM_GPU_MEMORY),
        vllm_max_model_length=settings.max_model_length if vllm else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.run.checkpoint_every else "no",
        save_steps=settings.run.checkpoint_every or run.steps,
        save_total_limit=settings.run.keep_checkpoints,
        seed=settings.run.seed,
        report_to=[],
        disable_tqdm=True,
    )
    optimizer = build_optimizer(dict(student.named_parameters()), settings.learner)
    rate = LambdaLR(optimizer, lambda step: learning_rate(settings.learner, step, run.steps) / settings.learner.lr)
    run.tokenizer.padding_side = "left"
    teacher_dtype = models.pick_dtype(settings.teacher.dtype, device)
    trainer = Trainer(
        model=student,
        teacher_model=models.load_model(
            settings.teacher_model.model, teacher_dtype, device, settings.teacher_model.trust_remote_code
        ),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, r.prompt_ids)) for r in requests]}),
        processing_class=run.tokenizer,
        callbacks=[recorder],
        optimizers=(optimizer, rate),
    )
    trainer.remove_callback(PrinterCallback)  # the recorder prints instead
    return trainer


def train(settings: Settings) -> int:
    """Train one run, from settings to summary.json, and return the exit code.  Raises ConfigError for bad settings."""
    check_trl(settings)
    run = prepare(settings, generates=False)
    with open_folder(run):
        return _train(run)


def _train(run: Run) -> int:
    settings = run.settings
    run.save_validation()
    checkpoint = newest(run.paths.checkpoints) if settings.resume == "auto" else None
    first = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    metrics = MetricsLog(run.folder, first)
    before = sum(r["seconds"]["step"] for r in read(metrics.path) if "loss" in r)
    start, status, reason, steps = time.monotonic(), "failed", None, first
    device = models.pick_device(settings.run.device)
    if device == "cpu":
        torch.set_num_threads(learner_threads(settings))
    student = models.load_model(settings.student.model, torch.float32, device, settings.student.trust_remote_code)
    with StopSignal(settings.run.max_hours) as stop:
        recorder = Recorder(run, metrics, stop, student)
        try:
            with end_tokens_only(student), stop.orderly():
                trainer = trainer_for(run, student, recorder)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            steps = trainer.state.global_step
            del trainer  # frees teacher and optimizer before the evaluation
            if steps >= run.steps:
                student.save_pretrained(run.paths.final)
                run.tokenizer.save_pretrained(run.paths.final)
                recorder.evaluate("after", steps, run.held_out[: settings.eval.problems or None])
            status = "finished" if steps >= run.steps else "stopped"
        except Stopped as signal:
            status, reason = "stopped", f"{signal} outside the steps"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            metrics.close()
            seconds = before + time.monotonic() - start
            content = summary.build(settings, recorder.evaluations, status, steps, seconds, reason)
            summary.write(run.folder, content | {"trainer": "trl"}, settings)
    print(f"{status} after {steps} steps, {seconds:.0f} s; report: {run.paths.report}")
    return EXIT_OK if status == "finished" else EXIT_STOPPED


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.trl_baseline") -> int:
    """Run the command line and return the exit code, as ``onpolicy_skd.train`` does."""
    about = (__doc__ or "").splitlines()[0]
    return run_cli(lambda: train(load_settings(sys.argv[1:] if argv is None else argv, prog, about)))


if __name__ == "__main__":
    sys.exit(main())
