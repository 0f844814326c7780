"""Inject faults into runs and count their outcomes; ``make faults``."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from eval.faults import damage, processes
from eval.faults.processes import Lab, Tally
from onpolicy_skd.report.summary import versions
from onpolicy_skd.storage.files import write_text

COUNTS = ("injected", "ended_right", "clear_error", "wrong", "lost")
Scenario = Callable[[Lab, Path, random.Random], Tally]


def scenarios(count: int) -> dict[str, Scenario]:
    """Return the scenarios by name, with ``count`` kills of each kind of process."""
    few = max(1, count // 4)

    def kills(kind: str) -> Scenario:
        return lambda lab, _, __: processes.killed_actors(lab, [kind] * count)

    return {
        "damaged-checkpoints": lambda _, folder, rng: damage.damaged_checkpoints(folder, rng, 10 * count),
        "damaged-caches": lambda _, folder, rng: damage.damaged_caches(folder, rng, 10 * count),
        "damaged-data": lambda _, folder, rng: damage.damaged_data(folder, rng, 10 * count),
        "fuzzed-settings": lambda _, folder, rng: damage.fuzzed_settings(folder, rng, 250 * count),
        "fuzzed-data": lambda _, folder, rng: damage.fuzzed_data(folder, rng, 200 * count),
        "fuzzed-caches": lambda _, folder, rng: damage.fuzzed_caches(folder, rng, 100 * count),
        **{f"killed-{kind.lower()}": kills(kind) for kind in processes.KINDS},
        "killed-any": lambda lab, _, rng: processes.killed_actors(
            lab, rng.choices(processes.KINDS, k=count), overrides=processes.WITH_EVALUATIONS
        ),
        "killed-driver": lambda lab, _, __: processes.killed_driver(lab, count),
        "stopped-while-saving": lambda lab, _, __: processes.stopped_while_saving(lab, few),
        "lost-node": lambda lab, _, __: processes.lost_node(lab, few),
        "full-object-store": lambda lab, _, __: processes.full_object_store(lab),
        "full-disk": lambda lab, _, __: processes.full_disk(lab, few),
    }


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.faults") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--count", type=int, default=20, help="kills of each kind of process (default: 20)")
    parser.add_argument("--only", nargs="+", choices=scenarios(1), help="names of scenarios (default: all)")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="transformers", help="rollout engine")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and places of faults")
    args = parser.parse_args(argv)
    out: Path = args.out.absolute()
    outcomes = _earlier_outcomes(out / "summary.json", args.engine, args.seed)
    for name, scenario in scenarios(args.count).items():
        if args.only and name not in args.only:
            continue
        start, rng = time.monotonic(), random.Random(f"{args.seed}/{name}")
        shutil.rmtree(out / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            lab = Lab(out / name, args.engine, rng)
            logger = logging.getLogger("onpolicy_skd")
            level = logger.level
            logger.setLevel(logging.ERROR)  # without the warning for each damaged checkpoint
            tally = processes.result_of(scenario, lab, Path(scratch), rng)
            logger.setLevel(level)
        outcomes[name] = asdict(tally) | {"seconds": round(time.monotonic() - start)}
        outcomes[name]["notes"] = sorted(set(tally.notes))[:10]
        print(f"{name}: " + ", ".join(f"{getattr(tally, key)} {key}" for key in COUNTS), *tally.notes[:3], flush=True)
        totals = {key: sum(outcome[key] for outcome in outcomes.values()) for key in COUNTS}
        summary = {**totals, "engine": args.engine, "seed": args.seed, "versions": versions(), "scenarios": outcomes}
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return int(any(outcome["wrong"] or outcome["lost"] for outcome in outcomes.values()))


def _earlier_outcomes(file: Path, engine: str, seed: int) -> dict[str, dict]:
    """Return the outcomes of an earlier call with this engine and seed, to which a call with ``--only`` adds."""
    summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return summary["scenarios"] if (summary.get("engine"), summary.get("seed")) == (engine, seed) else {}


if __name__ == "__main__":
    sys.exit(main())
