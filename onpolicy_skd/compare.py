"""Run a grid of methods, modes and seeds, and report it.

Runs each row, mode and seed of a grid (``comparison/grid.py``), as many at a time as the cluster has room for, and
writes ``results.json``, ``report.md`` and ``report.html``.  After a kill, the same command continues: finished runs are
kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from ray.exceptions import RayError

from actors.cluster import connect
from actors.run_tasks import Command, parallel_runs, run_all
from onpolicy_skd.comparison import figures, grid, page, results
from onpolicy_skd.comparison.grid import VERBS, Comparison, PlannedRun
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import dump, merge, parse_override
from onpolicy_skd.run.exits import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, run_cli
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.run.stop import Stopped, StopSignal
from onpolicy_skd.storage.files import lock, write_text


def compare(
    comparison: Comparison, retry: bool = False, parallel: int | None = None, report_to: Path | None = None
) -> int:
    """Run what is missing and write the report; return the number of unfinished runs.  Raises ConfigError."""
    folder = comparison.grid.dir
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"dir={folder}"):
        _run_missing(comparison, retry, parallel)
    failed = [r for r in comparison.runs if r.status != "finished"]
    for run in failed:
        print(f"{run.settings.run.name}: {run.summary.get('reason') or run.status}; its output: {_log(run, folder)}")
    print(f"report: {write_report(comparison, report_to or folder)}")
    if failed:
        print(f"{len(failed)} runs have not finished; --retry tries those that failed again")
    return len(failed)


def _run_missing(comparison: Comparison, retry: bool, parallel: int | None) -> None:
    """Run what is missing, in parallel.  On a signal, each run stops with a checkpoint and Stopped is raised."""
    folder = comparison.grid.dir
    statuses = ("waiting", "started", "failed") if retry else ("waiting", "started")
    missing = [r for r in comparison.runs if r.status in statuses]
    if not missing:
        return
    (folder / "configs").mkdir(exist_ok=True)
    with connect(missing[0].settings), StopSignal():  # in this order, because Ray sets signal handlers too
        count = min(parallel_runs(run.settings, parallel) for run in missing)
        print(f"{len(missing)} of {len(comparison.runs)} runs to do, {count} at a time", flush=True)
        with closing(run_all(_commands(missing, folder), count)) as outcomes:
            for done, (run, code) in enumerate(outcomes, 1):
                _note_failure(run, code)
                outcome = results.shown(run) if run.status == "finished" else f"{run.status}, exit code {code}"
                print(f"{done}/{len(missing)} {run.settings.run.name}: {outcome}", flush=True)


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write results.json, report.md, report.html and the figures as PNG to ``folder``; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, across = results.results(comparison), results.between_modes(comparison)
    plots = figures.figures(comparison, rows)
    for name, figure in plots.items():
        figures.png(figure, folder / f"{name}.png")
    write_text(folder / "results.json", results.record(comparison, rows, across))
    write_text(folder / "report.md", results.page(comparison, rows, across, list(plots)))
    write_text(folder / "report.html", page.page(comparison, rows, across, plots))
    return folder / "report.html"


def _note_failure(run: PlannedRun, code: int) -> None:
    """Mark a run that ended without a summary as failed, so that only --retry runs it again."""
    if code not in (EXIT_OK, EXIT_STOPPED) and run.status in ("waiting", "started"):
        reason = f"ended with exit code {code}; its output says why"
        write_text(run.paths.summary, json.dumps({"status": "failed", "reason": reason}) + "\n")


def _commands(runs: Sequence[PlannedRun], folder: Path) -> Iterator[Command[PlannedRun]]:
    for run in runs:
        if run.status == "failed":  # it counts as started until its next summary
            run.paths.summary.unlink()
        config = folder / "configs" / f"{run.settings.run.name}.yaml"
        write_text(config, dump(run.settings))
        arguments = [VERBS[run.row.trainer], "--config", str(config.absolute()), "resume=auto"]
        owns_device = (
            run.row.trainer == "trl" and run.settings.run.device != "cpu"
        )  # the actors of the other runs reserve their devices
        yield Command(run, arguments, _log(run, folder), owns_device)


def _log(run: PlannedRun, folder: Path) -> Path:
    return folder / "logs" / f"{run.settings.run.name}.log"


def dry_run(comparison: Comparison) -> None:
    """List the runs with their cost, and with an estimate of their time once similar ones have finished."""
    seconds = results.seconds_of_runs(comparison)
    prompts = {mode: len(prepare(run.settings).train) for mode, run in {r.mode: r for r in comparison.runs}.items()}
    total = 0.0
    for run in comparison.runs:
        cost = results.planned_cost(run.settings, prompts[run.mode])
        about = seconds.get((run.row.name, run.mode)) or seconds.get(run.mode)
        if run.status != "finished" and about:
            total += about
        print(f"{run.status:>8}  {run.settings.run.name}: {cost}" + (f", about {about:.0f} s" if about else ""))
    print(f"{len(comparison.runs)} runs" + (f", about {total:.0f} s left, one after another" if total else ""))


def main(argv: Sequence[str] | None = None, prog: str = "python -m onpolicy_skd.compare") -> int:
    """Run the command line; return the exit code: 0 all finished, 1 some failed, 2 bad input, 3 stopped."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file with the grid, or the name of a shipped one"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs with their cost and run nothing")
    parser.add_argument("--retry", action="store_true", help="also run those that have failed")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="folder of the report (default: dir of the grid)")
    parser.add_argument("--parallel", type=int, help="most runs at a time (default: as many as fit)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="override the grid: settings.run.steps=5")
    try:
        return run_cli(lambda: _run(parser.parse_args(argv)), RayError)
    except Stopped as stopped:
        print(f"{stopped}: stopped; the same command continues", file=sys.stderr)
        return EXIT_STOPPED


def _run(args: argparse.Namespace) -> int:
    if args.parallel is not None and args.parallel < 1:
        raise ConfigError(f"--parallel {args.parallel}: accepted: at least 1")
    comparison = grid.load(args.config, functools.reduce(merge, map(parse_override, args.overrides), {}))
    if args.dry_run:
        dry_run(comparison)
        return EXIT_OK
    return EXIT_FAILED if compare(comparison, args.retry, args.parallel, args.report) else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
