"""Results of a comparison: runs, rows over their seeds, differences and their noise; and ``report.md``."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onpolicy_skd.comparison.grid import Comparison, Mode, PlannedRun
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.evaluation.statistics import Difference, Estimate, estimate, paired_difference, significant
from onpolicy_skd.report import metrics_log
from onpolicy_skd.report.summary import percent, versions
from onpolicy_skd.selection.positions import num_selected

ACROSS = "Off-policy minus on-policy"
MODES: dict[Mode, str] = {"off_policy": "Off-policy", "on_policy": "On-policy"}


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row in one mode, over the seeds that have finished."""

    row: str
    mode: Mode
    seeds: list[int]
    exact_match: Estimate  # percent
    strict: Estimate  # percent
    difference: Difference | None  # from the baseline in the same mode, percentage points; None for the baseline
    significant: bool  # after Holm's correction over the rows of the mode
    published: tuple[float, float] | None  # exact match and its standard deviation, percent
    cost: dict[str, float]  # means over seeds: see ``measured_cost``


CAPTIONS = {
    "learning_curves": "Exact match on held-out problems in training, on test problems at the end; mean over seeds.",
    "accuracy_and_cost": "Exact match after training over its cost; mean over seeds.",
    "entropy_of_positions": "Student entropy on held-out rollouts, at selected and other positions.",
    "divergence_of_positions": "Divergence from the teacher on held-out rollouts, at selected and other positions.",
    "response_length": "Length of the responses in training; mean over seeds.",
    "truncation": "Rollouts that reach the token limit; mean over seeds.",
}


@dataclass(frozen=True, slots=True)
class ModeDifference:
    """Off-policy minus on-policy exact match of a row, in percentage points."""

    row: str
    difference: Difference
    significant: bool
    published_off: tuple[float, float] | None
    published_on: tuple[float, float] | None


TRL_NOTE = (
    "TRL's trainer averages a batch over its tokens (here over its sequences), trains on truncated answers, and runs "
    "in one process, whose total memory is given; the other rows give the memory of the learner."
)


def record(comparison: Comparison, rows: Sequence[RowResult], across: Sequence[ModeDifference]) -> str:
    """Return the text of results.json: each row, and a record per run."""
    record = {
        "format": 1,
        "baseline": comparison.grid.baseline,
        "seeds": comparison.grid.seeds,
        "untrained": untrained(comparison),
        "rows": [asdict(r) for r in rows],
        "off_minus_on": [asdict(m) for m in across],
        "runs": [_run_record(r) for r in comparison.runs],
        "versions": versions(),
    }
    return json.dumps(record, indent=1) + "\n"


def shown(run: PlannedRun) -> str:
    """Return the exact match of a finished run, for a progress line."""
    summary = run.summary
    return f"exact match {percent(summary['exact_match']['after'], summary['exact_match_interval']['after'])}"


def untrained(comparison: Comparison) -> dict[str, float | None]:
    """Return exact match of student and teacher before training, percent."""
    exact_match = comparison.untrained.summary.get("exact_match", {})
    return {who: _in_percent(exact_match.get(when)) for who, when in (("student", "before"), ("teacher", "teacher"))}


ScoredRuns = list[tuple[PlannedRun, dict[str, bool]]]  # with the correctness of each answer, by key


def _scored_runs(comparison: Comparison) -> dict[tuple[str, Mode], ScoredRuns]:
    """Return the finished runs of each row and mode, with the correctness of their answers."""
    return {
        (row.name, mode): [(r, answers(r)) for r in comparison.of(row, mode) if r.status == "finished"]
        for row in comparison.grid.rows
        for mode in row.modes
    }


def _compare(pairs: Mapping[str, tuple[ScoredRuns, ScoredRuns]]) -> dict[str, tuple[Difference, bool]]:
    """Return each pair's difference in percentage points, and whether it is significant among all ``pairs``."""
    differences = {}
    for name, (runs, others) in pairs.items():
        correct = _correctness([answers for _, answers in [*runs, *others]])
        differences[name] = _percent_points(paired_difference(correct[: len(runs)], correct[len(runs) :]))
    single_seed = {name for name, pair in pairs.items() if min(map(len, pair)) < 2}  # one seed does not show its noise
    notable = significant({name: 1.0 if name in single_seed else d.p for name, d in differences.items()})
    return {name: (d, name in notable) for name, d in differences.items()}


def results(comparison: Comparison) -> list[RowResult]:
    """Return each row in each mode that has a finished run."""
    scored, baseline, compared = _scored_runs(comparison), comparison.grid.baseline, {}
    for mode in MODES:
        names = [name for (name, of), runs in scored.items() if of == mode and runs and name != baseline]
        if scored.get((baseline, mode)):
            compared[mode] = _compare({name: (scored[name, mode], scored[baseline, mode]) for name in names})
    rows = []
    for row in comparison.grid.rows:
        for mode in row.modes:
            runs = scored[row.name, mode]
            if not runs:
                continue
            difference, notable = compared.get(mode, {}).get(row.name, (None, False))
            rows.append(
                RowResult(
                    row.name,
                    mode,
                    [r.seed for r, _ in runs],
                    estimate([100 * sum(correct.values()) / len(correct) for _, correct in runs]),
                    estimate([100 * r.summary["strict_match"]["after"] for r, _ in runs]),
                    difference,
                    notable,
                    row.published.get(mode),
                    _mean([measured_cost(r) for r, _ in runs]),
                )
            )
    return rows


def between_modes(comparison: Comparison) -> list[ModeDifference]:
    """Compare off-policy with on-policy for each row that has finished runs in both."""
    scored = _scored_runs(comparison)
    both = {
        row.name: (scored[row.name, "off_policy"], scored[row.name, "on_policy"])
        for row in comparison.grid.rows
        if scored.get((row.name, "off_policy")) and scored.get((row.name, "on_policy"))
    }
    published = {row.name: row.published for row in comparison.grid.rows}
    return [
        ModeDifference(name, d, notable, published[name].get("off_policy"), published[name].get("on_policy"))
        for name, (d, notable) in _compare(both).items()
    ]


def answers(run: PlannedRun) -> dict[str, bool]:
    """Return the correctness of the trained student's answer to each held-out problem, by key."""
    records = [json.loads(line) for line in run.answers_file.read_text(encoding="utf-8").splitlines()]
    return {r["key"]: r["match"] for r in records}


def _correctness(runs: Sequence[dict[str, bool]]) -> np.ndarray:
    """Return the correctness, bool ``[runs, problems]``.  Raises ConfigError if runs answered different problems."""
    keys = sorted(runs[0])
    if any(sorted(run) != keys for run in runs):
        raise ConfigError("finished runs were evaluated on different problems; remove the folders of the odd ones")
    return np.array([[run[k] for k in keys] for run in runs])


def measured_cost(run: PlannedRun) -> dict[str, float]:
    """Return the training cost of a finished run."""
    steps = [r for r in metrics_log.read(run.paths.metrics) if "loss" in r]
    teacher = 0 if run.settings.cache.path else sum(r["train_tokens"] for r in steps)
    return {
        "steps": len(steps),
        "teacher_tokens": teacher,
        "positions": sum(r["positions"] for r in steps),
        "positions_supervised": sum(r["positions_selected"] for r in steps),
        "train_seconds": sum(r["seconds"]["step"] for r in steps),
        "seconds": run.summary["seconds"],
        "learner_memory_mib": max((r["learner_memory_mib"] for r in steps), default=0.0),
    }


def planned_cost(settings: Settings, prompts: int) -> str:
    """Describe what a run will do; ``prompts`` counts the prompts before a prefilter."""
    kept = num_selected(settings.samples.keep, prompts) if settings.samples.when == "prefilter" else prompts
    steps = settings.run.steps
    if steps is None:
        steps = math.ceil(round(settings.run.epochs * kept / settings.prompts_per_step, 9))
    share = 1.0 if settings.positions.policy in ("full", "weighted") else settings.positions.k
    return (
        f"{steps} steps, {steps * settings.student_rollouts_per_step} rollouts, "
        f"{steps * settings.learner.batch_size} samples to the teacher, "
        f"{100 * share:g} % of their positions supervised"
    )


def seconds_of_runs(comparison: Comparison) -> dict[Any, float]:
    """Return the mean wall seconds of the finished runs of each (row, mode), and of each mode."""
    seconds: defaultdict[Any, list[float]] = defaultdict(list)
    for run in comparison.trained:
        if run.status == "finished":
            seconds[run.row.name, run.mode].append(run.summary["seconds"])
            seconds[run.mode].append(run.summary["seconds"])
    return {key: sum(of_runs) / len(of_runs) for key, of_runs in seconds.items()}


# -- the page ------------------------------------------------------------------------------------------------------


def notes(comparison: Comparison) -> list[str]:
    """Return notes on the runs: unfinished ones, versions of the code, how costs were measured."""
    finished = [r for r in comparison.runs if r.status == "finished"]
    missing, lines = len(comparison.runs) - len(finished), []
    if missing:
        lines.append(f"{missing} of {len(comparison.runs)} runs have not finished; the others follow.")
    sources = {r.summary.get("versions", {}).get("source") for r in finished} - {None}
    if len(sources) > 1:
        lines.append(f"Runs were made by {len(sources)} versions of the code ({', '.join(sorted(sources))}).")
    lines.append(
        "Seconds are those of training steps, without prefilter and evaluations, while other runs shared the machine: "
        "orders of magnitude."
    )
    if any(row.trainer == "trl" for row in comparison.grid.rows):
        lines.append(TRL_NOTE)
    return lines


def page(
    comparison: Comparison,
    rows: Sequence[RowResult],
    across: Sequence[ModeDifference],
    figures: Sequence[str] = (),
) -> str:
    """Return the text of report.md; ``figures`` names the PNG files next to it."""
    grid, settings = comparison.grid, comparison.untrained.settings
    known = untrained(comparison)
    sections = [
        f"# Comparison: {grid.dir.name}\n",
        f"Student `{settings.student.model}`, teacher `{settings.teacher_models}`, "
        f"seeds {', '.join(map(str, grid.seeds))}. Exact match in percent on the same held-out problems: "
        "mean ± standard deviation over seeds, 95 % interval of "
        f"the mean (Student's t). Differences from {grid.baseline}: bootstrap over problems and seeds, paired "
        "by problem. **Bold** only where a difference is more than noise after Holm's correction within the mode.\n",
        f"Untrained student {shown_percent(known['student'])}, teacher {shown_percent(known['teacher'])}.\n",
    ]
    sections += [f"{line}\n" for line in notes(comparison)]
    for mode, title in MODES.items():
        of_mode = [r for r in rows if r.mode == mode]
        if of_mode:
            sentences = _list(sentence(r, grid.baseline) for r in of_mode)
            sections += [f"## {title}\n", _table(of_mode, grid.baseline), sentences]
            orderings = [o for r in of_mode if (o := ordering(r, of_mode, grid.baseline))]
            if orderings:
                sections += ["### Published orderings\n", _list(orderings)]
    if across:
        sections += [f"## {ACROSS}\n", _list(map(mode_sentence, across))]
    if figures:
        sections.append("## Figures\n")
    sections += [f"![{CAPTIONS[name]}]({name}.png)\n\n{CAPTIONS[name]}\n" for name in figures]
    return "\n".join(sections)


def _list(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def columns(baseline: str) -> list[str]:
    """Return the headings of the table, in the published layout."""
    return ["method", "exact match", "95 % interval", f"from {baseline}", "published", "steps", "teacher tokens",
            "positions supervised", "training s", "learner MiB"]  # fmt: skip


DIFFERENCE = 3  # index of the difference among the columns


def cells(r: RowResult) -> list[str]:
    """Return the cells of a table row."""
    share = r.cost["positions_supervised"] / max(1.0, r.cost["positions"])
    return [
        r.row, _mean_std(r.exact_match), _interval(r.exact_match),
        "" if r.difference is None else f"{r.difference.mean:+.1f} ({_range(r.difference)})",
        "" if r.published is None else f"{r.published[0]:.1f} ± {r.published[1]:.2f}", f"{r.cost['steps']:.0f}",
        _thousands(r.cost["teacher_tokens"]), f"{_thousands(r.cost['positions_supervised'])} ({100 * share:.0f} %)",
        f"{r.cost['train_seconds']:.0f}", f"{r.cost['learner_memory_mib']:.0f}",
    ]  # fmt: skip


def _table(rows: Sequence[RowResult], baseline: str) -> str:
    lines = ["| " + " | ".join(columns(baseline)) + " |", "|---" * len(columns(baseline)) + "|"]
    for r in rows:
        shown = [f"**{c}**" if r.significant and place == DIFFERENCE else c for place, c in enumerate(cells(r))]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def sentence(r: RowResult, baseline: str) -> str:
    """Return a sentence on whether a row differs from the baseline by more than noise."""
    if r.difference is None:
        reason = "the baseline" if r.row == baseline else f"no run of {baseline} has finished to compare with"
        return f"{r.row}: {reason}, {_mean_std(r.exact_match)}."
    amount = f"{r.difference.mean:+.1f} points (95 % {_range(r.difference)})"
    if r.significant:
        return f"{r.row}: {amount}: more than noise."
    if len(r.seeds) < 2:
        return f"{r.row}: {amount} over the problems alone: one seed cannot show whether it is more than noise."
    inside = r.difference.low <= 0 <= r.difference.high
    return f"{r.row}: {amount}: " + ("within noise." if inside else "not more than noise among so many rows.")


def ordering(r: RowResult, rows: Sequence[RowResult], baseline: str) -> str | None:
    """Return a sentence on whether the published order of a row and the baseline holds; None if none was published."""
    published = next((b.published for b in rows if b.row == baseline), None)
    if r.difference is None or published is None or r.published is None:
        return None
    return _order((r.row, baseline), (r.published, published), r.difference, r.significant)


def mode_sentence(m: ModeDifference) -> str:
    """Return a sentence on off-policy minus on-policy, and on whether the published order holds."""
    noise = "more than noise" if m.significant else "not more than noise"
    text = f"{m.row}: {m.difference.mean:+.1f} points (95 % {_range(m.difference)}): {noise}."
    if m.published_off is None or m.published_on is None:
        return text
    published = (m.published_off, m.published_on)
    order = _order(("off-policy", "on-policy"), published, m.difference, m.significant)
    return f"{text} Published {order}"


def _order(
    names: tuple[str, str],
    published: tuple[tuple[float, float], tuple[float, float]],
    difference: Difference,
    notable: bool,
) -> str:
    """Return a sentence on whether the order of ``published`` (mean, standard deviation) holds for ``difference``."""
    (mean, std), (other_mean, other_std) = published
    gap = mean - other_mean
    order = f"{names[0]} {'above' if gap > 0 else 'below'} {names[1]} ({mean:.1f} v {other_mean:.1f}): "
    if abs(gap) <= max(std, other_std):
        return f"{order}within the published deviations, so no order to compare with ({difference.mean:+.1f} here)."
    if not notable:
        return f"{order}cannot be told here ({difference.mean:+.1f}, {_range(difference)})."
    return order + ("holds" if gap * difference.mean > 0 else "does not hold") + f" ({difference.mean:+.1f})."


def _run_record(run: PlannedRun) -> dict[str, Any]:
    record: dict[str, Any] = {"row": run.row.name, "mode": run.mode, "seed": run.seed, "status": run.status}
    if run.status == "finished":
        summary = run.summary
        record |= {
            "exact_match": _in_percent(summary["exact_match"]["after"]),
            "exact_match_interval": [100 * x for x in summary["exact_match_interval"]["after"]],
            "strict": _in_percent(summary["strict_match"]["after"]),
            **measured_cost(run),
        }
    return record


def _percent_points(d: Difference) -> Difference:
    return Difference(100 * d.mean, 100 * d.low, 100 * d.high, d.p)


def _mean(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(cost[key] for cost in costs) / len(costs) for key in costs[0]}


def _in_percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def shown_percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _mean_std(e: Estimate) -> str:
    return f"{e.mean:.1f}" + ("" if e.std is None else f" ± {e.std:.1f}")


def _interval(e: Estimate) -> str:
    return "" if e.low is None or e.high is None else f"{max(0.0, e.low):.1f} to {min(100.0, e.high):.1f}"


def _range(d: Difference) -> str:
    return f"{d.low:+.1f} to {d.high:+.1f}"


def _thousands(count: float) -> str:
    if count < 1e3:
        return f"{count:.0f}"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
