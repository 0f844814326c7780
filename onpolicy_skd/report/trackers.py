"""Experiment trackers by name, from accelerate's registry: TensorBoard, Weights & Biases, trackio, MLflow.

A tracker gets the numbers of ``metrics.jsonl``, the settings without credentials, the plots, and the token views of
evaluations.  A tracker that fails is dropped with a line in the log, so it never ends the run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onpolicy_skd.config.errors import ConfigError, first_line
from onpolicy_skd.config.loading import flat
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.report.secrets import redact_tree
from onpolicy_skd.storage.files import RunPaths, write_text

PROJECT = "onpolicy_skd"  # name at wandb, trackio and mlflow, unless their environment variables set another


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is missing, or that would ask for a login in the middle of a run.

    TensorBoard needs no check, because it is always installed.
    """
    for name in names:
        if name == "tensorboard":
            continue
        from accelerate.tracking import get_available_trackers

        if name not in [str(tracker) for tracker in get_available_trackers()]:
            raise ConfigError(
                f"run.trackers: the package {name} is not installed; install this project with the extra {name}, for "
                f"example pip install '.[{name}]', or leave {name} out"
            )
        if name == "wandb":
            _check_login()


def _check_login() -> None:
    import wandb

    mode = wandb.setup().settings.mode  # from WANDB_MODE or `wandb offline`
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "run.trackers: wandb has no login here; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline, "
            "which needs no account"
        )


class Trackers:
    """The trackers of a run: ``log`` numbers, ``send`` files, ``close``.

    ``trackers.json`` in the run folder holds the run's ids at wandb and MLflow, so that a resumed run continues there.
    """

    def __init__(self, settings: Settings, first_step: int, resumed: bool, log: Callable[[str], None]) -> None:
        self._run, self._log, self._resumed = settings.run, log, resumed
        self._config = redact_tree(settings.model_dump(mode="json"))
        self._ids_file = RunPaths(settings.run.folder).trackers
        self._trackers: dict[str, Any] = {}
        self._ids: dict[str, str] = {}
        if resumed and self._ids_file.exists():
            self._attempt("trackers.json", lambda: self._ids.update(json.loads(self._ids_file.read_text())))
        for name in dict.fromkeys(settings.run.trackers):
            self._attempt(name, lambda name=name: self._start(name, first_step))
        if self._ids:
            self._attempt("trackers.json", lambda: write_text(self._ids_file, json.dumps(self._ids) + "\n"))

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        """Call ``action``; if it fails, drop the tracker ``name``."""
        try:
            action()
        except Exception as error:  # trackers and their network clients raise many kinds
            self._trackers.pop(name, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._log(f"tracker {name}: {reason}; the run continues without it")

    def _start(self, name: str, first_step: int) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=True)  # accelerate's trackers read it; the driver uses no device
        project, options = getattr(self, f"_{name}_options")(first_step)
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
        tracker.start()
        if name == "wandb":
            tracker.tracker.define_metric("*", step_metric="step")  # wandb's counter cannot go back to a checkpoint
            self._ids[name] = tracker.tracker.id
        elif name == "mlflow":
            self._ids[name] = tracker.tracker.info.run_id
            tracker.store_init_configuration(flat(self._config))
        elif name == "tensorboard":
            tracker.log({"config": _code_block(json.dumps(self._config, indent=2))}, step=first_step)
        self._trackers[name] = tracker

    def _tensorboard_options(self, first_step: int) -> tuple[str, dict[str, Any]]:
        return "tensorboard", {"logging_dir": str(self._run.folder), "purge_step": first_step}

    def _wandb_options(self, _: int) -> tuple[str, dict[str, Any]]:
        import wandb

        # No command line, git remote, source code or console output: any of them may hold a credential.
        private = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
        return os.environ.get("WANDB_PROJECT", PROJECT), {
            "name": self._run.name, "id": self._ids.get("wandb"), "resume": "allow", "dir": str(self._run.folder),
            "config": self._config, "settings": private,
        }  # fmt: skip

    def _trackio_options(self, _: int) -> tuple[str, dict[str, Any]]:
        return os.environ.get("TRACKIO_PROJECT", PROJECT), {
            "name": self._run.name, "resume": "allow" if self._resumed else "never", "config": self._config,
            "embed": False, "private": True,
        }  # fmt: skip

    def _mlflow_options(self, _: int) -> tuple[str, dict[str, Any]]:
        return PROJECT, {"run_id": self._ids.get("mlflow"), "run_name": self._run.name}

    def rewind(self, step: int) -> None:
        """Continue at ``step`` after a fault: TensorBoard drops later steps, the other trackers keep them."""
        if "tensorboard" in self._trackers:
            self._attempt("tensorboard", self._trackers["tensorboard"].finish)
            self._attempt("tensorboard", lambda: self._start("tensorboard", step))

    def log(self, record: dict[str, Any]) -> None:
        """Log the numbers of ``record``, which must hold ``step``; nested ones are named ``outer/inner``."""
        step, values = record["step"], _numbers(record)
        for name, tracker in list(self._trackers.items()):
            if name == "wandb":
                self._attempt(name, lambda tracker=tracker: tracker.log(values | {"step": step}))
            else:
                self._attempt(name, lambda tracker=tracker: tracker.log(values, step=step))

    def send(self, plots: Sequence[Path], files: Sequence[Path], step: int) -> None:
        """Send plots (PNG) as images and other files unchanged; files that do not exist are left out."""
        plots, files = ([path for path in paths if path.exists()] for paths in (plots, files))
        for name in list(self._trackers):
            self._attempt(
                name, lambda name=name: SENDERS[name](self._trackers[name], self._run.name, plots, files, step)
            )

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.finish)
        self._trackers.clear()


def _to_tensorboard(tracker: Any, _: str, plots: Sequence[Path], files: Sequence[Path], step: int) -> None:
    from matplotlib.image import imread

    for path in plots:
        image_1HWC = imread(path)[None, ..., :3]  # without opacity
        tracker.log_images({path.stem: image_1HWC}, step=step, dataformats="NHWC")
    tracker.log({path.name: _code_block(path.read_text(encoding="utf-8")) for path in files}, step=step)


def _to_wandb(tracker: Any, _: str, plots: Sequence[Path], files: Sequence[Path], step: int) -> None:
    import wandb

    tracker.log({path.stem: wandb.Image(str(path)) for path in plots} | {"step": step})
    for path in files:
        tracker.tracker.save(str(path), base_path=str(path.parent), policy="now")


def _to_trackio(tracker: Any, run: str, plots: Sequence[Path], files: Sequence[Path], step: int) -> None:
    import trackio

    if plots:
        tracker.log({path.stem: trackio.Image(str(path)) for path in plots}, step=step)
    for path in files:
        tracker.tracker.log_artifact(path, re.sub(r"[^A-Za-z0-9._-]", "-", f"{run}-{path.name}"), "file")


def _to_mlflow(tracker: Any, _: str, plots: Sequence[Path], files: Sequence[Path], step: int) -> None:
    for path in [*plots, *files]:
        tracker.log_artifact(str(path))


SENDERS: Mapping[str, Callable[..., None]] = {
    "tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio, "mlflow": _to_mlflow,
}  # fmt: skip


def _code_block(text: str) -> str:
    """Return ``text`` as a block of code in TensorBoard's markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            numbers[prefix + name] = value
    return numbers
