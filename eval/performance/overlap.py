"""Steps with the phases one after the other, streaming, and with overlap, in two processes of one thread (or GPU) each.

The real driver's step and the real actors: an engine in one process, learner and teacher in another.  What is compared
is the wall time of a step with how long each process was busy in it: with overlap the longest of these is the bound.
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
from eval.performance.measuring import in_turn, ratio
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.tracing import Span

__all__ = ["DEFAULT", "SHAPES", "compare", "measure", "show"]
VARIANTS: dict[str, dict[str, Any]] = {  # and pipeline's settings
    "one_by_one": {},
    "streaming": {"streaming": True},
    "overlap": {"max_staleness": 1},
}
ENDS = 0.045  # share of the classes that end an answer: about a third of the limit of 64 tokens on average
WARM, TIMED = 2, 6  # steps
BUSY = ("generate", "load weights", "receive weights", "filter", "encode", "backbone", "entropy", "loss", "backward",
        "optimizer", "pack weights", "send weights")  # fmt: skip


def measure(variant: str, shape: str, device: str) -> dict[str, Any]:
    """Wall seconds of a step, and of these how many each process was busy."""
    from actors.cluster import connect  # Ray would count as memory of the other benchmarks
    from actors.workers import Workers
    from onpolicy_skd.train import update

    os.environ["OMP_NUM_THREADS"] = "1"
    own = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(settings_for(Path(folder), own, device, 1.0), VARIANTS[variant])
        save_random_models(Path(folder), own, ENDS)
        run = prepare(settings, lambda _: None)
        book: Any = SimpleNamespace(step=lambda *_: None)
        with connect(settings) as resources:
            roles = Workers(settings, resources, run.vocabulary, run.tokenizer.pad_token_id, run.steps)
            try:
                roles.wait_ready(lambda _: None)
                started: dict[int, Any] = {}
                begun = 0.0
                for step in range(WARM + TIMED):
                    if step == WARM:
                        roles.spans()  # those of the warm steps are forgotten
                        begun = time.time()
                    update(run, roles, run.train, book, step, started)
                seconds = (time.time() - begun) / TIMED
                spans = roles.spans()
            finally:
                roles.close()
    busy = {who: busy_seconds([s for s in found if s.name in BUSY], begun) / TIMED for who, found in spans.items()}
    return {"seconds": seconds, "busy": busy, "step_over_longest": seconds / max(busy.values())}


def _settings(settings: Settings, pipeline: dict[str, Any]) -> Settings:
    def changed(section: str, **values: Any) -> Any:
        return getattr(settings, section).model_copy(update=values)

    return settings.model_copy(
        update={
            "run": changed("run", steps=WARM + TIMED + 1),  # so that the last one timed begins the next rollouts too
            "rollout": changed("rollout", placement="actor"),
            "pipeline": changed("pipeline", **pipeline),
            "learner": changed("learner", threads=1),
        }
    )


def busy_seconds(spans: Sequence[Span], since: float) -> float:
    """Length of the union of ``spans`` from ``since`` on: they may lie within each other."""
    total, end = 0.0, since
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total


def compare(shape: str, device: str, rounds: int) -> dict[str, Any]:
    """All variants, ``rounds`` times in turn, each in processes of its own."""
    found = in_turn("overlap", tuple(VARIANTS), [shape, device], rounds)
    over = {v: statistics.median(r["step_over_longest"] for r in found[v]) for v in VARIANTS}
    gains = {v: ratio(found["one_by_one"], found[v], "seconds") for v in VARIANTS}
    return {"shape": SHAPES[shape]._asdict(), "runs": found, "step_over_longest": over, "one_by_one_over_it": gains}


def show(shapes: dict[str, dict[str, Any]]) -> None:
    """Prints medians."""
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
