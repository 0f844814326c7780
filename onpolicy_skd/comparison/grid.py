"""A grid of runs that differ in their method alone: ``onpolicy_skd.compare`` reads it from a YAML file.

base: demo.yaml                 settings shared by all runs, relative to the file
dir: runs/compare_demo          where the runs and the report go
seeds: [1340, 1341, 1342]
baseline: Full KD               the row that the others are compared with
settings: {...}                 laid over the base
modes: {off_policy: {...}, on_policy: {...}}    laid over that, by mode
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

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, dump, flat, merge, read_yaml, resolve
from onpolicy_skd.config.schema import NonNegative, Section, Settings
from onpolicy_skd.config.validation import check_trl
from onpolicy_skd.run.prepare import RESUMABLE

# Settings of a finished run that may since have changed: they touch neither what was trained nor how it was evaluated.
HARMLESS = tuple(k for k in RESUMABLE if not k.startswith("eval") and k != "run.evaluate_every")
Mode = Literal["off_policy", "on_policy"]
Trainer = Literal["own", "trl"]
MODULES: dict[Trainer, str] = {"own": "onpolicy_skd.train", "trl": "eval.trl_baseline"}  # the command of a run
METHOD = ("positions", "samples", "classes", "alignment", "cache")  # sections in which rows of one mode may differ
OWN = ("run.name", "eval.teacher")  # what else may differ: the second one's default depends on a cache
Status = Literal["finished", "failed", "started", "waiting"]


class Row(Section):
    name: str = Field(description="as it stands in the report")
    modes: list[Mode] = Field(default=["off_policy", "on_policy"], description="modes it is run in")
    trainer: Trainer = Field(default="own", description="own, or trl: TRL's DistillationTrainer (eval.trl_baseline)")
    settings: dict[str, Any] = Field(default={}, description="what makes the method")
    published: dict[Mode, tuple[float, float]] = Field(
        default={}, description="exact match and standard deviation in percent, as printed elsewhere"
    )


UNTRAINED = Row(name="Untrained", modes=["on_policy"])


class Grid(Section):
    base: Path = Field(description="settings shared by all runs, relative to the grid's own file")
    dir: Path = Field(description="where the runs and the report go")
    seeds: list[NonNegative] = Field(description="every row is run once with each")
    baseline: str = Field(description="the row that the others are compared with")
    settings: dict[str, Any] = Field(default={}, description="laid over the base")
    modes: dict[Mode, dict[str, Any]] = Field(default={}, description="laid over that, by mode")
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class PlannedRun:
    row: Row
    mode: Mode
    settings: Settings

    @property
    def folder(self) -> Path:
        return self.settings.run.folder

    @property
    def seed(self) -> int:
        return self.settings.run.seed

    @property
    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def answers_file(self) -> Path:
        """Every judged answer of the trained student."""
        found = sorted((self.folder / "evaluations").glob("after-*.jsonl"))
        return found[-1] if found else self.folder / "evaluations" / "after.jsonl"

    @property
    def status(self) -> Status:
        """``finished`` runs are kept; ``failed`` ones wait to be asked for; ``started`` ones go on where they were."""
        said = self.summary.get("status")
        if said == "failed" or (said == "finished" and (self.answers_file.exists() or self.settings.run.steps == 0)):
            return said
        return "started" if (self.folder / "config.yaml").exists() else "waiting"


@dataclass(frozen=True, slots=True)
class Comparison:
    grid: Grid
    untrained: PlannedRun  # no step: student and teacher are evaluated as they come
    trained: list[PlannedRun]  # seed by seed, so that a comparison cut short has whole rounds

    @property
    def runs(self) -> list[PlannedRun]:
        return [self.untrained, *self.trained]

    def of(self, row: Row, mode: Mode) -> list[PlannedRun]:
        return [r for r in self.trained if r.row == row and r.mode == mode]


def load(path: Path, overrides: dict[str, Any] | None = None) -> Comparison:
    """Every run of the grid in ``path``, its settings resolved.

    Raises ConfigError naming the row for impossible settings, for rows of one mode that differ in more than their
    method, and for finished runs in the folder that were made with other settings.
    """
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
    found = Comparison(grid, PlannedRun(UNTRAINED, "on_policy", _untrained(path, grid)), runs)
    for run in found.runs:
        _check_unchanged(run)
    return found


def slug(name: str) -> str:
    """``name`` as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("*", " star").replace("%", "")).strip("_")


def _settings(path: Path, grid: Grid, row: Row, mode: Mode, seed: int) -> Settings:
    own = {
        "run": {"name": f"{slug(row.name)}-{mode}-{seed}", "dir": str(grid.dir / "runs"), "seed": seed},
        "mode": mode,
    }
    try:
        settings = build_settings(path.parent / grid.base, [grid.settings, grid.modes.get(mode, {}), row.settings, own])
        if row.trainer == "trl":
            check_trl(settings)
        _check_answers(settings)
        return settings
    except ConfigError as error:
        raise ConfigError(f"{path}: row {row.name!r}, {mode}: {error}") from None


def _check_answers(settings: Settings) -> None:
    own = settings.data
    if own.source == "text" or (own.source == "jsonl" and not (own.eval_file or own.path)):
        more = "" if own.source == "text" else " without data.eval_file"
        raise ConfigError(
            f"data.source={own.source}{more}: has no problems to answer, and a comparison is of exact match"
        )


def _untrained(path: Path, grid: Grid) -> Settings:
    own = {
        "run": {"name": "untrained", "dir": str(grid.dir / "runs"), "steps": 0},
        "eval": {"before": True, "teacher": True},
    }
    return build_settings(path.parent / grid.base, [grid.settings, grid.modes.get("on_policy", {}), own])


def _check_fair(path: Path, runs: list[PlannedRun]) -> None:
    """Same student, data, passes over the prompts, optimizer and evaluation for all rows of one mode and seed.

    A method that drops prompts beforehand takes its passes over what it keeps, so fewer steps.
    """
    first: dict[tuple[Mode, int], PlannedRun] = {}
    for run in runs:
        other = first.setdefault((run.mode, run.seed), run)
        ours, theirs = (_but_method(r.settings) for r in (run, other))
        changed = [k for k in ours if ours[k] != theirs.get(k)]
        if changed:
            raise ConfigError(
                f"{path}: row {run.row.name!r}, {run.mode}: sets {changed[0]} to {ours[changed[0]]!r}, row "
                f"{other.row.name!r} has {theirs.get(changed[0])!r}; rows of one mode may differ in "
                f"{', '.join(METHOD)} only"
            )


def _but_method(settings: Settings) -> dict[str, Any]:
    leaves = flat(settings.model_dump(mode="json"))
    return {k: v for k, v in leaves.items() if k.split(".")[0] not in METHOD and k not in OWN}


def _check_unchanged(run: PlannedRun) -> None:
    saved = run.folder / "config.yaml"
    if run.status != "finished":
        return
    before = flat(resolve(yaml.safe_load(saved.read_text(encoding="utf-8"))).model_dump(mode="json"))
    now = flat(yaml.safe_load(dump(run.settings)))
    made = run.summary.get("trainer", "own")
    if made != run.row.trainer:
        raise ConfigError(
            f"{run.folder}: finished by trainer {made}, the row now says {run.row.trainer}; remove the folder"
        )
    changed = [k for k in now if before.get(k) != now[k] and not k.startswith(HARMLESS)]
    if changed:
        raise ConfigError(
            f"{run.folder}: finished with {changed[0]}={before.get(changed[0])!r}, the comparison now asks for "
            f"{now[changed[0]]!r}; remove the folder to run it again, or give the comparison another dir"
        )
