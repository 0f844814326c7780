"""Trackers: TensorBoard and MLflow as they are, and a stand-in in accelerate's registry whose methods fail.

tests/integration/test_train.py reads back what a run sends to each tracker that is installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import tracking
from helpers import ROOT, tiny_settings
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.report.secrets import redact, redact_tree
from onpolicy_skd.report.trackers import Trackers, check_trackers
from onpolicy_skd.run.preflight import preflight

TOKEN = "abcdefghij0123456789"


class StandIn(tracking.GeneralTracker):
    """A tracker whose method ``failing`` raises; the others do nothing."""

    name = "mlflow"
    requires_logging_directory = False
    failing = ""
    tracker = SimpleNamespace(info=SimpleNamespace(run_id="id"))

    def __init__(self, project, run_id=None, run_name=None):
        super().__init__()

    def _call(self, method):
        if method == self.failing:
            raise ConnectionError(f"{method} refused\nsecond line")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("store_init_configuration")

    def log(self, values, step=None):
        self._call("log")

    def log_artifact(self, path):
        self._call("log_artifact")

    def finish(self):
        self._call("finish")


@pytest.fixture
def settings(tmp_path):
    def build(*names, **sections):
        settings = tiny_settings(run={"dir": tmp_path, "name": "r", "trackers": list(names)}, **sections)
        settings.run.folder.mkdir(exist_ok=True)
        return settings

    return build


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens-after-000002.jsonl"
    file.write_text('{"key": "a", "tokens": ["x"]}\n')
    return file


def refuse(text):
    raise AssertionError(text)


@pytest.fixture
def plot(tmp_path):
    file = tmp_path / "curves.png"
    Figure(figsize=(2, 1)).savefig(file, dpi=50)
    return file


def test_mlflow_has_numbers_settings_and_files_of_a_resumed_run(settings, tokens, plot, tmp_path, monkeypatch):
    """Read back what MLflow itself keeps in its default store, a SQLite file in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SERVICE_PASSWORD", TOKEN)
    check_trackers(["mlflow"])
    cfg = settings("mlflow", cluster={"address": "ray://u:pw@h:1"}, data={"system": TOKEN})
    first = Trackers(cfg, 0, False, refuse)
    first.log({"step": 3, "event": "evaluation", "match": {"share": 0.5, "interval": [0.4, 0.6]}, "loss": 0.25})
    first.send([plot, tmp_path / "absent.png"], [tokens], 4)
    first.close()
    resumed = Trackers(cfg, 4, True, refuse)
    resumed.log({"step": 4, "loss": 0.125})
    resumed.close()
    resumed_id = json.loads((cfg.run.folder / "trackers.json").read_text())["mlflow"]
    Trackers(cfg, 0, False, refuse).close()  # another run in the same folder

    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("onpolicy_skd")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    run = runs.pop(resumed_id)
    (empty,) = runs.values()
    assert (empty.info.run_name, empty.data.metrics) == ("r", {})
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert run.data.metrics == {"match/share": 0.5, "loss": 0.125}
    assert [(m.step, m.value) for m in client.get_metric_history(resumed_id, "loss")] == [(3, 0.25), (4, 0.125)]
    params = run.data.params
    assert params["learner.batch_size"] == "16"
    assert (params["cluster.address"], params["data.system"]) == ("ray://***@h:1", "***")
    for file in (plot, tokens):
        downloaded = client.download_artifacts(resumed_id, file.name, str(tmp_path / "downloads"))
        assert Path(downloaded).read_bytes() == file.read_bytes()
    assert len(client.list_artifacts(resumed_id)) == 2
    assert TOKEN.encode() not in (tmp_path / "mlflow.db").read_bytes()


LOG_ONE_STEP = """
import sys
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.report.trackers import Trackers
names, folder, token = sys.argv[1].split(","), sys.argv[2], sys.stdin.read()
settings = resolve({
    "run": {"dir": folder, "name": "r", "trackers": names}, "cluster": {"address": "ray://u:pw-of-u@h:1"},
    "data": {"source": "demo", "system": token}, "teacher": {"prompt": "{question} " + token},
})
settings.run.folder.mkdir()
trackers = Trackers(settings, 0, False, sys.exit)
trackers.log({"step": 0, "loss": 0.5})
trackers.close()
"""


@pytest.mark.parametrize(
    "folders",
    [
        pytest.param({"tensorboard": "r/tensorboard", "wandb": "r/wandb", "trackio": "trackio"}, id="light"),
        pytest.param({"mlflow": "."}, marks=pytest.mark.slow, id="mlflow"),
    ],
)
def test_credentials_in_settings_reach_no_tracker(folders, tmp_path):
    """A process without an account; what a tracker stores lies in its folder of the working directory."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("MLFLOW_", "WANDB_", "TRACKIO_"))} | {
        "SERVICE_PASSWORD": TOKEN, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"),
        "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home"),
    }  # fmt: skip
    command = [sys.executable, "-c", LOG_ONE_STEP, ",".join(folders), str(tmp_path)]
    done = subprocess.run(
        command, input=TOKEN, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for folder in folders.values():
        assert b"ray://***@h:1" in content(tmp_path / folder)
    stored = content(tmp_path)
    assert TOKEN.encode() not in stored
    assert b"pw-of-u" not in stored
    assert TOKEN not in done.stdout + done.stderr


def content(folder):
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("method", ["start", "store_init_configuration", "log", "log_artifact", "finish"])
def test_a_failing_tracker_is_dropped_with_one_line(settings, tokens, monkeypatch, method):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", StandIn)
    monkeypatch.setattr(StandIn, "failing", method)
    lines = []
    sent = Trackers(settings("mlflow", "tensorboard"), 0, False, lines.append)
    for step in range(2):
        sent.log({"step": step, "loss": 0.5})
    sent.send([], [tokens], 2)
    sent.close()
    assert lines == [f"tracker mlflow: ConnectionError: {method} refused; the run continues without it"]
    events = EventAccumulator(str(settings().run.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [s.step for s in events.Scalars("loss")] == [0, 1]


def test_a_damaged_file_of_ids_does_not_end_the_run(settings):
    folder = settings().run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trackers.json").write_text("{")
    lines = []
    sent = Trackers(settings("tensorboard"), 1, True, lines.append)
    sent.log({"step": 1, "loss": 0.5})
    sent.close()
    (line,) = lines
    assert line.startswith("tracker trackers.json: JSONDecodeError")


def test_tensorboard_gets_all_and_forgets_what_is_repeated(settings, tokens, plot):
    sent = Trackers(settings("tensorboard", learner={"lr": 0.125}), 0, False, refuse)
    for step, loss in ((0, 0.5), (1, 0.4), (2, 0.3)):
        sent.log({"step": step, "loss": loss, "seconds": {"rollout": 1.5}})
    sent.rewind(1)
    sent.log({"step": 1, "loss": 0.25})
    sent.send([plot], [tokens], 2)
    sent.close()
    events = EventAccumulator(str(settings().run.folder / "tensorboard"))
    events.Reload()
    assert [(s.step, s.value) for s in events.Scalars("loss")] == [(0, 0.5), (1, 0.25)]
    assert events.Scalars("seconds/rollout")[0].value == 1.5
    image = events.Images("curves")[0]
    assert (image.width, image.height) == (100, 50)
    shown = {tag: text(events, tag) for tag in events.Tags()["tensors"]}
    assert '"lr": 0.125' in shown["config/text_summary"]
    assert tokens.read_text().strip() in shown["tokens-after-000002.jsonl/text_summary"]


def text(events, tag):
    return events.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def test_a_missing_package_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match=r"run.trackers: the package trackio is not installed; .* extra trackio"):
        preflight(tiny_settings(run={"dir": tmp_path, "trackers": ["tensorboard", "trackio"]}))


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match=r"run.trackers.*neptune.*'wandb'"):
        tiny_settings(run={"trackers": ["neptune"]})


@pytest.mark.parametrize(("mode", "login", "refused"), [("online", False, True), ("online", True, False),
                                                        ("offline", False, False)])  # fmt: skip
def test_wandb_without_a_login_is_refused_unless_offline(monkeypatch, mode, login, refused):
    wandb = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)), login=lambda prompt, verify: login
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    if refused:
        with pytest.raises(ConfigError, match=r"wandb has no login here; .*WANDB_MODE=offline"):
            check_trackers(["wandb"])
    else:
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ray://me:pass@head:10001", "ray://***@head:10001"),
        ("https://host/x?token=abc&page=2&X-Amz-Signature=12", "https://host/x?token=***&page=2&X-Amz-Signature=***"),
        ("with hf_abcdefghijklmnopqrstuv in it", "with *** in it"),
        (f"key {TOKEN}", "key ***"),
        ("Qwen/Qwen3-8B at user@host, #### 42", "Qwen/Qwen3-8B at user@host, #### 42"),
    ],
)
def test_redact(monkeypatch, text, expected):
    monkeypatch.setenv("SOME_API_KEY", TOKEN)
    monkeypatch.setenv("SHORT_TOKEN", "a")
    monkeypatch.setenv("KEYBOARD", "Qwen/Qwen3-8B")
    assert redact(text) == expected
    assert redact_tree({"a": [text, 1], "b": {"c": text}, "d": None}) == {
        "a": [expected, 1], "b": {"c": expected}, "d": None
    }  # fmt: skip
