"""Whole on-policy steps beside TRL's ``DistillationTrainer``: the same models, prompts, lengths and number of steps.

Both generate with transformers in one process and one type; models are randomly initialised with a real vocabulary's
size.  ``unavoidable`` is measured beside each step of ours: generation, the teacher's forward, the student's backbone
forward and backward, and the matrix products of the LM heads over the supervised rows.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from eval.performance.measuring import clock, in_turn, memory, ratio, reset_peak
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models import loading as models
from onpolicy_skd.models import split_model
from onpolicy_skd.models.batch import collate
from onpolicy_skd.rollout.transformers_engine import Response, TransformersEngine
from onpolicy_skd.run.prepare import Run, prepare
from onpolicy_skd.selection.prefilter import as_text
from onpolicy_skd.teacher.teacher import Teacher
from onpolicy_skd.types import RolloutRequest, Trajectory

VARIANTS = ("trl", "ours_k100", "ours_k20", "trl_ragged", "ours_ragged")
MEANING = {
    "trl": "TRL's DistillationTrainer",
    "ours_k100": "this project, all positions",
    "ours_k20": "this project, 20 % of the positions by student entropy",
    "trl_ragged": "TRL's, answers of a third of the limit on average",
    "ours_ragged": "this project, all positions, the same answers",
}
WARM, TIMED = 1, 2  # steps
SCORED = 40  # prompts that the prefilter's cost is measured on
KEPT = 0.2  # share that the prefilter keeps


class Shape(NamedTuple):
    vocabulary: int
    student: tuple[int, int]  # layers, hidden size
    teacher: tuple[int, int]
    batch: int
    new_tokens: int


SHAPES = {
    "small": Shape(151_936, (4, 256), (8, 512), 8, 64),
    "tiny": Shape(512, (1, 32), (1, 32), 4, 12),  # for tests
}
DEFAULT = ("small",)


def measure(variant: str, shape: str, device: str) -> dict[str, Any]:
    """Seconds of a warm step, its phases, and peak MiB, in this process."""
    torch.set_num_threads(1)
    own = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(Path(folder), own, device, 0.2 if variant == "ours_k20" else 1.0)
        save_random_models(Path(folder), own)
        run = prepare(settings, lambda _: None)
        limits = ragged(own) if variant.endswith("ragged") else [own.new_tokens] * own.batch
        reset_peak(device)
        return (_trl if variant.startswith("trl") else _ours)(run, limits, device)


def ragged(shape: Shape) -> list[int]:
    """Lengths of a batch's answers, a third of the limit on average, one of them the limit."""
    rest = (shape.new_tokens * shape.batch // 3 - shape.new_tokens) / max(1, shape.batch - 1)
    spread = np.linspace(0.5, 1.5, shape.batch - 1) * rest
    return [shape.new_tokens, *(max(1, round(x)) for x in spread)]


def settings_for(folder: Path, shape: Shape, device: str, k: float) -> Settings:
    """Everything in one process, with the models of ``save_random_models``."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    return resolve(
        {
            "run": {"dir": str(folder), "steps": WARM + TIMED, "device": device, "tensorboard": False},
            "data": {"source": "demo", "max_prompt_tokens": 96},
            "student": {"model": str(folder / "student")},
            "teacher": {"model": str(folder / "teacher"), "dtype": dtype, "placement": "learner"},
            "rollout": {
                "engine": "transformers", "max_tokens": shape.new_tokens, "dtype": dtype, "entropy": "engine",
                "placement": "learner",
            },
            "samples": {"truncated": "keep"},  # a random model hardly ever ends an answer, and TRL keeps them too
            "positions": {"policy": "full"} if k == 1.0 else {"k": k},
            "learner": {"batch_size": shape.batch, "compute_dtype": dtype},
            "sync": {"max_gap": 0.5},
        }
    )  # fmt: skip


def save_random_models(folder: Path, shape: Shape, ends: float = 0.0) -> None:
    """``student`` and ``teacher``, with the bundled tokenizer; ``ends``: share of the classes that end an answer."""
    for part, (layers, hidden) in (("student", shape.student), ("teacher", shape.teacher)):
        _save_random_model(folder / part, shape.vocabulary, layers, hidden, ends)


def _save_random_model(folder: Path, vocabulary: int, layers: int, hidden: int, ends: float) -> None:
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = models.load_tokenizer("bundled:demo_student")
    torch.manual_seed(layers)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), num_key_value_heads=max(1, hidden // 128), head_dim=min(64, hidden),
        max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    if ends:
        model.generation_config = GenerationConfig(eos_token_id=list(range(round(ends * vocabulary))))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- this project --------------------------------------------------------------------------------------------------


def _ours(run: Run, limits: Sequence[int], device: str) -> dict[str, Any]:
    own, dtype = run.settings, models.pick_dtype(run.settings.teacher.dtype, device)
    pad = run.tokenizer.pad_token_id
    student = split_model.split(models.load_model(own.student.model, torch.float32, device), run.vocabulary)
    teacher_model = split_model.split(models.load_model(own.teacher.model, dtype, device), run.vocabulary)
    teacher = Teacher(teacher_model, own.teacher.tokens_per_batch, pad)
    learner = Learner(student, teacher, own, pad, run.steps)
    engine = _Ending(own.student.model, own, shared=student)
    totals: dict[str, float] = {}

    def timed(phase: str, action: Callable[[], Any], count: bool) -> Any:
        started = clock(device)
        found = action()
        if count:
            totals[phase] = totals.get(phase, 0.0) + clock(device) - started
        return found

    kept: list[Trajectory] = []
    supervised = 0
    for step in range(run.steps):
        count, requests = step >= WARM, run.requests(run.train, step)
        engine.limits = dict(zip((r.key for r in requests), limits, strict=True))
        batch = timed("rollout", lambda r=requests: engine.generate(r, run.sampling), count)
        _, kept = timed("filter", lambda b=batch: learner.filter(b), count)
        timed("teacher", lambda k=kept: teacher.encode(k), count)
        found = timed("learn", lambda k=kept: learner.step(k), count)
        supervised = round(found["positions_selected"])
        timed("sync", lambda: engine.load_weights((), learner.version), count)
        teacher.release([t.key for t in kept])
    peak = memory(device, "peak")
    phases = {phase: seconds / TIMED for phase, seconds in totals.items()}
    seconds = sum(phases.values())
    bound = phases["rollout"] + phases["teacher"] + _student_bound(learner, teacher_model, kept, supervised, device)
    texts = [as_text(p, "prompt", run.tokenizer) for p in run.train[:SCORED]]
    learner.score_samples(texts[:2])
    started = clock(device)
    learner.score_samples(texts)
    scoring = (clock(device) - started) / SCORED
    return {
        "seconds": seconds,
        "phases": phases,
        "unavoidable": bound,
        "peak_mib": peak,
        "seconds_per_prompt_scored": scoring,
    }


class _Ending(TransformersEngine):
    """Ends every response after so many tokens as if its end had been drawn there."""

    limits: dict[str, int]  # by request

    def start(self, request: RolloutRequest) -> Response:
        return _Limited(request, self.limits[request.key])


class _Limited(Response):
    def __init__(self, request: RolloutRequest, limit: int) -> None:
        super().__init__(request)
        self._left = limit

    def add(self, ends: Sequence[int], *drawn: np.ndarray) -> None:
        super().add(ends, *(part[: self._left] for part in drawn))
        self._left -= len(drawn[0])
        self.ended |= self._left <= 0


def _student_bound(
    learner: Learner, teacher: split_model.SplitModel, batch: Sequence[Trajectory], supervised: int, device: str
) -> float:
    """Seconds of backbone forward and backward, of the head products over the supervised rows, and of the optimizer."""
    student, pad = learner.student, 0
    together = collate(batch, pad, student.device)
    optimizer = learner.optimizer

    def once() -> None:
        hidden = student.hidden(together)
        head, other = student.head_VH, teacher.head_VH
        with torch.no_grad():
            rows = hidden.detach()[:supervised]
            logits = rows @ head.T  # the forward, without which there is no divergence
            (torch.zeros(supervised, other.shape[1], device=rows.device, dtype=other.dtype) @ other.T).sum()
            back = logits @ head  # gradient of the rows
            (logits.T @ rows).sum()  # and of the head
        hidden.backward(torch.cat([back, torch.zeros_like(hidden[supervised:])]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    once()
    started = clock(device)
    once()
    return clock(device) - started


# -- TRL -----------------------------------------------------------------------------------------------------------


def _trl(run: Run, limits: Sequence[int], device: str) -> dict[str, Any]:
    from transformers import TrainerCallback

    from eval.trl_baseline import trainer_for

    marks: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(-clock(device))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks[-1] += clock(device)

    student = models.load_model(run.settings.student.model, torch.float32, device)
    trainer = trainer_for(run, student, Timer())
    generate = trainer._generate_single_turn

    def cut(*arguments: Any, **named: Any) -> list[list[int]]:  # one answer has the limit: all were drawn to there
        return [ids[:limit] for ids, limit in zip(generate(*arguments, **named), limits, strict=True)]

    trainer._generate_single_turn = cut  # type: ignore[method-assign]
    trainer.train()
    return {"seconds": statistics.fmean(marks[WARM:]), "peak_mib": memory(device, "peak")}


# -- all of them ---------------------------------------------------------------------------------------------------


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """All variants of one shape, ``rounds`` times in turn, each in a process of its own."""
    found = in_turn("end-to-end", VARIANTS, [shape, device], rounds)
    batch = SHAPES[shape].batch
    for r in found["ours_k20"]:  # a pass over the prompts: all are scored, a share of them is trained on
        r["seconds_of_pass"] = batch * r["seconds_per_prompt_scored"] + KEPT * r["seconds"]
    for r in found["trl"]:
        r["seconds_of_pass"] = r["seconds"]
    spread = {
        "k100": ratio(found["trl"], found["ours_k100"], "seconds"),
        "k20": ratio(found["trl"], found["ours_k20"], "seconds"),
        "ragged": ratio(found["trl_ragged"], found["ours_ragged"], "seconds"),
        "prefilter": ratio(found["trl"], found["ours_k20"], "seconds_of_pass"),
        "memory": ratio(found["trl"], found["ours_k100"], "peak_mib"),
    }
    over = {v: statistics.median(r["seconds"] / r["unavoidable"] for r in found[v]) for v in VARIANTS if "ours" in v}
    return {
        "shape": SHAPES[shape]._asdict(),
        "runs": found,
        "step_over_unavoidable": over,
        "ratio_to_trl": {name: value["median"] for name, value in spread.items()},
        "ratio_to_trl_spread": spread,
    }


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Prints medians and ratios."""
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']}")
        for variant in VARIANTS:
            runs = figures["runs"][variant]
            seconds, peak = (statistics.median(r[key] for r in runs) for key in ("seconds", "peak_mib"))
            print(f"  {variant:>11}  {seconds:8.3f} s  {peak:8.0f} MiB   {MEANING[variant]}")
            if "phases" in runs[0]:
                phases = ", ".join(
                    f"{p} {statistics.median(r['phases'][p] for r in runs):.2f}" for p in runs[0]["phases"]
                )
                print(f"               {phases}; step over unavoidable {figures['step_over_unavoidable'][variant]:.2f}")
        print("  TRL's figure over ours: " + ", ".join(f"{k} {v:.2f}" for k, v in figures["ratio_to_trl"].items()))
