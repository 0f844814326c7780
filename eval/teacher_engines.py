"""Compare the teacher in vLLM with the teacher in transformers: hidden states, log-probabilities, losses.

Both read the same reference answers, and each trains a copy of the student.  Each engine runs in a process that ends
before the other starts, so peak memory is one teacher and the student.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from onpolicy_skd.config.loading import build_settings, parse_override
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.run.exits import EXIT_OK, run_cli
from onpolicy_skd.storage.files import write_json

ENGINES = ("transformers", "vllm")


def compare(config: Path | None, overrides: Sequence[str], samples: int, steps: int) -> dict[str, Any]:
    """Compare the engines on ``samples`` reference answers per step.

    Returns the relative difference of the rows (Frobenius norm), the mean absolute differences of entropies and
    log-probabilities (nats), and the losses of ``steps`` steps with each engine.
    """
    results = []
    for engine in ENGINES:
        print(f"teacher.engine={engine}", file=sys.stderr, flush=True)
        changes = [*overrides, "mode=off_policy", "samples.keep=1", f"teacher.engine={engine}"]
        settings = build_settings(config, [parse_override(text) for text in changes])
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, settings, samples, steps).result())
    plain, ours = results
    return {
        "rows": float(np.linalg.norm(ours["rows"] - plain["rows"]) / np.linalg.norm(plain["rows"])),
        "positions": len(plain["rows"]),
        **{name: float(np.abs(ours[name] - plain[name]).mean()) for name in ("entropy", "logprob")},
        "losses": {engine: result["losses"] for engine, result in zip(ENGINES, results, strict=True)},
    }


def measure(settings: Settings, samples: int, steps: int) -> dict[str, Any]:
    """Return rows ``[N, G]``, entropies and log-probabilities ``[N]`` of the first batch, and each step's loss."""
    import torch

    from actors.teacher_actor import build_teacher
    from onpolicy_skd.data.chat import special_ids
    from onpolicy_skd.learner.learner import Learner
    from onpolicy_skd.models.loading import load_student, pick_device
    from onpolicy_skd.models.split_model import split
    from onpolicy_skd.run.prepare import prepare

    run = prepare(settings)
    pad_id = run.tokenizer.pad_token_id
    teacher = build_teacher(settings, run.vocabulary, pad_id)
    device = pick_device(settings.run.device)
    student = split(load_student(settings, device, device), run.vocabulary)
    learner = Learner(student, teacher, settings, pad_id, steps, special_ids=sorted(special_ids(run.tokenizer)))
    losses: list[float] = []
    first: dict[str, Any] = {}
    for step in range(steps):
        batch = run.references(run.train, step)[:samples]
        teacher.encode(batch)
        if step == 0:
            rows_NG = teacher.rows([(t.key, range(len(t.target_ids))) for t in batch])
            values = (rows_NG, *teacher.entropy_and_logprob([t.key for t in batch]))
            arrays = [value.to(torch.float32).cpu().numpy() for value in values]
            first = dict(zip(("rows", "entropy", "logprob"), arrays, strict=True))
        losses.append(learner.step(batch).loss)
        teacher.release([t.key for t in batch])
        print(f"step {step + 1}/{steps}: loss {losses[-1]:.5f}", file=sys.stderr, flush=True)
    return first | {"losses": losses}


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.teacher_engines") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--config", type=Path, help="settings of the pair and its data")
    parser.add_argument("--samples", type=int, default=4, help="reference answers per step (default: 4)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps with each engine (default: 5)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for skd train")
    args = parser.parse_args(argv)
    return run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    result = compare(args.config, args.overrides, args.samples, args.steps)
    plain, ours = (result["losses"][engine] for engine in ENGINES)
    print(f"rows at {result['positions']} positions: relative difference {result['rows']:.2e}")
    print(f"entropy, log-probability: mean differences {result['entropy']:.2e}, {result['logprob']:.2e} nats")
    print("losses: " + ", ".join(f"{a:.5f} / {b:.5f}" for a, b in zip(plain, ours, strict=True)))
    print(f"largest difference of losses: {max(abs(a - b) for a, b in zip(plain, ours, strict=True)):.2e}")
    if args.json:
        write_json(args.json, result)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
