"""Steps with sequential, streaming and overlapping phases, in two processes of one thread (or GPU) each.

The driver runs its steps on Ray actors: the engine in one process, learner and teacher in another.  The wall time of
a step is compared with the time each process was busy in it; with overlap, the longest busy time is a lower bound.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eval.performance.end_to_end import DEFAULT, SHAPES, save_random_models, settings_for
from eval.performance.measuring import ratio, run_alternately
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.tracing import Span

__all__ = ["DEFAULT", "SHAPES", "compare", "measure", "show"]
VARIANTS: dict[str, dict[str, Any]] = {  # variant -> settings of pipeline
    "one_by_one": {},
    "streaming": {"streaming": True},
    "overlap": {"max_staleness": 1},
}
EOS_SHARE = 0.045  # of the classes end an answer: its mean length is about a third of the limit of 64 tokens
WARM, TIMED = 2, 6  # steps that are not timed, and timed steps
BUSY = ("generate", "load weights", "receive weights", "filter", "encode", "backbone", "entropy", "loss", "backward",
        "optimizer", "pack weights", "send weights")  # fmt: skip


def measure(variant: str, shape: str, device: str) -> dict[str, Any]:
    """Measure the wall seconds of a step, and the seconds that each process was busy in it."""
    from actors.cluster import connect  # imported late: Ray would count as memory of the other benchmarks
    from actors.workers import Workers
    from onpolicy_skd.train import update

    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(settings_for(Path(folder), sizes, device, 1.0), VARIANTS[variant])
        save_random_models(Path(folder), sizes, EOS_SHARE)
        run = prepare(settings, lambda _: None)
        logger: Any = SimpleNamespace(step=lambda *_: None)
        with connect(settings) as resources:
            workers = Workers(settings, resources, run.vocabulary, run.tokenizer.pad_token_id, run.steps)
            try:
                workers.wait_ready(lambda _: None)
                pending_rollouts: dict[int, Any] = {}
                start = 0.0
                for step in range(WARM + TIMED):
                    if step == WARM:
                        workers.spans()  # discards the spans of the warm steps
                        start = time.time()
                    update(run, workers, run.train, logger, step, pending_rollouts)
                seconds = (time.time() - start) / TIMED
                spans = workers.spans()
            finally:
                workers.close()
    busy = {
        who: busy_seconds([s for s in recorded if s.name in BUSY], start) / TIMED for who, recorded in spans.items()
    }
    return {"seconds": seconds, "busy": busy, "step_over_longest": seconds / max(busy.values())}


def _settings(settings: Settings, pipeline: dict[str, Any]) -> Settings:
    def changed(section: str, **values: Any) -> Any:
        return getattr(settings, section).model_copy(update=values)

    return settings.model_copy(
        update={
            "run": changed("run", steps=WARM + TIMED + 1),  # the last timed step also starts the next rollouts
            "rollout": changed("rollout", placement="actor", threads=1),
            "pipeline": changed("pipeline", **pipeline),
            "learner": changed("learner", threads=1),
        }
    )


def busy_seconds(spans: Sequence[Span], since: float) -> float:
    """Return the seconds after ``since`` that ``spans``, which may overlap, cover together."""
    total, end = 0.0, since
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure all variants of a shape ``rounds`` times, each in a separate process."""
    runs = run_alternately("overlap", tuple(VARIANTS), [shape, device], rounds)
    over = {v: statistics.median(r["step_over_longest"] for r in runs[v]) for v in VARIANTS}
    gains = {v: ratio(runs["one_by_one"], runs[v], "seconds") for v in VARIANTS}
    return {"shape": SHAPES[shape]._asdict(), "runs": runs, "step_over_longest": over, "one_by_one_over_it": gains}


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Print medians."""
    for name, figures in shapes.items():
        print(f"\n{name}: {figures['shape']}")
        for variant, runs in figures["runs"].items():
            busy = {who: statistics.median(r["busy"][who] for r in runs) for who in runs[0]["busy"]}
            print(
                f"  {variant:>10}  {statistics.median(r['seconds'] for r in runs):.2f} s a step; busy "
                + ", ".join(f"{who} {seconds:.2f}" for who, seconds in busy.items())
                + f"; step over the longest {figures['step_over_longest'][variant]:.2f}"
                + f"; one by one over it {figures['one_by_one_over_it'][variant]['median']:.2f}"
            )
