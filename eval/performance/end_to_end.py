"""On-policy steps compared with TRL's ``DistillationTrainer``: same models, prompts, lengths and number of steps.

Both generate with transformers in one process and one data type.  The models are randomly initialized with the
vocabulary size of a real model, or are a pretrained pair on GSM8K (``--pair``).  ``unavoidable`` is the time of the
work that no step can avoid: generation, the teacher's forward, the student's backbone forward and backward, the matrix
products of the LM heads over the supervised rows, and the optimizer.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from eval.performance.measuring import clock, memory, ratio, reset_peak, run_alternately
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
PAIR_VARIANTS = VARIANTS[:3]
MEANING = {
    "trl": "TRL's DistillationTrainer",
    "ours_k100": "this project, all positions",
    "ours_k20": "this project, 20 % of the positions by student entropy",
    "trl_ragged": "TRL's, mean answer length a third of the limit",
    "ours_ragged": "this project, all positions, the same answers",
}
WARM, TIMED = 1, 2  # steps that are not timed, and timed steps
SCORED_PROMPTS = 40  # for the cost of the prefilter
PREFILTER_KEEP = 0.2


class Shape(NamedTuple):
    vocabulary: int
    student: tuple[int, int]  # layers, hidden size
    teacher: tuple[int, int]
    batch: int
    new_tokens: int


class Pair(NamedTuple):
    """Pretrained models on GSM8K's training questions: full fine-tuning in float32, the teacher in bfloat16."""

    student: str
    teacher: str
    data: str | None  # folder of train.jsonl and test.jsonl; None: the hub
    batch: int
    new_tokens: int


SHAPES = {
    "small": Shape(151_936, (4, 256), (8, 512), 8, 64),
    "tiny": Shape(512, (1, 32), (1, 32), 4, 12),  # for tests
}
DEFAULT = ("small",)


def sizes_of(shape: str) -> Shape | Pair:
    """Return the shape of that name, or the pair that ``shape`` holds as a JSON object."""
    return Pair(**json.loads(shape)) if shape.startswith("{") else SHAPES[shape]


def measure(variant: str, shape: str, device: str) -> dict[str, Any]:
    """Measure the seconds of a warm step and of its phases, and the peak MiB, in this process."""
    torch.set_num_threads(1)
    sizes = sizes_of(shape)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(Path(folder), sizes, device, 0.2 if variant == "ours_k20" else 1.0)
        if isinstance(sizes, Shape):
            save_random_models(Path(folder), sizes)
        run = prepare(settings, lambda _: None)
        limits = ragged(sizes) if variant.endswith("ragged") else [sizes.new_tokens] * sizes.batch
        reset_peak(device)
        return (_trl if variant.startswith("trl") else _ours)(run, limits, device)


def ragged(shape: Shape | Pair) -> list[int]:
    """Return the answer lengths of a batch, tokens: a third of the limit on average, the first at the limit."""
    rest = (shape.new_tokens * shape.batch // 3 - shape.new_tokens) / max(1, shape.batch - 1)
    spread = np.linspace(0.5, 1.5, shape.batch - 1) * rest
    return [shape.new_tokens, *(max(1, round(x)) for x in spread)]


def settings_for(folder: Path, shape: Shape | Pair, device: str, k: float) -> Settings:
    """Return settings that run the models of ``save_random_models``, or a pair, in one process.

    ``k``: share of the positions to supervise.
    """
    dtype = teacher_dtype = "bfloat16" if device == "cuda" else "float32"
    student, teacher = str(folder / "student"), str(folder / "teacher")
    data: dict[str, Any] = {"source": "demo", "max_prompt_tokens": 96}
    if isinstance(shape, Pair):
        student, teacher, teacher_dtype = shape.student, shape.teacher, "bfloat16"
        data = {"source": "gsm8k", "path": shape.data, "max_prompt_tokens": 256, "overlong": "drop"}
    return resolve(
        {
            "run": {"dir": str(folder), "steps": WARM + TIMED, "device": device, "trackers": []},
            "data": data,
            "student": {"model": student},
            "teacher": {"model": teacher, "dtype": teacher_dtype, "placement": "learner"},
            "rollout": {
                "engine": "transformers", "max_tokens": shape.new_tokens, "dtype": dtype, "entropy": "engine",
                "placement": "learner",
            },
            "samples": {"truncated": "keep"},  # a random model rarely ends an answer; TRL keeps truncated answers too
            "positions": {"policy": "full"} if k == 1.0 else {"k": k},
            "learner": {"batch_size": shape.batch, "compute_dtype": dtype},
            "sync": {"max_gap": 0.5},
        }
    )  # fmt: skip


def save_random_models(folder: Path, shape: Shape, eos_share: float = 0.0) -> None:
    """Save ``student`` and ``teacher`` with the bundled tokenizer; ``eos_share`` of the classes end an answer."""
    for role, (layers, hidden) in (("student", shape.student), ("teacher", shape.teacher)):
        _save_random_model(folder / role, shape.vocabulary, layers, hidden, eos_share)


def _save_random_model(folder: Path, vocabulary: int, layers: int, hidden: int, eos_share: float) -> None:
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
    if eos_share:
        model.generation_config = GenerationConfig(eos_token_id=list(range(round(eos_share * vocabulary))))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- this project --------------------------------------------------------------------------------------------------


def _ours(run: Run, limits: Sequence[int], device: str) -> dict[str, Any]:
    settings, dtype = run.settings, models.pick_dtype(run.settings.teacher.dtype, device)
    pad = run.tokenizer.pad_token_id
    student = split_model.split(models.load_model(settings.student.model, torch.float32, device), run.vocabulary)
    teacher_model = split_model.split(models.load_model(settings.teacher.model, dtype, device), run.vocabulary)
    teacher = Teacher(teacher_model, settings.teacher.tokens_per_batch, pad)
    learner = Learner(student, teacher, settings, pad, run.steps)
    engine = _LengthLimitedEngine(settings.student.model, settings, shared=student)
    totals: dict[str, float] = {}

    def timed(phase: str, action: Callable[[], Any], count: bool) -> Any:
        start = clock(device)
        value = action()
        if count:
            totals[phase] = totals.get(phase, 0.0) + clock(device) - start
        return value

    kept: list[Trajectory] = []
    supervised = 0
    for step in range(run.steps):
        count, requests = step >= WARM, run.requests(run.train, step)
        engine.limits = dict(zip((r.key for r in requests), limits, strict=True))
        batch = timed("rollout", lambda r=requests: engine.generate(r, run.sampling), count)
        _, kept = timed("filter", lambda b=batch: learner.scorer.filter(b), count)
        timed("teacher", lambda k=kept: teacher.encode(k), count)
        metrics = timed("learn", lambda k=kept: learner.step(k), count)
        supervised = metrics.positions_selected
        timed("sync", lambda: engine.load_weights((), learner.version), count)
        teacher.release([t.key for t in kept])
    peak = memory(device, "peak")
    phases = {phase: seconds / TIMED for phase, seconds in totals.items()}
    seconds = sum(phases.values())
    bound = phases["rollout"] + phases["teacher"] + _student_bound(learner, teacher_model, kept, supervised, device)
    texts = [as_text(p, "prompt", run.tokenizer) for p in run.train[:SCORED_PROMPTS]]
    learner.scorer.score_samples(texts[:2])
    start = clock(device)
    learner.scorer.score_samples(texts)
    scoring = (clock(device) - start) / SCORED_PROMPTS
    return {
        "seconds": seconds,
        "phases": phases,
        "unavoidable": bound,
        "peak_mib": peak,
        "seconds_per_prompt_scored": scoring,
    }


class _LengthLimitedEngine(TransformersEngine):
    """Engine that ends each response at a given length, as if the model had sampled an end token there."""

    limits: dict[str, int]  # tokens by request key

    def new_response(self, request: RolloutRequest) -> Response:
        return _LimitedResponse(request, self.limits[request.key])


class _LimitedResponse(Response):
    def __init__(self, request: RolloutRequest, limit: int) -> None:
        super().__init__(request)
        self._left = limit

    def add(self, eos_token_ids: Sequence[int], *sampled: np.ndarray) -> None:
        super().add(eos_token_ids, *(values[: self._left] for values in sampled))
        self._left -= len(sampled[0])
        self.ended |= self._left <= 0


def _student_bound(
    learner: Learner, teacher: split_model.SplitModel, batch: Sequence[Trajectory], supervised: int, device: str
) -> float:
    """Measure the seconds of backbone forward and backward, head products over ``supervised`` rows, and optimizer."""
    student, pad = learner.student, 0
    collated = collate(batch, pad, student.device)
    optimizer = learner.state.optimizer

    def step() -> None:
        hidden = student.hidden(collated)
        head, other = student.head_VH, teacher.head_VH
        with torch.no_grad():
            rows = hidden.detach()[:supervised]
            logits = rows @ head.T  # the forward of the student's head
            (torch.zeros(supervised, other.shape[1], device=rows.device, dtype=other.dtype) @ other.T).sum()
            back = logits @ head  # gradient of the rows
            (logits.T @ rows).sum()  # and of the head
        hidden.backward(torch.cat([back, torch.zeros_like(hidden[supervised:])]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    start = clock(device)
    step()
    return clock(device) - start


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

    # TRL generates until the longest answer ends, which is at the limit: cutting the others afterwards costs the same.
    def cut(*arguments: Any, **named: Any) -> list[list[int]]:
        return [ids[:limit] for ids, limit in zip(generate(*arguments, **named), limits, strict=True)]

    trainer._generate_single_turn = cut  # type: ignore[method-assign]
    trainer.train()
    return {"seconds": statistics.fmean(marks[WARM:]), "peak_mib": memory(device, "peak")}


# -- comparison ----------------------------------------------------------------------------------------------------


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure all variants of a shape ``rounds`` times, each in a separate process."""
    sizes = sizes_of(shape)
    variants = VARIANTS if isinstance(sizes, Shape) else PAIR_VARIANTS
    runs = run_alternately("end-to-end", variants, [shape, device], rounds)
    batch = sizes.batch
    for r in runs["ours_k20"]:  # a pass with the prefilter: score all prompts, train on a share
        r["seconds_of_pass"] = batch * r["seconds_per_prompt_scored"] + PREFILTER_KEEP * r["seconds"]
    for r in runs["trl"]:
        r["seconds_of_pass"] = r["seconds"]
    spread = {
        "k100": ratio(runs["trl"], runs["ours_k100"], "seconds"),
        "k20": ratio(runs["trl"], runs["ours_k20"], "seconds"),
        "prefilter": ratio(runs["trl"], runs["ours_k20"], "seconds_of_pass"),
        "memory": ratio(runs["trl"], runs["ours_k100"], "peak_mib"),
    }
    if "trl_ragged" in runs:
        spread["ragged"] = ratio(runs["trl_ragged"], runs["ours_ragged"], "seconds")
    over = {v: statistics.median(r["seconds"] / r["unavoidable"] for r in runs[v]) for v in variants if "ours" in v}
    return {
        "shape": sizes._asdict(),
        "runs": runs,
        "step_over_unavoidable": over,
        "ratio_to_trl": {name: value["median"] for name, value in spread.items()},
        "ratio_to_trl_spread": spread,
    }


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Print medians and ratios."""
    for name, figures in shapes.items():
        print(f"\n{'pair' if name.startswith('{') else name}: {figures['shape']}")
        for variant, runs in figures["runs"].items():
            seconds, peak = (statistics.median(r[key] for r in runs) for key in ("seconds", "peak_mib"))
            print(f"  {variant:>11}  {seconds:8.3f} s  {peak:8.0f} MiB   {MEANING[variant]}")
            if "phases" in runs[0]:
                phases = ", ".join(
                    f"{p} {statistics.median(r['phases'][p] for r in runs):.2f}" for p in runs[0]["phases"]
                )
                print(f"               {phases}; step over unavoidable {figures['step_over_unavoidable'][variant]:.2f}")
        print("  TRL's figure over ours: " + ", ".join(f"{k} {v:.2f}" for k, v in figures["ratio_to_trl"].items()))
