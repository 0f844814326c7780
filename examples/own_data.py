"""Train on a file of questions and answers.

    python examples/own_data.py [TRAIN.jsonl TEST.jsonl]

Each line is a JSON object with a question and an answer, here in the columns "problem" and "solution".  An answer ends
with "#### " and the result, as in GSM8K; math-verify judges it.  Without files the script writes two with generated
word problems, which the bundled pair understands.
"""

import itertools
import json
import sys
from pathlib import Path

from onpolicy_skd import evaluate, load_config, train
from onpolicy_skd.data import demo_task


def write_problems(file: Path, split: str, count: int) -> Path:
    """Write ``count`` generated problems of ``split`` to ``file``."""
    problems = itertools.islice(demo_task.problems(split), count)
    rows = [{"problem": row["question"], "solution": row["answer"]} for row in problems]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def main(files: list[str]) -> None:
    folder = Path("runs") / "own_data_files"
    train_file, test_file = files or (
        write_problems(folder / "train.jsonl", "train", 2_000),
        write_problems(folder / "test.jsonl", "test", 200),
    )
    settings = load_config(
        "demo",
        {
            "run.name": "own_data",
            "run.steps": 20,
            "run.evaluate_every": 10,
            "data.source": "jsonl",
            "data.train_file": train_file,
            "data.eval_file": test_file,
            "data.question_column": "problem",
            "data.answer_column": "solution",
            "data.validation_problems": 50,  # held out of the training file, for the evaluations during training
            "learner.batch_size": 16,
            "rollout.engine": "transformers",
            "eval.teacher": False,
            "eval.before": False,
            "resume": "auto",
        },
    )
    result = train(settings)
    evaluation = evaluate(result.paths.final, samples=4)  # on the test file, by the settings of the run
    print(f"pass@4: {evaluation.result['pass_at']['match']['4']['share']:.3f}")
    print("an answer:", evaluation.records[0]["output"])


if __name__ == "__main__":
    main(sys.argv[1:])
