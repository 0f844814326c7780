"""A grid of runs that differ only in their method, as ``onpolicy_skd.compare`` reads it from a YAML file.

base: demo.yaml                 settings shared by all runs, relative to the file
dir: runs/compare_demo          where the runs and the report go
seeds: [1340, 1341, 1342]
baseline: Full KD               the row that the others are compared with
settings: {...}                 override the base
modes: {off_policy: {...}, on_policy: {...}}    override these, by mode
rows:
  - name: SE-KD
    modes: [off_policy, on_policy]
    settings: {positions: {policy: top_k, k: 0.2}}
    published: {off_policy: [69.5, 0.12], on_policy: [70.0, 0.15]}
  - {name: TRL, trainer: trl, modes: [on_policy], settings: {positions: {policy: full}}}
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from onpolicy_skd.config import shipped
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, dump, flat, merge, read_yaml, resolve
from onpolicy_skd.config.schema import NonNegative, Section, Settings, rules_of, walk
from onpolicy_skd.config.validation import check_trl
from onpolicy_skd.storage.files import RunPaths

# Settings that may change after a run has finished, because they affect neither training nor evaluation.
HARMLESS = frozenset(key for key, field in walk() if not rules_of(field)["affects_result"])
Mode = Literal["off_policy", "on_policy"]
Trainer = Literal["skd", "trl"]
VERBS: dict[Trainer, str] = {"skd": "train", "trl": "trl"}  # verb of the command skd
METHOD = ("positions", "samples", "classes", "alignment", "cache")  # sections in which rows of one mode may differ
# Rows may also differ in these method settings of other sections, and in eval.teacher, whose default depends on cache
# and teacher.
SINGLE = (
    *("teacher.model", "teacher.prompt", "teacher.max_prompt_tokens", "teacher.ema_decay"),
    *("references.source", "rollout.max_tokens_start", "rollout.max_tokens_steps"),
)
ALSO = ("run.name", "eval.teacher", *SINGLE)
Status = Literal["finished", "failed", "started", "waiting"]


class Row(Section):
    name: str = Field(description="name in the report")
    modes: list[Mode] = Field(default=["off_policy", "on_policy"], description="modes in which it is run")
    trainer: Trainer = Field(default="skd", description="skd, or trl: TRL's DistillationTrainer (eval.trl_baseline)")
    settings: dict[str, Any] = Field(default={}, description="settings of the method")
    published: dict[Mode, tuple[float, float]] = Field(
        default={}, description="exact match and standard deviation in percent, as published"
    )


UNTRAINED = Row(name="Untrained", modes=["on_policy"])


class Grid(Section):
    base: Path = Field(description="settings shared by all runs, relative to the grid's own file")
    dir: Path = Field(description="where the runs and the report go")
    seeds: list[NonNegative] = Field(description="each row is run once per seed")
    baseline: str = Field(description="the row that the others are compared with")
    settings: dict[str, Any] = Field(default={}, description="override the base")
    modes: dict[Mode, dict[str, Any]] = Field(default={}, description="override these, by mode")
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run of a row in a mode, with resolved settings, whether it has started or not."""

    row: Row
    mode: Mode
    settings: Settings

    @property
    def folder(self) -> Path:
        return self.settings.run.folder

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.folder)

    @property
    def seed(self) -> int:
        return self.settings.run.seed

    @property
    def summary(self) -> dict[str, Any]:
        path = self.paths.summary
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def answers_file(self) -> Path:
        """File with every judged answer of the trained student."""
        files = sorted(self.paths.evaluations.glob("after-*.jsonl"))
        return files[-1] if files else self.paths.evaluations / "after.jsonl"

    @property
    def status(self) -> Status:
        """``finished`` runs are kept, ``failed`` ones need --retry, ``started`` ones are resumed."""
        status = self.summary.get("status")
        if status == "failed" or (
            status == "finished" and (self.answers_file.exists() or self.settings.run.steps == 0)
        ):
            return status
        return "started" if self.paths.config.exists() else "waiting"


@dataclass(frozen=True, slots=True)
class Comparison:
    grid: Grid
    untrained: PlannedRun  # makes no step; evaluates student and teacher before training
    trained: list[PlannedRun]  # ordered by seed, so that an interrupted comparison has complete seeds

    @property
    def runs(self) -> list[PlannedRun]:
        return [self.untrained, *self.trained]

    def of(self, row: Row, mode: Mode) -> list[PlannedRun]:
        return [r for r in self.trained if r.row == row and r.mode == mode]


def load(path: Path, overrides: dict[str, Any] | None = None) -> Comparison:
    """Return the runs of the grid in ``path``, with resolved settings.

    Raises ConfigError for a grid that is not valid, for impossible settings, for rows of one mode that differ in more
    than their method, and for runs in the folder that finished with other settings.
    """
    path = shipped.find(path)
    try:
        grid = Grid.model_validate(merge(read_yaml(path), overrides or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    names = [row.name for row in grid.rows]
    twice = {n for n in names if [slug(m) for m in names].count(slug(n)) > 1}
    if twice or not grid.seeds or len(set(grid.seeds)) < len(grid.seeds):
        raise ConfigError(f"{path}: rows and seeds must differ from each other: {sorted(twice) or grid.seeds}")
    for row in grid.rows:
        if len(set(row.modes)) < len(row.modes) or not row.modes or not slug(row.name) or set(row.name) & set("|\n"):
            raise ConfigError(
                f"{path}: row {row.name!r}, modes {row.modes}: a name has letters or digits, no | and no line break, "
                "and each mode stands once"
            )
    if grid.baseline not in names:
        raise ConfigError(f"{path}: baseline: {grid.baseline!r} is no row; accepted: {', '.join(names)}")
    runs = [
        PlannedRun(row, mode, _settings(path, grid, row, mode, seed))
        for seed in grid.seeds
        for row in grid.rows
        for mode in row.modes
    ]
    _check_fair(path, runs)
    comparison = Comparison(grid, PlannedRun(UNTRAINED, "on_policy", _untrained(path, grid)), runs)
    for run in comparison.runs:
        _check_unchanged(run)
    return comparison


def slug(name: str) -> str:
    """Return ``name`` in letters, digits and underscores, for file names."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("*", " star").replace("%", "")).strip("_")


def _settings(path: Path, grid: Grid, row: Row, mode: Mode, seed: int) -> Settings:
    identity = {
        "run": {"name": f"{slug(row.name)}-{mode}-{seed}", "dir": str(grid.dir / "runs"), "seed": seed},
        "mode": mode,
    }
    try:
        settings = build_settings(
            path.parent / grid.base, [grid.settings, grid.modes.get(mode, {}), row.settings, identity]
        )
        if row.trainer == "trl":
            check_trl(settings)
        _check_answers(settings)
        if settings.hub.push:
            raise ConfigError(f"hub.push={settings.hub.push}: all runs would go to one repository; push one by hand")
        return settings
    except ConfigError as error:
        raise ConfigError(f"{path}: row {row.name!r}, {mode}: {error}") from None


def _check_answers(settings: Settings) -> None:
    data = settings.data
    if data.source == "text" or not data.has_eval:
        condition = "" if data.source == "text" else " without data.eval_file"
        raise ConfigError(
            f"data.source={data.source}{condition}: has no problems to answer; a comparison needs exact match"
        )


def _untrained(path: Path, grid: Grid) -> Settings:
    untrained = {
        "run": {"name": "untrained", "dir": str(grid.dir / "runs"), "steps": 0},
        "eval": {"before": True, "teacher": True},
    }
    return build_settings(path.parent / grid.base, [grid.settings, grid.modes.get("on_policy", {}), untrained])


def _check_fair(path: Path, runs: list[PlannedRun]) -> None:
    """Raise ConfigError unless all rows of a mode and seed share student, data, epochs, optimizer and evaluation.

    A method that drops prompts before training counts epochs over the remaining ones, so it has fewer steps.
    """
    first: dict[tuple[Mode, int], PlannedRun] = {}
    for run in runs:
        if not run.settings.eval.after:
            raise ConfigError(f"{path}: eval.after=false: runs are compared by their evaluation after training")
        other = first.setdefault((run.mode, run.seed), run)
        ours, theirs = (_without_method(r.settings) for r in (run, other))
        changed = [k for k in ours if ours[k] != theirs.get(k)]
        if changed:
            raise ConfigError(
                f"{path}: row {run.row.name!r}, {run.mode}: sets {changed[0]} to {ours[changed[0]]!r}, row "
                f"{other.row.name!r} has {theirs.get(changed[0])!r}; rows of one mode may differ in "
                f"{', '.join((*METHOD, *SINGLE))} only"
            )


def _without_method(settings: Settings) -> dict[str, Any]:
    leaves = flat(settings.model_dump(mode="json"))
    return {k: v for k, v in leaves.items() if k.split(".")[0] not in METHOD and k not in ALSO}


def _check_unchanged(run: PlannedRun) -> None:
    saved = run.paths.config
    if run.status != "finished":
        return
    before = flat(resolve(yaml.safe_load(saved.read_text(encoding="utf-8"))).model_dump(mode="json"))
    now = flat(yaml.safe_load(dump(run.settings)))
    trainer = run.summary.get("trainer", "skd")
    if trainer != run.row.trainer:
        raise ConfigError(
            f"{run.folder}: finished by trainer {trainer}, the row now says {run.row.trainer}; remove the folder"
        )
    changed = [k for k in now if before.get(k) != now[k] and k not in HARMLESS]
    if changed:
        raise ConfigError(
            f"{run.folder}: finished with {changed[0]}={before.get(changed[0])!r}, the comparison now asks for "
            f"{now[changed[0]]!r}; remove the folder to run it again, or give the comparison another dir"
        )
