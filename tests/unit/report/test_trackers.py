"""Trackers: TensorBoard and MLflow as they are, and a stand-in in accelerate's registry for what fails.

tests/integration/test_train.py reads back what a run sends to each tracker that is installed.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from accelerate import tracking
from helpers import tiny_settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.report.secrets import redact, redact_tree
from onpolicy_skd.report.trackers import Trackers, check_trackers
from onpolicy_skd.run.preflight import preflight

TOKEN = "abcdefghij0123456789"


class StandIn(tracking.GeneralTracker):
    """Keeps what it is sent; ``failing`` names the methods that raise."""

    name = "mlflow"
    requires_logging_directory = False
    failing: tuple[str, ...] = ()
    instances: ClassVar[list] = []

    def __init__(self, project, run_id=None, run_name=None):
        super().__init__()
        self.project, self.run_id, self.run_name = project, run_id, run_name
        self.calls, self.config = [], None
        self.instances.append(self)

    @property
    def tracker(self):
        return SimpleNamespace(info=SimpleNamespace(run_id=self.run_id or "new-id"))

    def _call(self, method, *values):
        if method in self.failing:
            raise ConnectionError(f"{method} refused\nsecond line")
        self.calls.append((method, *values))

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        self._call("log", values, step)

    def log_artifact(self, path):
        self._call("log_artifact", path)

    def finish(self):
        self._call("finish")


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", StandIn)
    monkeypatch.setattr(StandIn, "instances", [])
    monkeypatch.setattr(StandIn, "failing", ())
    return StandIn


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


def test_mlflow_has_numbers_settings_and_files_of_a_resumed_run(settings, tokens, tmp_path, monkeypatch):
    """MLflow itself, with a database on this machine."""
    monkeypatch.chdir(tmp_path)  # artifacts lie next to the working directory's database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    first = Trackers(settings("mlflow"), 0, False, refuse)
    first.log({"step": 3, "event": "evaluation", "match": {"share": 0.5, "interval": [0.4, 0.6]}, "loss": 0.25})
    first.send([tmp_path / "absent.png"], [tokens], 4)
    first.close()
    resumed = Trackers(settings("mlflow"), 4, True, refuse)
    resumed.log({"step": 4, "loss": 0.125})
    resumed.close()
    Trackers(settings("mlflow"), 0, False, refuse).close()  # another run in the same folder

    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("onpolicy_skd")
    empty, run = client.search_runs([experiment.experiment_id])  # the newest first
    assert (empty.info.run_name, empty.data.metrics) == ("r", {})
    assert (run.info.run_name, run.data.metrics) == ("r", {"match/share": 0.5, "loss": 0.125})
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(3, 0.25), (4, 0.125)]
    assert run.data.params["learner.batch_size"] == "16"
    (artifact,) = client.list_artifacts(run.info.run_id)
    downloaded = client.download_artifacts(run.info.run_id, artifact.path, str(tmp_path))
    assert Path(downloaded).read_text() == tokens.read_text()


def test_a_resumed_run_continues_at_the_tracker(stand_in, settings):
    Trackers(settings("mlflow"), 0, False, refuse).close()
    Trackers(settings("mlflow"), 2, True, refuse).close()
    Trackers(settings("mlflow"), 0, False, refuse).close()  # another run in the same folder
    assert [t.run_id for t in stand_in.instances] == [None, "new-id", None]
    assert json.loads((settings().run.folder / "trackers.json").read_text()) == {"mlflow": "new-id"}


@pytest.mark.parametrize("method", ["start", "log", "log_artifact", "finish"])
def test_a_failing_tracker_is_dropped_with_one_line(stand_in, settings, tokens, monkeypatch, method):
    monkeypatch.setattr(stand_in, "failing", (method,))
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


def test_tensorboard_gets_all_and_forgets_what_is_repeated(settings, tokens, tmp_path):
    from matplotlib.figure import Figure

    plot = tmp_path / "curves.png"
    figure = Figure(figsize=(2, 1))
    figure.savefig(plot, dpi=50)
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


def test_credentials_in_settings_are_not_sent(stand_in, settings, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", TOKEN)
    Trackers(
        settings("mlflow", cluster={"address": "ray://u:pw@h:1"}, data={"system": TOKEN}), 0, False, refuse
    ).close()
    config = stand_in.instances[0].config
    assert (config["cluster.address"], config["data.system"]) == ("ray://***@h:1", "***")
