"""Select positions by a custom metric: where the student is sure and the teacher disagrees.

    python examples/own_metric.py

A metric is a function from ``Signals`` (what is known about N positions, in nats) to N scores; the highest are
supervised.  docs/extending.md lists the signals.  Actors import this module by its name, so training must start only
under ``__main__``.
"""

from torch import Tensor

from onpolicy_skd import load_config, train
from onpolicy_skd.selection.metrics import Signals


def sure_and_wrong(signals: Signals) -> Tensor:
    """Return ``[N]``: the reverse KL to the teacher divided by the student's entropy plus 0.1 nats."""
    return signals.reverse_kl_N / (signals.entropy_N + 0.1)


def main() -> None:
    settings = load_config(
        "demo",  # the bundled pair
        {
            "run.name": "own_metric",
            "run.steps": 20,
            "run.evaluate_every": 0,
            "learner.batch_size": 16,
            "rollout.engine": "transformers",  # starts faster than vLLM and works where vLLM cannot be installed
            "positions.metric": "own_metric:sure_and_wrong",
            "positions.k": 0.1,
            "eval.problems": 100,
            "eval.teacher": False,
            "eval.divergence_prompts": 16,
            "resume": "auto",  # a second call continues, or returns the result at once
        },
    )
    summary = train(settings).summary
    for name in ("divergence", "exact_match"):
        print(f"{name}: {summary[name]['before']:.3f} before, {summary[name]['after']:.3f} after")


if __name__ == "__main__":
    main()
