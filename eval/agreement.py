"""Compare our two rules for correct answers with lm-eval's, answer by answer.

Reads records of ``eval.gsm8k --out`` or of a run's ``evaluations/``.  ``strict`` must agree with lm-eval's strict-match
on every answer.  ``match`` and lm-eval's flexible-extract are different rules: every answer that they judge differently
is listed with the reason (docs/evaluation.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.suite import load_tasks
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data.rows import read_jsonl
from onpolicy_skd.evaluation.exact_match import ANSWER_TAIL, THINKING, judged_text, score
from onpolicy_skd.evaluation.quantity import has_number, quantity
from onpolicy_skd.run.exits import EXIT_FAILED, EXIT_OK, run_cli
from onpolicy_skd.storage.files import write_text

FILTERS = ("strict-match", "flexible-extract")
FAR = f"the last number stands more than {ANSWER_TAIL} characters before the end"
NEEDED = ("key", "output", "reference")


@dataclass(frozen=True, slots=True)
class AnswerVerdict:
    """One answer, judged by four rules; ``ours`` and ``theirs``: the texts that match and flexible-extract judged."""

    key: str
    output: str
    strict: bool
    strict_match: bool
    match: bool
    flexible: bool
    ours: str | None
    theirs: str


def judge(records: Sequence[dict[str, str]]) -> list[AnswerVerdict]:
    """Judge every record by our rules and by lm-eval's gsm8k task."""
    results = []
    for record, theirs in zip(records, harness([(r["output"], r["reference"]) for r in records]), strict=True):
        ours = score(record["output"], record["reference"])
        (strict_match, _), (flexible, looked_at) = (theirs[name] for name in FILTERS)
        results.append(
            AnswerVerdict(
                record["key"],
                record["output"],
                ours.strict,
                strict_match,
                ours.match,
                flexible,
                ours.extracted,
                looked_at,
            )
        )
    return results


def harness(answers: Sequence[tuple[str, str]]) -> list[dict[str, tuple[bool, str]]]:
    """Judge (output, reference) pairs by lm-eval's gsm8k task; return each pair's (right, extracted text) by filter."""
    from lm_eval.api.instance import Instance

    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(json.dumps({"question": "", "answer": reference}) + "\n" for _, reference in answers)
        (Path(folder) / "gsm8k").mkdir()
        write_text(Path(folder) / "gsm8k" / "test.jsonl", rows)
        task = load_tasks(["gsm8k"], Path(folder), fewshot=0)["gsm8k"]
        docs = list(task.test_docs())
    instances = [
        Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, doc_id=i, resps=[output])
        for i, (doc, (output, _)) in enumerate(zip(docs, answers, strict=True))
    ]
    task._instances = instances
    task.apply_filters()
    return [
        {
            name: (bool(task.process_results(i.doc, [i.filtered_resps[name]])["exact_match"]), i.filtered_resps[name])
            for name in FILTERS
        }
        for i in instances
    ]


def reason(answer: AnswerVerdict) -> str:
    """Return why match and flexible-extract judge an answer differently, in a few words."""
    text = judged_text(answer.output)
    start = answer.output.rfind(text)
    end, place = start + len(text), answer.output.rfind(answer.theirs)
    if place < 0:
        return "flexible-extract reads no number"
    if not start <= place < end:
        thinking = place < start or THINKING.match(answer.output, end)
        return f"flexible-extract reads {'the thinking' if thinking else 'the turn after the answer'}"
    if answer.ours is None:
        far = not has_number(text[-ANSWER_TAIL:])
        return FAR if far else "the last number is not stated alone"
    stated = answer.output.rfind(answer.ours, start, end)  # -1: ``ours`` is a number that the output spells differently
    if 0 <= stated <= place - len(answer.ours):
        right = answer.match
        return "a number follows the final answer" if right else "the number after the final answer is the right one"
    return _other_reading(answer.ours, answer.theirs, answer.match)


def _other_reading(ours: str, theirs: str, match: bool) -> str:
    """Return why two readings of one statement differ."""
    our_number, their_number = quantity(ours), quantity(theirs.strip("$.,"))
    if our_number is None:
        return "a formula, which math-verify computes" if match else "the stated answer is not one number"
    if their_number and our_number.equals(their_number):
        return "the same number, written otherwise"
    if "\u2212" in ours:
        return "lm-eval does not read the minus sign \u2212"
    return "flexible-extract reads a piece of the number"


def read(files: Iterable[Path]) -> list[dict[str, str]]:
    """Read the records of all files.  Raises ConfigError naming file and record."""
    records = []
    for file in files:
        if file.name.startswith("tokens-"):  # token views, which a glob over evaluations/ includes
            continue
        for number, row in enumerate(read_jsonl(file), 1):
            missing = [k for k in NEEDED if not isinstance(row.get(k), str)]
            if missing:
                raise ConfigError(f"{file} record {number}: has no {missing[0]}; accepted: records of eval.gsm8k")
            records.append(row)
    if not records:
        raise ConfigError("no records to compare")
    return records


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.agreement") -> int:
    """Run the command line and return the exit code: 0 if strict agrees everywhere, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+", help="records.jsonl, or evaluations/*.jsonl of a run")
    return run_cli(lambda: _run(parser.parse_args(argv).records))


def _run(files: Sequence[Path]) -> int:
    answers = judge(read(files))
    strict = [j for j in answers if j.strict != j.strict_match]
    loose = [j for j in answers if j.match != j.flexible]
    print(f"{len(answers)} answers")
    for name, ours, theirs in (("strict", "strict", "strict_match"), ("match", "match", "flexible")):
        right = [sum(getattr(j, rule) for j in answers) for rule in (ours, theirs)]
        print(f"{name:>7}: {right[0]} right here, {right[1]} by lm-eval's {FILTERS[name == 'match']}")
    print(f"strict: {len(strict)} disagreements" + "".join(f"\n  {j.key}" for j in strict))
    print(f"match: {len(loose)} disagreements")
    for why, count in Counter(map(reason, loose)).most_common():
        print(f"  {count} x {why}")
    for j in loose:
        verdict = "right here" if j.match else "wrong here"
        print(f"  {j.key}: {verdict}: we look at {j.ours!r}, flexible-extract at {j.theirs!r} ({reason(j)})")
    return EXIT_FAILED if strict else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
