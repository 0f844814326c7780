"""What a comparison found: each run, each row over its seeds, what is more than noise; ``report.md`` of it."""

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
from onpolicy_skd.report import metrics_log as metrics
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
    exact_match: Estimate  # percent, as everything here
    strict: Estimate
    difference: Difference | None  # from the baseline of the same mode; None of the baseline itself
    significant: bool  # after Holm's correction for all rows of the mode
    published: tuple[float, float] | None
    cost: dict[str, float]  # means over seeds: see ``measured_cost``


CAPTIONS = {
    "learning_curves": "Exact match on held-out problems while training, at the end on test problems; mean over seeds.",
    "accuracy_and_cost": "Exact match after training over what it cost; mean over seeds.",
    "entropy_of_positions": "Student entropy on held-out rollouts, at positions to be supervised and at the others.",
    "divergence_of_positions": "Divergence from the teacher on held-out rollouts, at the same two kinds of positions.",
    "response_length": "Length of the trained responses; mean over seeds.",
    "truncation": "Rollouts without an end within the limit; mean over seeds.",
}


@dataclass(frozen=True, slots=True)
class ModeDifference:
    """One row, off-policy minus on-policy, percent points."""

    row: str
    difference: Difference
    significant: bool
    published_off: tuple[float, float] | None
    published_on: tuple[float, float] | None


TRL_NOTE = (
    "TRL's trainer averages a batch over its tokens (here: over its sequences), trains on truncated answers, and is "
    "one process, whose whole memory is counted; of the other rows it is the learner's."
)


def record(comparison: Comparison, rows: Sequence[RowResult], across: Sequence[ModeDifference]) -> str:
    """What results.json holds: each row, and one record per run."""
    found = {
        "format": 1,
        "baseline": comparison.grid.baseline,
        "seeds": comparison.grid.seeds,
        "untrained": untrained(comparison),
        "rows": [asdict(r) for r in rows],
        "off_minus_on": [asdict(m) for m in across],
        "runs": [_run_record(r) for r in comparison.runs],
        "versions": versions(),
    }
    return json.dumps(found, indent=1) + "\n"


def shown(run: PlannedRun) -> str:
    """A finished run in a few words."""
    found = run.summary
    return f"exact match {percent(found['exact_match']['after'], found['exact_match_interval']['after'])}"


def untrained(comparison: Comparison) -> dict[str, float | None]:
    """Exact match of student and teacher before anything is trained, percent."""
    found = comparison.untrained.summary.get("exact_match", {})
    return {who: _in_percent(found.get(when)) for who, when in (("student", "before"), ("teacher", "teacher"))}


Judged = list[tuple[PlannedRun, dict[str, bool]]]


def _judged(comparison: Comparison) -> dict[tuple[str, Mode], Judged]:
    """The finished runs of every row in every mode, with which problems they have right."""
    return {
        (row.name, mode): [(r, answers(r)) for r in comparison.of(row, mode) if r.status == "finished"]
        for row in comparison.grid.rows
        for mode in row.modes
    }


def _compared(pairs: Mapping[str, tuple[Judged, Judged]]) -> dict[str, tuple[Difference, bool]]:
    """Each pair's difference in percent points, and whether it is more than noise among all of ``pairs``."""
    found = {}
    for name, (one, other) in pairs.items():
        both = _together([right for _, right in [*one, *other]])
        found[name] = _percent_points(paired_difference(both[: len(one)], both[len(one) :]))
    alone = {name for name, several in pairs.items() if min(map(len, several)) < 2}  # one seed shows no noise
    notable = significant({name: 1.0 if name in alone else d.p for name, d in found.items()})
    return {name: (d, name in notable) for name, d in found.items()}


def results(comparison: Comparison) -> list[RowResult]:
    """Every row in every mode that has a finished run."""
    judged, baseline, compared = _judged(comparison), comparison.grid.baseline, {}
    for mode in MODES:
        names = [name for (name, of), runs in judged.items() if of == mode and runs and name != baseline]
        if judged.get((baseline, mode)):
            compared[mode] = _compared({name: (judged[name, mode], judged[baseline, mode]) for name in names})
    found = []
    for row in comparison.grid.rows:
        for mode in row.modes:
            runs = judged[row.name, mode]
            if not runs:
                continue
            difference, notable = compared.get(mode, {}).get(row.name, (None, False))
            found.append(
                RowResult(
                    row.name,
                    mode,
                    [r.seed for r, _ in runs],
                    estimate([100 * sum(right.values()) / len(right) for _, right in runs]),
                    estimate([100 * r.summary["strict_match"]["after"] for r, _ in runs]),
                    difference,
                    notable,
                    row.published.get(mode),
                    _mean([measured_cost(r) for r, _ in runs]),
                )
            )
    return found


def between_modes(comparison: Comparison) -> list[ModeDifference]:
    """Off-policy against on-policy, of every row that has finished runs in both."""
    judged = _judged(comparison)
    both = {
        row.name: (judged[row.name, "off_policy"], judged[row.name, "on_policy"])
        for row in comparison.grid.rows
        if judged.get((row.name, "off_policy")) and judged.get((row.name, "on_policy"))
    }
    published = {row.name: row.published for row in comparison.grid.rows}
    return [
        ModeDifference(name, d, notable, published[name].get("off_policy"), published[name].get("on_policy"))
        for name, (d, notable) in _compared(both).items()
    ]


def answers(run: PlannedRun) -> dict[str, bool]:
    """Which of the held-out problems the trained student has right, by their keys."""
    records = [json.loads(line) for line in run.answers_file.read_text(encoding="utf-8").splitlines()]
    return {r["key"]: r["match"] for r in records}


def _together(several: Sequence[dict[str, bool]]) -> np.ndarray:
    """bool ``[runs, problems]``.  Raises ConfigError if the runs have not answered the same problems."""
    keys = sorted(several[0])
    if any(sorted(one) != keys for one in several):
        raise ConfigError("finished runs were evaluated on different problems; remove the folders of the odd ones")
    return np.array([[one[k] for k in keys] for one in several])


def measured_cost(run: PlannedRun) -> dict[str, float]:
    """What a finished run has spent on training."""
    steps = [r for r in metrics.read(run.folder / metrics.FILE) if "loss" in r]
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
    """What a run is going to do, in words; ``prompts``: before a prefilter."""
    own = settings
    kept = num_selected(own.samples.keep, prompts) if own.samples.when == "prefilter" else prompts
    steps = own.run.steps
    if steps is None:
        steps = math.ceil(round(own.run.epochs * kept / own.prompts_per_step, 9))
    share = 1.0 if own.positions.policy in ("full", "weighted") else own.positions.k
    return (
        f"{steps} steps, {steps * own.student_rollouts_per_step} rollouts, "
        f"{steps * own.learner.batch_size} samples to the teacher, "
        f"{100 * share:g} % of their positions supervised"
    )


def seconds_of_runs(comparison: Comparison) -> dict[Any, float]:
    """Mean wall seconds of the finished runs of each (row, mode), and of each mode."""
    found: defaultdict[Any, list[float]] = defaultdict(list)
    for run in comparison.trained:
        if run.status == "finished":
            found[run.row.name, run.mode].append(run.summary["seconds"])
            found[run.mode].append(run.summary["seconds"])
    return {key: sum(several) / len(several) for key, several in found.items()}


# -- the page ------------------------------------------------------------------------------------------------------


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know of how the runs were made."""
    finished = [r for r in comparison.runs if r.status == "finished"]
    missing, found = len(comparison.runs) - len(finished), []
    if missing:
        found.append(f"{missing} of {len(comparison.runs)} runs have not finished; the others follow.")
    sources = {r.summary.get("versions", {}).get("source") for r in finished} - {None}
    if len(sources) > 1:
        found.append(f"Runs were made by {len(sources)} states of the code ({', '.join(sorted(sources))}).")
    found.append(
        "Seconds are of training steps alone, without prefilter and evaluations, while other runs shared the machine: "
        "orders of magnitude."
    )
    if any(row.trainer == "trl" for row in comparison.grid.rows):
        found.append(TRL_NOTE)
    return found


def page(
    comparison: Comparison,
    rows: Sequence[RowResult],
    across: Sequence[ModeDifference],
    figures: Sequence[str] = (),
) -> str:
    """report.md; ``figures``: names of the PNG files beside it."""
    grid, own = comparison.grid, comparison.untrained.settings
    known = untrained(comparison)
    parts = [
        f"# Comparison: {grid.dir.name}\n",
        f"Student `{own.student.model}`, teacher `{own.teacher.model}`, seeds {', '.join(map(str, grid.seeds))}. "
        "Exact match in percent on the same held-out problems: mean ± standard deviation over seeds, 95 % interval of "
        f"the mean (Student's t). Differences from {grid.baseline}: bootstrap over problems and seeds, paired "
        "by problem. **Bold** only where a difference is more than noise after Holm's correction within the mode.\n",
        f"Untrained student {shown_percent(known['student'])}, teacher {shown_percent(known['teacher'])}.\n",
    ]
    parts += [f"{line}\n" for line in notes(comparison)]
    for mode, title in MODES.items():
        found = [r for r in rows if r.mode == mode]
        if found:
            parts += [f"## {title}\n", _table(found, grid.baseline), _list(sentence(r, grid.baseline) for r in found)]
            orderings = [o for r in found if (o := ordering(r, found, grid.baseline))]
            if orderings:
                parts += ["### Published orderings\n", _list(orderings)]
    if across:
        parts += [f"## {ACROSS}\n", _list(map(mode_sentence, across))]
    if figures:
        parts.append("## Figures\n")
    parts += [f"![{CAPTIONS[name]}]({name}.png)\n\n{CAPTIONS[name]}\n" for name in figures]
    return "\n".join(parts)


def _list(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def columns(baseline: str) -> list[str]:
    """Headings of the table, in the published layout."""
    return ["method", "exact match", "95 % interval", f"from {baseline}", "published", "steps", "teacher tokens",
            "positions supervised", "training s", "learner MiB"]  # fmt: skip


DIFFERENCE = 3  # place of the difference among them


def cells(r: RowResult) -> list[str]:
    """A row of the table."""
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
    """Whether a row differs from the baseline by more than noise."""
    if r.difference is None:
        what = "the baseline" if r.row == baseline else f"no run of {baseline} has finished to compare with"
        return f"{r.row}: {what}, {_mean_std(r.exact_match)}."
    amount = f"{r.difference.mean:+.1f} points (95 % {_range(r.difference)})"
    if r.significant:
        return f"{r.row}: {amount}: more than noise."
    if len(r.seeds) < 2:
        return f"{r.row}: {amount} of the problems alone: one seed cannot tell whether it is more than noise."
    inside = r.difference.low <= 0 <= r.difference.high
    return f"{r.row}: {amount}: " + ("within noise." if inside else "not more than noise among so many rows.")


def ordering(r: RowResult, rows: Sequence[RowResult], baseline: str) -> str | None:
    """Whether the published order of a row and the baseline holds; None where nothing was published."""
    theirs = next((b.published for b in rows if b.row == baseline), None)
    if r.difference is None or theirs is None or r.published is None:
        return None
    return _order(r.row, baseline, r.published, theirs, r.difference, r.significant)


def mode_sentence(m: ModeDifference) -> str:
    """How far off-policy is from on-policy, and whether the published order holds."""
    noise = "more than noise" if m.significant else "not more than noise"
    text = f"{m.row}: {m.difference.mean:+.1f} points (95 % {_range(m.difference)}): {noise}."
    if m.published_off is None or m.published_on is None:
        return text
    order = _order("off-policy", "on-policy", m.published_off, m.published_on, m.difference, m.significant)
    return f"{text} Published {order}"


def _order(
    one: str, other: str, ours: tuple[float, float], theirs: tuple[float, float], found: Difference, notable: bool
) -> str:
    """Whether a published order, of (mean, standard deviation) each, holds."""
    gap = ours[0] - theirs[0]
    printed = f"{one} {'above' if gap > 0 else 'below'} {other} ({ours[0]:.1f} v {theirs[0]:.1f}): "
    if abs(gap) <= max(ours[1], theirs[1]):
        return f"{printed}within the published deviations, so no order to compare with ({found.mean:+.1f} here)."
    if not notable:
        return f"{printed}cannot be told here ({found.mean:+.1f}, {_range(found)})."
    return printed + ("holds" if gap * found.mean > 0 else "does not hold") + f" ({found.mean:+.1f})."


def _run_record(run: PlannedRun) -> dict[str, Any]:
    record: dict[str, Any] = {"row": run.row.name, "mode": run.mode, "seed": run.seed, "status": run.status}
    if run.status == "finished":
        found = run.summary
        record |= {
            "exact_match": _in_percent(found["exact_match"]["after"]),
            "exact_match_interval": [100 * x for x in found["exact_match_interval"]["after"]],
            "strict": _in_percent(found["strict_match"]["after"]),
            **measured_cost(run),
        }
    return record


def _percent_points(d: Difference) -> Difference:
    return Difference(100 * d.mean, 100 * d.low, 100 * d.high, d.p)


def _mean(several: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in several) / len(several) for key in several[0]}


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
