"""Compare the gradient of each class sampler with the exact gradient of full KD: angle and length.

The measurement takes one batch of reference answers, forward KL at every position, and all parameters of the student in
float32, whatever ``student.lora_rank`` is (RS-KD paper, arXiv 2503.16870, Table 3).  Peak memory is four gradients plus
student and teacher: by calculation 13 GB for a student of 0.5 B parameters and a teacher of 1.5 B in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, parse_override
from onpolicy_skd.config.schema import ClassSettings, Settings
from onpolicy_skd.data.chat import special_ids
from onpolicy_skd.run.exits import EXIT_OK, run_cli
from onpolicy_skd.storage.files import write_json

TRUNCATIONS = [
    {"sampler": "top_k", "k": 12},
    {"sampler": "top_k", "k": 50},
    {"sampler": "top_k", "k": 300},
    {"sampler": "top_k_normalised", "k": 12},
    {"sampler": "top_p", "k": 300, "p": 0.9},
    {"sampler": "ghost_token", "k": 12},
    {"sampler": "naive_fix", "k": 12},
    {"sampler": "label_smoothing", "k": 12},
]
UNIQUE_CLASSES = 12  # mean number of classes per position that RS-KD keeps in its paper's table
MAX_DRAWS = 4_096


def measure(settings: Settings, samples: int) -> dict[str, Any]:
    """Measure the angle (degrees) and the length ratio to the exact gradient, one record per class sampler.

    ``samples``: reference answers in the batch.  Raises ConfigError for several teachers.
    """
    from onpolicy_skd.learner.learner import Learner
    from onpolicy_skd.models.loading import load_model, pick_device, pick_dtype
    from onpolicy_skd.models.split_model import split
    from onpolicy_skd.run.prepare import prepare
    from onpolicy_skd.teacher.teacher import Teacher

    if settings.teachers:
        raise ConfigError("teachers: gradients are measured for one teacher; accepted: teacher.* only")
    device = pick_device(settings.run.device)
    run = prepare(settings)
    student = split(load_model(settings.student.model, torch.float32, device), run.vocabulary)
    dtype = pick_dtype(settings.teacher.dtype, device)
    pad_id, teacher_cfg = run.tokenizer.pad_token_id, settings.teacher
    teacher_model = split(load_model(settings.teacher_model.model, dtype, device), run.vocabulary)
    teacher = Teacher(teacher_model, teacher_cfg.tokens_per_batch, pad_id, settings.alignment.temperature)
    batch = run.references(run.train, 0)[:samples]
    teacher.encode(batch)
    positions = [(t.key, range(len(t.target_ids))) for t in batch]

    def gradient(classes: ClassSettings) -> list[Tensor]:
        learner = Learner(
            student,
            teacher,
            settings.model_copy(update={"classes": classes}),
            pad_id,
            1,
            special_ids=sorted(special_ids(run.tokenizer)),
        )
        student.model.zero_grad()
        learner.accumulate(batch)
        return [p.grad.flatten().clone() for p in learner.state.named.values() if p.grad is not None]

    def unique_classes(options: ClassSettings) -> float:
        targets = teacher.classes(positions, [0] * len(positions), options)
        return (targets.probs_NC > 0).sum().item() / len(targets.probs_NC)

    def records() -> Iterator[dict[str, Any]]:
        exact = gradient(ClassSettings())
        draws = _draws_for(unique_classes)
        samplers = [{"sampler": "rs_kd", "draws": draws}, {"sampler": "rs_kd", "draws": 64}, *TRUNCATIONS]
        for number, sampler_cfg in enumerate(samplers, 1):
            print(f"gradient {number}/{len(samplers)}: {sampler_cfg}", file=sys.stderr, flush=True)
            classes_cfg = ClassSettings(**sampler_cfg)
            sampled = gradient(classes_cfg)
            cosine = _dot(sampled, exact) / math.sqrt(_dot(sampled, sampled) * _dot(exact, exact))
            yield {
                **sampler_cfg,
                "classes": unique_classes(classes_cfg),
                "angle": math.degrees(math.acos(min(1.0, cosine))),
                "norm_ratio": math.sqrt(_dot(sampled, sampled) / _dot(exact, exact)),
            }

    return {
        "student": settings.student.model,
        "teacher": settings.teacher.model,
        "samples": len(batch),
        "positions": sum(len(indices) for _, indices in positions),
        "divergence": Learner(student, teacher, settings, pad_id, 1).scorer.divergence(batch),
        "records": list(records()),
    }


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the dot product in float64: over millions of parameters float32 loses small angles."""
    return sum(torch.dot(a.double(), b.double()).item() for a, b in zip(left, right, strict=True))


def _draws_for(unique_classes: Callable[[ClassSettings], float]) -> int:
    """Return the number of draws that yields about UNIQUE_CLASSES different classes per position, by bisection."""
    low, high = UNIQUE_CLASSES, MAX_DRAWS
    while low < high:
        middle = (low + high) // 2
        if unique_classes(ClassSettings(sampler="rs_kd", draws=middle)) < UNIQUE_CLASSES:
            low = middle + 1
        else:
            high = middle
    return low


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.gradients") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--config", type=Path, help="settings of the pair and its data")
    parser.add_argument("--samples", type=int, default=16, help="reference answers in the batch (default: 16)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for skd train")
    args = parser.parse_args(argv)
    forced = [f"learner.batch_size={args.samples}", "mode=off_policy", "positions.policy=full", "samples.keep=1",
              "alignment.divergence=forward_kl", "alignment.variant=full_kd", "alignment.estimator=exact",
              "alignment.kd_weight=1", "alignment.ema_weight=0", "learner.compute_dtype=float32"]  # fmt: skip
    changes = [*args.overrides, *forced]
    return run_cli(lambda: _run(args, build_settings(args.config, [parse_override(text) for text in changes])))


def _run(args: argparse.Namespace, settings: Settings) -> int:
    result = measure(settings, args.samples)
    print(f"{result['positions']} positions of {result['samples']} answers, divergence {result['divergence']:.2f} nats")
    print("| sampler | classes per position | angle | norm ratio |\n|---|---|---|---|")
    for r in result["records"]:
        options = ", ".join(f"{k}={v}" for k, v in r.items() if k in ("draws", "k", "p"))
        print(f"| {r['sampler']} {options} | {r['classes']:.1f} | {r['angle']:.1f}° | {r['norm_ratio']:.2f} |")
    if args.json:
        write_json(args.json, result)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
