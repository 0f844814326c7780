"""Comparison runs: ``python -m onpolicy_skd.compare --config configs/compare_demo.yaml [--dry-run] [--retry]``.

Runs every row, mode and seed of a grid (``comparison.py``), as many at once as the cluster has room for, and writes
``results.json`` and ``report.md``.  Finished runs are kept; killing and starting it again goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray.exceptions import RayError

from actors.cluster import connect
from actors.run_tasks import Command, at_once, run_all
from onpolicy_skd.comparison import figures
from onpolicy_skd.comparison import grid as grids
from onpolicy_skd.comparison import page as html
from onpolicy_skd.comparison import results as report
from onpolicy_skd.comparison.grid import MODULES, Comparison, PlannedRun
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import dump, merge, parse_override
from onpolicy_skd.run.exits import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, run_cli
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.storage.files import write_text


def compare(
    comparison: Comparison, retry: bool = False, parallel: int | None = None, report_to: Path | None = None
) -> int:
    """Runs what is missing, then reports; returns how many runs have failed.  Raises ConfigError."""
    folder = comparison.grid.dir
    wanted = ("waiting", "started", "failed") if retry else ("waiting", "started")
    missing = [r for r in comparison.runs if r.status in wanted]
    if missing:
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        with connect(missing[0].settings):
            count = min(at_once(run.settings, parallel) for run in missing)
            print(f"{len(missing)} of {len(comparison.runs)} runs to do, {count} at a time", flush=True)
            for done, (run, code) in enumerate(run_all(_commands(missing, folder), count), 1):
                _note_failure(run, code)
                result = report.shown(run) if run.status == "finished" else f"{run.status}, exit code {code}"
                print(f"{done}/{len(missing)} {run.settings.run.name}: {result}", flush=True)
    failed = [r for r in comparison.runs if r.status != "finished"]
    for run in failed:
        print(f"{run.settings.run.name}: {run.summary.get('reason') or run.status}; its output: {_log(run, folder)}")
    print(f"report: {write_report(comparison, report_to or folder)}")
    if failed:
        print(f"{len(failed)} runs have not finished; --retry tries those that failed again")
    return len(failed)


def write_report(comparison: Comparison, folder: Path) -> Path:
    """results.json, report.md, report.html and the figures as PNG, in ``folder``; returns the HTML page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, across = report.results(comparison), report.between_modes(comparison)
    made = figures.figures(comparison, rows)
    for name, figure in made.items():
        figures.png(figure, folder / f"{name}.png")
    write_text(folder / "results.json", report.record(comparison, rows, across))
    write_text(folder / "report.md", report.page(comparison, rows, across, list(made)))
    write_text(folder / "report.html", html.page(comparison, rows, across, made))
    return folder / "report.html"


def _note_failure(run: PlannedRun, code: int) -> None:
    """A run that ended without a word is marked as failed, so that it waits to be asked for."""
    if code not in (EXIT_OK, EXIT_STOPPED) and run.status in ("waiting", "started"):
        reason = f"ended with exit code {code}; its output says why"
        write_text(run.folder / "summary.json", json.dumps({"status": "failed", "reason": reason}) + "\n")


def _commands(runs: Sequence[PlannedRun], folder: Path) -> Iterator[Command[PlannedRun]]:
    for run in runs:
        if run.status == "failed":  # it is no longer, until it says so again
            (run.folder / "summary.json").unlink()
        config = folder / "configs" / f"{run.settings.run.name}.yaml"
        write_text(config, dump(run.settings))
        arguments = [MODULES[run.row.trainer], "--config", str(config.absolute()), "resume=auto"]
        owns_device = run.row.trainer == "trl" and run.settings.run.device != "cpu"  # others get theirs by role
        yield Command(run, arguments, _log(run, folder), owns_device)


def _log(run: PlannedRun, folder: Path) -> Path:
    return folder / "logs" / f"{run.settings.run.name}.log"


def dry_run(comparison: Comparison) -> None:
    """Lists the runs with what each will cost, and about how long they will take if some like them have finished."""
    seconds = report.seconds_of_runs(comparison)
    prompts = {mode: len(prepare(run.settings).train) for mode, run in {r.mode: r for r in comparison.runs}.items()}
    total = 0.0
    for run in comparison.runs:
        cost = report.planned_cost(run.settings, prompts[run.mode])
        about = seconds.get((run.row.name, run.mode)) or seconds.get(run.mode)
        if run.status != "finished" and about:
            total += about
        print(f"{run.status:>8}  {run.settings.run.name}: {cost}" + (f", about {about:.0f} s" if about else ""))
    print(f"{len(comparison.runs)} runs" + (f", about {total:.0f} s left, one after another" if total else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 all finished, 1 some failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m onpolicy_skd.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="a YAML file with the grid: see comparison.py")
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their cost, and run nothing")
    parser.add_argument("--retry", action="store_true", help="run those again that have failed")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="where the report goes (default: the grid's dir)")
    parser.add_argument("--parallel", type=int, help="most runs at the same time (default: all there is room for)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="laid over the grid: settings.run.steps=5")
    return run_cli(lambda: _run(parser.parse_args(argv)), RayError)


def _run(args: argparse.Namespace) -> int:
    if args.parallel is not None and args.parallel < 1:
        raise ConfigError(f"--parallel {args.parallel}: accepted: at least 1")
    comparison = grids.load(args.config, functools.reduce(merge, map(parse_override, args.overrides), {}))
    if args.dry_run:
        dry_run(comparison)
        return EXIT_OK
    return EXIT_FAILED if compare(comparison, args.retry, args.parallel, args.report) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
