"""Compare two evaluations of the same problems: exact match before and after, with McNemar's exact test.

BEFORE and AFTER are folders of ``eval.gsm8k --out`` or files of records (``evaluations/*.jsonl`` of a run).
``--record`` also stores the verdicts of each problem as one arm of a JSON file.  Given alone, such a file is shown arm
by arm.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data.rows import read_jsonl
from onpolicy_skd.evaluation.evaluate import RULES
from onpolicy_skd.evaluation.exact_match import Z, wilson
from onpolicy_skd.evaluation.record_file import RECORDS
from onpolicy_skd.report.summary import percent
from onpolicy_skd.run.exits import EXIT_OK, run_cli
from onpolicy_skd.storage.files import write_text

Records = dict[str, dict[str, Any]]  # by key
FIELDS = {"key": str, "question": str, "tokens": int, "finish_reason": str, **dict.fromkeys(RULES, int)}


@dataclass(frozen=True, slots=True)
class Change:
    """Change of a share on paired problems: ``gained`` went from wrong to right, ``lost`` from right to wrong."""

    problems: int
    before: float
    after: float
    gained: int
    lost: int

    @classmethod
    def of(cls, before: Sequence[int], after: Sequence[int]) -> Change:
        """Count the changes between the verdicts (0 or 1) of the same problems in the same order."""
        pairs = list(zip(before, after, strict=True))
        count = len(pairs)
        return cls(count, sum(before) / count, sum(after) / count, pairs.count((0, 1)), pairs.count((1, 0)))

    @property
    def p_value(self) -> float:
        """Two-sided exact p-value of McNemar's test of equally likely gains and losses (McNemar, 1947)."""
        from scipy.stats import binomtest

        discordant = self.gained + self.lost
        return float(binomtest(self.gained, discordant, 0.5).pvalue) if discordant else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of after - before: the adjusted Wald interval of paired shares (Agresti and Min, 2005)."""
        gained, lost, count = self.gained + 0.5, self.lost + 0.5, self.problems + 2.0
        center = (gained - lost) / count
        half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
        return (max(-1.0, center - half), min(1.0, center + half))

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return (
            f"{_share(self.before, self.problems)} -> {_share(self.after, self.problems)}, "
            f"{100 * (self.after - self.before):+.1f} points ({low:+.1f} to {high:+.1f}); "
            f"{self.gained} gained, {self.lost} lost, McNemar p = {self.p_value:.2g}"
        )


def read(path: Path) -> Records:
    """Read records with one answer per problem.  Raises ConfigError naming the file and what it lacks."""
    file = path / RECORDS if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{path}: no such file; accepted: a folder of eval.gsm8k --out, or a file of its records")
    records: Records = {}
    for number, row in enumerate(read_jsonl(file), 1):
        wrong = [k for k, kind in FIELDS.items() if not isinstance(row.get(k), kind)]
        if wrong:
            raise ConfigError(f"{file} record {number}: has no valid {wrong[0]}; accepted: records of eval.gsm8k")
        key = row["key"].rpartition("/")[0]
        if key in records:
            raise ConfigError(f"{file} record {number}: a second answer to {key}; accepted: --samples 1")
        records[key] = row
    if not records:
        raise ConfigError(f"{file}: has no records")
    return records


def paired(first: Records, second: Records, names: tuple[Path, Path]) -> list[str]:
    """Return the keys of both records.  Raises ConfigError unless they hold the same questions."""
    for key in first.keys() | second.keys():
        questions = [records[key]["question"] if key in records else None for records in (first, second)]
        if questions[0] != questions[1]:
            raise ConfigError(f"{names[0]} and {names[1]} do not hold the same problems: {key} differs")
    return list(first)


def arm(before: Records, after: Records, keys: Sequence[str]) -> dict[str, Any]:
    """Return the verdicts (0 or 1), tokens and truncations of each problem as columns."""
    columns: dict[str, Any] = {"keys": list(keys)}
    for when, records in (("before", before), ("after", after)):
        columns[when] = [int(records[k]["match"]) for k in keys]
        columns[f"strict_{when}"] = [int(records[k]["strict"]) for k in keys]
        columns[f"tokens_{when}"] = [records[k]["tokens"] for k in keys]
        columns[f"truncated_{when}"] = [int(records[k]["finish_reason"] == "length") for k in keys]
    return columns


def show(name: str, columns: dict[str, Any]) -> None:
    """Print the changes of an arm."""
    print(f"{name}: {len(columns['keys'])} problems")
    print(f"  match: {Change.of(columns['before'], columns['after'])}")
    print(f" strict: {Change.of(columns['strict_before'], columns['strict_after'])}")
    tokens, truncated = (
        [statistics.fmean(columns[f"{column}_{when}"]) for when in ("before", "after")]
        for column in ("tokens", "truncated")
    )
    print(f"  tokens per answer: {tokens[0]:.0f} -> {tokens[1]:.0f}")
    print(f"  truncated: {percent(truncated[0])} -> {percent(truncated[1])}")


def _share(share: float, count: int) -> str:
    return percent(share, wilson(round(share * count), count))


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.paired") -> int:
    """Run the command line and return the exit code: 0 for success, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="BEFORE AFTER", help="or one file of --record")
    parser.add_argument("--teacher", type=Path, help="evaluation of the teacher on the same problems")
    parser.add_argument("--record", type=Path, help="JSON file that takes the verdicts, one arm per call")
    parser.add_argument("--arm", default="student", help="name of the arm in --record (default: student)")
    parser.add_argument("--config", type=Path, help="config.yaml of the run, kept in --record")
    return run_cli(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    if len(args.files) == 1:
        recorded = _recorded(args.files[0])
    elif len(args.files) == 2:
        recorded = _compare(args)
    else:
        raise ConfigError(f"{len(args.files)} files; accepted: BEFORE and AFTER, or one file of --record")
    for name, columns in recorded["arms"].items():
        show(name, columns)
    if teacher := recorded.get("teacher"):
        print(f"teacher: {_share(statistics.fmean(teacher), len(teacher))}")
    return EXIT_OK


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    before, after = map(read, args.files)
    keys = paired(before, after, tuple(args.files))
    columns = arm(before, after, keys)
    result: dict[str, Any] = {"arms": {args.arm: columns}}
    if args.config:
        columns["settings"] = _settings(args.config)
    if args.teacher:
        teacher = read(args.teacher)
        paired(before, teacher, (args.files[0], args.teacher))
        result["teacher"] = [int(teacher[k]["match"]) for k in keys]
    if args.record:
        saved = _recorded(args.record) if args.record.exists() else {"arms": {}}
        if any(other["keys"] != keys for other in saved["arms"].values()):
            raise ConfigError(f"--record {args.record}: its arms are of other problems; give another file")
        saved = {**saved, **result, "arms": saved["arms"] | result["arms"]}
        args.record.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.record, json.dumps(saved) + "\n")
    return result


def _recorded(file: Path) -> dict[str, Any]:
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(recorded["arms"], dict):
            raise TypeError
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{file}: not a file of --record; to compare evaluations give BEFORE and AFTER") from None
    return recorded


def _settings(file: Path) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
