"""Benchmarks of the loss alone: dense, TRL's chunked loss, this project's; and each method over exact reverse KL."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.performance.measuring import clock, memory, ratio, reset_peak, run_alternately

VARIANTS = ("dense", "trl", "ours_k100", "ours_k20")
MEANING = {
    "dense": "full [N, V] logits, torch autograd",
    "trl": "TRL's chunked divergence (DistillationTrainer)",
    "ours_k100": "this project, all rows, no entropy pass",
    "ours_k20": "this project, entropy pass over all rows, loss on 20 %",
}
METHODS: dict[str, dict[str, Any]] = {  # settings under alignment; all rows
    "exact": {},
    "forward_kl": {"divergence": "forward_kl"},
    "student_topk_tail": {"estimator": "student_topk_tail"},
    "mixture_constant": {"mixture": {"gate": "constant"}},
    "mixture_eopd": {"mixture": {"gate": "eopd"}},
    "mixture_zones": {"mixture": {"gate": "zones"}},
    "mixture_skewed": {"mixture": {"gate": "constant", "skew": 0.1}},
    "clip": {"clip": 1.0},
    "reference_kl": {"reference_weight": 0.1},
    "iw": {},  # positions.weighting=iw, with the passes over both heads that its log-probabilities take
}
SCORES = ("kl_alone", "teacher_signals")  # without gradient: forward KL of each row; forward KL and all other signals
SHAPES = {  # name -> vocabulary, student hidden, teacher hidden, rows
    "small": (151_936, 256, 512, 512),
    "large": (151_936, 2048, 4096, 1024),
    "tiny": (600, 16, 24, 40),  # for tests
}
WITH_METHODS = ("small", "tiny")
DEFAULT = ("small", "large")
SEQUENCES = 8  # responses into which the rows are divided


def loss_step(variant: str, inputs: dict[str, Tensor], k: float = 1.0) -> Callable[[], Tensor]:
    """Return a function that runs forward and backward of ``variant`` and returns the loss; ``k`` is for "ours"."""
    hidden, head = inputs["student_hidden"], inputs["student_head"]
    other, other_head, targets = inputs["teacher_hidden"], inputs["teacher_head"], inputs["targets"]
    rows = len(hidden)

    def dense() -> Tensor:
        log_q = torch.log_softmax((hidden @ head.T).float(), -1)
        with torch.no_grad():
            log_p = torch.log_softmax((other @ other_head.T).float(), -1)
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean()

    def trl() -> Tensor:
        mask = torch.ones(1, rows, device=hidden.device)
        return chunked(hidden[None], other[None], head, other_head, mask, 1.0)[0]

    def ours(k: float) -> Tensor:
        counts = sequence_counts(rows)
        chosen = torch.arange(rows, device=hidden.device)
        if k < 1:
            entropy = row_statistics(hidden.detach(), head.detach(), targets).entropy_N
            chosen = top_k(entropy, counts, Context(k)).indices_K
        weights = torch.full((len(chosen),), 1 / len(chosen), device=hidden.device)
        teacher = HiddenRows(other[chosen], other_head)
        return distillation_loss(hidden[chosen], head, teacher, Rows(weights, targets[chosen]), Alignment())[0]

    if variant == "trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss as chunked
    from onpolicy_skd.loss.divergence import distillation_loss
    from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
    from onpolicy_skd.models.lm_head import row_statistics
    from onpolicy_skd.selection.positions import Context, top_k

    forwards: dict[str, Callable[[], Tensor]] = {
        "dense": dense,
        "trl": trl,
        "ours_k100": lambda: ours(1.0),
        "ours_k20": lambda: ours(0.2),
        "ours": lambda: ours(k),
    }
    forward = forwards.get(variant) or functools.partial(method_loss, variant, inputs)

    def step() -> Tensor:
        hidden.grad = head.grad = None
        value = forward()
        if value.requires_grad:
            value.backward()
        return value.detach()

    return step


def method_loss(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of all rows under ``METHODS[name]``, or the mean forward KL by one of ``SCORES``."""
    from onpolicy_skd.config.schema import AlignmentSettings
    from onpolicy_skd.loss.divergence import distillation_loss
    from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
    from onpolicy_skd.loss.teacher_signals import teacher_signals

    hidden, head, targets = inputs["student_hidden"], inputs["student_head"], inputs["targets"]
    teacher = HiddenRows(inputs["teacher_hidden"], inputs["teacher_head"])
    rows = Rows(torch.full((len(hidden),), 1 / len(hidden), device=hidden.device), targets)
    if name == "teacher_signals":
        return teacher_signals(hidden, head, teacher, 16).forward_kl_N.mean()
    if name == "kl_alone":
        return distillation_loss(hidden.detach(), head.detach(), teacher, rows, Alignment("forward_kl"))[1].mean()
    if name == "iw":
        rows = Rows(rows.weights_N * iw_factors(inputs), targets)
    cfg = AlignmentSettings(**METHODS[name])
    alignment = Alignment.from_settings(cfg)
    loss = distillation_loss(hidden, head, teacher, rows, alignment)[0]
    if cfg.reference_weight:
        reference = HiddenRows(reference_hidden(inputs), head.detach())
        added = distillation_loss(hidden, head, reference, rows, alignment.exact("reverse_kl"))[0]
        loss = loss + cfg.reference_weight * added
    return loss


def iw_factors(inputs: dict[str, Tensor]) -> Tensor:
    """Return the factors ``[N]`` of ``positions.weighting=iw``."""
    from onpolicy_skd.config.schema import PositionSettings
    from onpolicy_skd.models.lm_head import row_statistics
    from onpolicy_skd.selection.metrics import Signals
    from onpolicy_skd.selection.weighting import iw, normalized

    targets, counts = inputs["targets"], sequence_counts(len(inputs["targets"]))
    student, teacher = (
        row_statistics(inputs[f"{role}_hidden"].detach(), inputs[f"{role}_head"].detach(), targets)
        for role in ("student", "teacher")
    )
    signals = Signals(
        lambda: (student.entropy_N, -student.logprob_N), counts, (), lambda: (teacher.entropy_N, teacher.logprob_N)
    )
    return normalized(iw(signals, PositionSettings(weighting="iw")), counts)


def reference_hidden(inputs: dict[str, Tensor]) -> Tensor:
    """Return hidden states of a model that differs from the student and has its LM head."""
    return inputs["student_hidden"].detach().roll(1, 0)


def sequence_counts(rows: int) -> list[int]:
    """Return the rows of each response."""
    return [rows // SEQUENCES] * SEQUENCES


def make_inputs(shape: Sequence[int], device: str) -> dict[str, Tensor]:
    """Return random hidden states, LM heads and targets; ``shape``: vocabulary, student and teacher hidden, rows."""
    vocabulary, student, teacher, rows = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rng = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=rng, device=device) * scale).to(dtype)

    return {
        "student_hidden": normal(rows, student).requires_grad_(),
        "student_head": normal(vocabulary, student, scale=student**-0.5).requires_grad_(),
        "teacher_hidden": normal(rows, teacher),
        "teacher_head": normal(vocabulary, teacher, scale=teacher**-0.5),
        "targets": torch.randint(0, vocabulary, (rows,), generator=rng, device=device),
    }


def measure(variant: str, shape: str, device: str) -> dict[str, float]:
    """Measure the seconds of a warm step and the peak extra MiB, in this process."""
    torch.set_num_threads(1)
    step = loss_step(variant, make_inputs(SHAPES[shape], device))
    reset_peak(device)
    resident = memory(device, "now")
    step()  # the warm-up; later steps have the same peak
    peak = memory(device, "peak")
    start = clock(device)
    value = step()
    seconds = clock(device) - start
    return {"seconds": seconds, "extra_mib": peak - resident, "loss": value.item()}


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure all variants of a shape ``rounds`` times, each in a separate process."""
    runs = run_alternately("loss", VARIANTS, [shape, device], rounds)
    spread = {
        "time_k100": ratio(runs["trl"], runs["ours_k100"], "seconds"),
        "time_k20": ratio(runs["trl"], runs["ours_k20"], "seconds"),
        "memory_k100": ratio(runs["trl"], runs["ours_k100"], "extra_mib"),
        "memory_k20": ratio(runs["trl"], runs["ours_k20"], "extra_mib"),
    }
    figures = {
        "shape": dict(zip(("vocabulary", "student_hidden", "teacher_hidden", "rows"), SHAPES[shape], strict=True)),
        "runs": runs,
        "ratio_to_trl": {name: value["median"] for name, value in spread.items()},
        "ratio_to_trl_spread": spread,
    }
    return figures | ({"methods": compare_methods(shape, device, rounds)} if shape in WITH_METHODS else {})


def compare_methods(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure each method relative to ``exact`` reverse KL, and the scores relative to forward KL alone."""
    runs = run_alternately("loss", [*METHODS, *SCORES], [shape, device], rounds)
    base = {name: "kl_alone" if name in SCORES else "exact" for name in runs}
    return {
        name: {
            "over": base[name],
            "seconds": statistics.median(r["seconds"] for r in runs[name]),
            "extra_mib": statistics.median(r["extra_mib"] for r in runs[name]),
            "time": ratio(runs[name], runs[base[name]], "seconds"),
            "memory": ratio(runs[name], runs[base[name]], "extra_mib"),
        }
        for name in runs
    }


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Print medians and ratios."""
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']}")
        for variant in VARIANTS:
            seconds, extra = (
                statistics.median(r[key] for r in figures["runs"][variant]) for key in ("seconds", "extra_mib")
            )
            print(f"  {variant:>13}  {seconds:8.3f} s  {extra:8.0f} MiB extra   {MEANING[variant]}")
        print("  TRL's figure over ours: " + ", ".join(f"{k} {v:.2f}" for k, v in figures["ratio_to_trl"].items()))
        for method, m in figures.get("methods", {}).items():
            time, space = ("{median:.2f} ({min:.2f}-{max:.2f})".format(**m[key]) for key in ("time", "memory"))
            print(f"  {method:>18}  {m['seconds']:8.3f} s  {m['extra_mib']:6.0f} MiB extra   over {m['over']}: "
                  f"time {time}, memory {space}")  # fmt: skip
