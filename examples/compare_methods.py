"""Compare two ways to select positions: the student's entropy, and chance.

    python examples/compare_methods.py

Both runs have the same seed, data and budget (20 % of the positions), and both students answer the same problems, so
the difference is tested pairwise.  One seed and few steps show how it is done, not which method is better:
docs/comparison.md shows grids of methods, modes and seeds.
"""

import numpy as np

from onpolicy_skd import evaluate, load_config, train
from onpolicy_skd.evaluation.statistics import paired_difference

METHODS = ("student_entropy", "random")
PROBLEMS = 200


def answers_right(metric: str) -> list[bool]:
    """Train with positions selected by ``metric``; return for each held-out problem if the student then solves it."""
    settings = load_config(
        "demo",
        {
            "run.name": f"compare_{metric}",
            "run.steps": 20,
            "run.evaluate_every": 0,
            "learner.batch_size": 16,
            "rollout.engine": "transformers",
            "positions.metric": metric,
            "eval.problems": PROBLEMS,
            "eval.teacher": False,
            "eval.before": False,
            "resume": "auto",
        },
    )
    return [record["match"] for record in evaluate(train(settings).paths.final).records]


def main() -> None:
    right = {metric: answers_right(metric) for metric in METHODS}
    for metric, answers in right.items():
        print(f"{metric}: {100 * sum(answers) / len(answers):.1f} % of {len(answers)} problems")
    first, second = METHODS
    difference = paired_difference(np.array([right[first]]), np.array([right[second]]))
    print(
        f"{first} - {second}: {100 * difference.mean:.1f} points "
        f"(95 %: {100 * difference.low:.1f} to {100 * difference.high:.1f}), p = {difference.p:.2f}"
    )


if __name__ == "__main__":
    main()
