"""Full KD by TRL's ``DistillationTrainer``, from a run's own settings: an outside baseline for comparisons.

``python -m eval.trl_baseline --config RUN.yaml [a.b=value ...]`` trains the same student on the same prompts in the
same order with the same optimizer, and leaves a run folder like ``onpolicy_skd.train``'s.  TRL's own choices stay
TRL's: a batch is averaged over its tokens (here over its sequences), and truncated answers are trained on.  One
process, one device, no Ray; evaluations generate with transformers and measure exact match alone.
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
from onpolicy_skd.evaluation.evaluate import Evaluation, evaluate
from onpolicy_skd.learner.optimizer import adamw, learner_threads, learning_rate
from onpolicy_skd.models import loading as models
from onpolicy_skd.report import summary
from onpolicy_skd.report.metrics_log import MetricsLog, read
from onpolicy_skd.rollout.transformers_engine import TransformersEngine
from onpolicy_skd.run.exits import EXIT_OK, EXIT_STOPPED, run_cli
from onpolicy_skd.run.prepare import Run, open_folder, prepare
from onpolicy_skd.run.stop import Stopped, StopSignal
from onpolicy_skd.types import Prompt

VLLM_SHARE = 0.25  # of the GPU that student, teacher and optimizer are on as well
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}  # TRL's name for the divergence; jsd has its own


class Trainer(DistillationTrainer):
    """TRL's trainer, given token ids: no second template or tokenizer comes between the prompts and the student."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [[int(i) for i in text.split()] for text in prompts], None, {}


class Recorder(TrainerCallback):
    """Writes TRL's log in this project's names, evaluates where the settings ask for it, and passes a signal on."""

    def __init__(self, run: Run, metrics: MetricsLog, stop: StopSignal, student: Any) -> None:
        self.evaluations: dict[str, Any] = {}
        self._run, self._metrics, self._stop, self._student = run, metrics, stop, student
        self._engine: TransformersEngine | None = None
        self._started = self._seconds = 0.0
        self._tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tokens = int(state.num_input_tokens_seen)  # of the steps before a resume

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._started
        control.should_log = True
        if self._stop.requested:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        if "loss" not in logs:
            return
        own, step = self._run.settings, state.global_step - 1
        positions = round(logs["completions/mean_length"] * own.learner.batch_size)
        tokens, self._tokens = int(logs["num_tokens"]) - self._tokens, int(logs["num_tokens"])
        self._metrics.write(
            {
                "step": step,
                "version": step + 1,
                "generated": own.learner.batch_size,
                "dropped": {},
                "loss": logs["loss"],
                "entropy": logs["entropy"],
                "entropy_selected": logs["entropy"],
                "k": 1.0,
                "samples": own.learner.batch_size,
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
        every = own.run.evaluate_every
        if every and state.global_step % every == 0 and state.global_step < self._run.steps:
            self.evaluate("during", state.global_step, self._run.validation_prompts)

    def evaluate(self, name: str, step: int, prompts: Sequence[Prompt]) -> None:
        """Greedy exact match of the student as it is now."""
        own = self._run.settings
        if self._engine is None:
            self._engine = TransformersEngine(own.student.model, own, own.student.trust_remote_code)
        weights: Iterable[Any] = self._student.named_parameters()
        self._engine.load_weights(weights, step)
        done: Evaluation = evaluate(self._engine.generate, prompts, self._run.tokenizer, self._run.greedy)
        self.evaluations[name] = done.result
        done.write_records(self._run.folder / "evaluations" / f"{name}-{step:06d}.jsonl")
        self._metrics.write({"step": step, "event": "evaluation", "name": name, **done.result})
        print(f"{name} {step}: exact match {summary.percent(done.result['match']['share'])}", flush=True)


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint: transformers writes them in place, its state last."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def trainer_for(run: Run, student: Any, recorder: TrainerCallback) -> Trainer:
    """TRL's trainer on the prompts of every step of ``run``, in its order."""
    own, device = run.settings, models.pick_device(run.settings.run.device)
    dtype = models.pick_dtype(own.learner.compute_dtype, device)
    requests = [r for step in range(run.steps) for r in run.requests(run.train, step)]
    rows = max(1, own.learner.tokens_per_micro_batch // own.max_sequence)
    rows = max(n for n in range(1, own.learner.batch_size + 1) if own.learner.batch_size % n == 0 and n <= rows)
    vllm = own.rollout.engine == "vllm"
    arguments = DistillationConfig(
        output_dir=str(run.folder / "checkpoints"),
        max_steps=run.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=own.learner.batch_size // rows,
        max_grad_norm=own.learner.clip,
        gradient_checkpointing=own.student.activation_checkpointing,
        bf16=dtype == torch.bfloat16,
        use_cpu=device == "cpu",
        disable_dropout=True,
        shuffle_dataset=False,
        beta=BETA.get(own.alignment.divergence, own.alignment.beta),
        temperature=own.rollout.temperature,
        top_p=own.rollout.top_p,
        max_completion_length=own.rollout.max_tokens,
        use_vllm=vllm,
        vllm_gpu_memory_utilization=min(own.rollout.gpu_memory, VLLM_SHARE),
        vllm_max_model_length=own.max_model_length if vllm else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if own.run.checkpoint_every else "no",
        save_steps=own.run.checkpoint_every or run.steps,
        save_total_limit=own.run.keep_checkpoints,
        seed=own.run.seed,
        report_to=[],
        disable_tqdm=True,
    )
    optimizer = adamw(dict(student.named_parameters()), own.learner)
    rate = LambdaLR(optimizer, lambda step: learning_rate(own.learner, step, run.steps) / own.learner.lr)
    run.tokenizer.padding_side = "left"
    teacher_dtype = models.pick_dtype(own.teacher.dtype, device)
    trainer = Trainer(
        model=student,
        teacher_model=models.load_model(own.teacher.model, teacher_dtype, device, own.teacher.trust_remote_code),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, r.prompt_ids)) for r in requests]}),
        processing_class=run.tokenizer,
        callbacks=[recorder],
        optimizers=(optimizer, rate),
    )
    trainer.remove_callback(PrinterCallback)  # the recorder has said it
    return trainer


def train(settings: Settings) -> int:
    """One run from settings to summary.json; returns the exit code.  Raises ConfigError."""
    check_trl(settings)
    run = prepare(settings, generates=False)
    open_folder(settings)
    run.save_validation()
    found = newest(run.folder / "checkpoints") if settings.resume == "auto" else None
    first = int(found.name.rpartition("-")[2]) if found else 0
    metrics = MetricsLog(run.folder, first)
    before = sum(r["seconds"]["step"] for r in read(metrics.path) if "loss" in r)
    started, status, reason, steps = time.monotonic(), "failed", None, first
    device = models.pick_device(settings.run.device)
    if device == "cpu":
        torch.set_num_threads(learner_threads(settings.learner))
    student = models.load_model(settings.student.model, torch.float32, device, settings.student.trust_remote_code)
    with StopSignal(settings.run.max_hours) as stop:
        recorder = Recorder(run, metrics, stop, student)
        try:
            trainer = trainer_for(run, student, recorder)
            with stop.orderly():
                trainer.train(resume_from_checkpoint=str(found) if found else None)
            steps = trainer.state.global_step
            del trainer  # with the teacher and the optimizer: evaluation needs their room
            if steps >= run.steps:
                student.save_pretrained(run.folder / "final")
                run.tokenizer.save_pretrained(run.folder / "final")
                recorder.evaluate("after", steps, run.held_out[: settings.eval.problems or None])
            status = "finished" if steps >= run.steps else "stopped"
        except Stopped as signal:
            status, reason = "stopped", f"{signal} outside the steps"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            metrics.close()
            seconds = before + time.monotonic() - started
            built = summary.build(settings, recorder.evaluations, status, steps, seconds, reason)
            summary.write(run.folder, built | {"trainer": "trl"}, settings)
    print(f"{status} after {steps} steps, {seconds:.0f} s; report: {run.folder / 'report.md'}")
    return EXIT_OK if status == "finished" else EXIT_STOPPED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, as of ``onpolicy_skd.train``."""
    about = (__doc__ or "").splitlines()[0]
    return run_cli(lambda: train(load_settings(sys.argv[1:] if argv is None else argv, about=about)))


if __name__ == "__main__":
    sys.exit(main())
