"""The driver end to end: real Ray, real vLLM, the bundled pair.

Runs whose process or private Ray matters are a separate process, as a user's is; the others share a Ray.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import GAP, ON_GPU, ROOT
from hub_server import running_hub
from huggingface_hub import ModelCard

from eval import gsm8k, paired
from eval.faults.processes import actors, kill_tree
from onpolicy_skd import train
from onpolicy_skd.report.metrics_log import read

BASE = [
    "--config", str(ROOT / "configs" / "demo.yaml"), "learner.batch_size=8", "run.trackers=[]",
    "run.evaluate_every=0", "run.checkpoint_every=2", "eval.problems=16", "eval.teacher=false", "eval.before=false",
    "data.train_problems=500",
]  # fmt: skip
HELD_OUT = "data.validation_problems=16"  # of the finished run, and of those that are compared with it
TRANSFORMERS = ["rollout.engine=transformers"]  # starts in half the time of vLLM
ONE_ACTOR = [*TRANSFORMERS, "rollout.placement=learner", "teacher.placement=learner"]
SECRETS = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"), "nobody-should-read-this")
VIEWS = ("after-000005", "before-000000", "during-000003")  # evaluations with token views
LOSSES = ("loss", "grad_norm", "entropy", "divergence_selected", "positions", "lr")


def command(folder, *overrides):
    return [sys.executable, "-m", "onpolicy_skd.train", *BASE, f"run.dir={folder}", *overrides]


def run(folder, *overrides, timeout=300, paths=(), environment=None):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | SECRETS | (environment or {})
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return subprocess.run(
        command(folder, *overrides),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment,
        check=False,
    )


@pytest.fixture
def run_here(address, capsys):
    """Make a run in this process, on the Ray that this module shares."""

    def run(folder, *overrides):
        code = train.main([*BASE, f"run.dir={folder}", f"cluster.address={address}", *overrides])
        return subprocess.CompletedProcess(overrides, code, *capsys.readouterr())

    return run


def losses(folder, keys=LOSSES):
    return [{k: r[k] for k in keys} for r in read(folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One uninterrupted run of five steps with vLLM and everything on."""
    folder = tmp_path_factory.mktemp("finished")
    with running_hub(SECRETS["HF_TOKEN"]) as hub:
        environment = hub.environment | {
            "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"),
            "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
        }  # fmt: skip
        done = run(folder, HELD_OUT, "run.steps=5", "run.evaluate_every=3", "eval.before=true",
                   "eval.divergence_prompts=8", "run.trackers=[tensorboard,wandb,trackio,mlflow]", "run.keep_best=true",
                   "run.name=r", "hub.push=me/pair", environment=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "authentication" not in done.stderr  # Ray's warning that its token is needed
    for name, content in hub.files["me/pair"].items():
        (folder / "hub").mkdir(exist_ok=True)
        (folder / "hub" / name).write_bytes(content)
    return folder / "r", done.stdout


def test_a_run_leaves_everything_it_promises(finished_run):
    folder, printed = finished_run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 5
    assert summary["seed"] == 1340
    assert summary["problems"] == 16
    assert set(summary["exact_match"]) == {"before", "after", "teacher"}
    assert summary["divergence"]["before"] > 0
    assert {"torch", "ray", "transformers"} <= set(summary["versions"])
    assert summary["seconds"] > 0
    assert summary["best_step"] == json.loads((folder / "best.json").read_text())["step"] == 3
    assert summary["restarts"] == {}
    for name in ("config.yaml", "metrics.jsonl", "report.md", "curves.png", "final/model.safetensors",
                 "best/model.safetensors", "best/tokenizer.json", "timeline.json", "timeline.png",
                 "final/README.md", "final/curves.png"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").rglob("events*"))
    assert len((folder / "evaluations" / "after-000005.jsonl").read_text().splitlines()) == 16
    assert yaml.safe_load((folder / "config.yaml").read_text())["learner"]["batch_size"] == 8
    for text in ("exact match  before", "exact match   after", str(folder / "report.md"),
                 f"ask the student: skd chat --model {folder / 'final'}"):  # fmt: skip
        assert text in printed


def test_the_hub_has_the_student_and_its_card(finished_run):
    folder, printed = finished_run
    received = folder.parent / "hub"
    assert {path.name for path in received.iterdir()} == {path.name for path in (folder / "final").iterdir()}
    for path in received.iterdir():
        assert path.read_bytes() == (folder / "final" / path.name).read_bytes()
    loaded = ModelCard.load(received / "README.md")
    assert loaded.data.library_name == "transformers"
    share = json.loads((folder / "summary.json").read_text())["exact_match"]["after"]
    assert f"| student after | {100 * share:.1f} % (" in loaded.text
    assert re.search(r"^the student is at http://\S+/me/pair$", printed, re.MULTILINE)


def logged(folder, key):
    """(step, value) of ``key`` in metrics.jsonl."""
    return [(r["step"], pytest.approx(r[key])) for r in read(folder / "metrics.jsonl") if key in r]


def test_tensorboard_has_the_run(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished_run
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key in ("loss", "divergence_reference"):
        assert [(s.step, s.value) for s in events.Scalars(key)] == logged(folder, key)
    assert events.Tags()["images"] == ["curves", "timeline"]
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert texts == {"config", *(f"tokens-{name}.jsonl" for name in VIEWS)}


def test_wandb_has_the_run_without_a_login(finished_run):
    folder, _ = finished_run
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (sent,) = (r.run for r in records if r.HasField("run"))
    assert (sent.project, sent.display_name) == ("onpolicy_skd", "r")
    config = {update.key: json.loads(update.value_json) for update in sent.config.update}
    assert config["learner"]["batch_size"] == 8
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    for key in ("loss", "divergence_reference"):
        assert [(row["step"], row[key]) for row in rows if key in row] == logged(folder, key)
    files = {item.path for r in records if r.HasField("files") for item in r.files.files}
    assert {f"tokens-{name}.jsonl" for name in VIEWS} <= files
    plots = {Path(name).name.partition("_")[0] for name in files if name.endswith(".png")}
    assert plots == {"curves", "timeline"}
    view = file.parent / "files" / f"tokens-{VIEWS[0]}.jsonl"
    assert view.read_text() == (folder / "evaluations" / view.name).read_text()


def wandb_records(file):
    """Yield the records of wandb's offline file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, data_bytes = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:  # the end of a block
            at += rest
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        data_bytes += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last fragment of one
            yield Record.FromString(data_bytes)
            data_bytes = b""


def test_trackio_has_the_run(finished_run):
    folder, _ = finished_run
    with contextlib.closing(sqlite3.connect(folder.parent / "trackio" / "onpolicy_skd.db")) as database:
        rows = [(step, json.loads(m)) for step, m in database.execute("SELECT step, metrics FROM metrics ORDER BY id")]
        ((config,),) = database.execute("SELECT config FROM configs WHERE run_name = 'r'")
        manifests = [json.loads(m) for (m,) in database.execute("SELECT manifest FROM artifact_versions")]
    for key in ("loss", "divergence_reference"):
        assert [(step, row[key]) for step, row in rows if key in row] == logged(folder, key)
    assert json.loads(config)["learner"]["batch_size"] == 8
    assert {name for _, row in rows for name, value in row.items() if isinstance(value, dict)} == {"curves", "timeline"}
    assert {manifest[0]["path"] for manifest in manifests} == {f"tokens-{name}.jsonl" for name in VIEWS}


def test_mlflow_has_the_run(finished_run, monkeypatch):
    from mlflow import MlflowClient

    folder, _ = finished_run
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((folder.parent / "mlflow").as_uri())
    (sent,) = client.search_runs([client.get_experiment_by_name("onpolicy_skd").experiment_id])
    assert (sent.info.run_name, sent.info.status) == ("r", "FINISHED")
    assert sent.data.params["learner.batch_size"] == "8"
    for key in ("loss", "divergence_reference"):
        history = client.get_metric_history(sent.info.run_id, key)
        assert [(m.step, m.value) for m in history] == logged(folder, key)
    artifacts = {artifact.path for artifact in client.list_artifacts(sent.info.run_id)}
    assert artifacts == {"curves.png", "timeline.png", *(f"tokens-{name}.jsonl" for name in VIEWS)}


def test_secrets_of_the_environment_are_nowhere_in_what_a_run_leaves(finished_run):
    folder, printed = finished_run
    files = [f for f in folder.parent.rglob("*") if f.is_file()]
    assert len(files) > 12
    secret = SECRETS["HF_TOKEN"]
    assert [f for f in files if secret.encode() in f.read_bytes()] == []
    assert secret not in printed


def test_the_sampler_agrees_with_the_learner_at_every_step(finished_run):
    steps = [r for r in read(finished_run[0] / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in steps] == [0, 1, 2, 3, 4]
    assert all(r["sampler_gap"] < GAP for r in steps)
    assert all(r["version"] == r["step"] + 1 for r in steps)


def test_the_final_model_is_a_plain_checkpoint_that_evaluates_alike(finished_run, capsys):
    folder, _ = finished_run
    arguments = ["--model", str(folder / "final"), "--out", str(folder / "again"), "rollout.engine=transformers"]
    assert gsm8k.main(arguments) == 0
    assert "match:" in capsys.readouterr().out
    again = json.loads((folder / "again" / "result.json").read_text())
    assert again["match"]["share"] == json.loads((folder / "summary.json").read_text())["exact_match"]["after"]


@pytest.mark.slow
def test_each_process_is_killed_once_and_the_losses_are_those_of_an_undisturbed_run(finished_run, tmp_path):
    """Rollout, teacher and learner are killed and replaced; then the driver, and the run is resumed.  Bit for bit."""
    common = [HELD_OUT, "run.steps=5", "run.name=r", "faults.backoff_seconds=0", "eval.before=true",
              "run.evaluate_every=3"]  # fmt: skip
    process = subprocess.Popen(command(tmp_path, *common), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    victims = {"step 1/": "Rollout", "step 2/": "Teacher", "step 3/": "Learner"}
    printed = ""
    for line in process.stdout:
        printed += line
        if (kind := victims.pop(line[:7], None)) is not None:
            actors(process.pid, kind)[0].kill()
        elif line.startswith("step 3/"):  # repeated, from the checkpoint of the second step
            process.kill()
            kill_tree(process.pid)
            break
    process.wait()
    folder = tmp_path / "r"
    for role in ("rollout", "teacher", "learner"):
        assert printed.count(f"fault: {role}: its process ended") == 1, printed
    assert "continuing with step 3 from the newest checkpoint" in printed
    assert not (folder / "summary.json").exists()
    done = run(tmp_path, *common, "resume=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step" in done.stdout
    assert json.loads((folder / "summary.json").read_text())["restarts"] == {"rollout": 1, "teacher": 1, "learner": 1}
    events = [(r["event"], r["step"]) for r in read(folder / "metrics.jsonl") if "event" in r]
    assert [e for e in events if e[0] == "evaluation"] == [("evaluation", 0), ("evaluation", 3), ("evaluation", 5)]
    assert sum(name == "fault" for name, _ in events) == 3
    for actual, expected in zip(losses(folder), losses(finished_run[0]), strict=True):
        assert actual == (pytest.approx(expected, rel=0.05) if ON_GPU else expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group_ends_with_a_checkpoint(tmp_path, number):
    """Ctrl-C in a terminal, ``timeout`` and schedulers signal the whole group; Ray's processes must survive that."""
    process = subprocess.Popen(
        command(tmp_path, *TRANSFORMERS, "run.steps=400", "run.name=r"), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.killpg(process.pid, number)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, out + err
    assert f"{number.name}: ending after this step" in err
    assert "resume=auto" in out
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 2 <= summary["steps"] < 400
    assert list((tmp_path / "r" / "checkpoints").glob(f"step-{summary['steps']:08d}"))


@pytest.mark.slow
def test_a_signal_outside_the_steps_ends_the_run_at_once(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, *TRANSFORMERS, "run.name=r"), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("starting "):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, out + err
    assert "SIGTERM: stopped outside the steps" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["preflight", "prepare"])
def test_a_signal_before_ray_starts_is_one_line(tmp_path, monkeypatch, capsys, number, where):
    monkeypatch.setattr(train, where, lambda settings: signal.raise_signal(number))
    assert train.main([*BASE, f"run.dir={tmp_path}"]) == 3
    assert capsys.readouterr().err == f"{number.name}: stopped outside the steps\n"


def test_a_signal_while_ray_starts_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "preflight", lambda settings: sys.exit(signal.SIGTERM))  # as the handler of ray.init
    assert train.main([*BASE, f"run.dir={tmp_path}"]) == 3
    assert capsys.readouterr().err == "SIGTERM: stopped outside the steps\n"


@pytest.mark.slow
def test_a_run_does_not_lean_on_the_private_ray_of_another(tmp_path):
    """The first run is killed, and its Ray with it, while the second continues."""
    options = [*TRANSFORMERS, "learner.batch_size=4"]
    first = subprocess.Popen(command(tmp_path, *options, "run.name=first"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if line.startswith("step 1/"):
            break
    second = subprocess.Popen(
        command(tmp_path, *options, "run.steps=4", "run.name=second"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in second.stdout:
        if line.startswith("starting "):
            break
    first.kill()
    out, _ = second.communicate(timeout=200)
    assert second.returncode == 0, out
    assert "finished after 4 steps" in out


@pytest.mark.slow
def test_two_actors_of_every_role_do_what_one_does(finished_run, tmp_path):
    """Rollouts that agree with the learner at every step show that weights arrive whole, in time and in place."""
    two = [HELD_OUT, "rollout.actors=2", "teacher.actors=2", "learner.ranks=2", "sync.method=broadcast"]
    done = run(tmp_path, *two, "run.steps=3", "run.name=r", "run.timeline=1")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [r for r in read(tmp_path / "r" / "metrics.jsonl") if "loss" in r]
    assert [r["staleness"] for r in steps] == [0, 0, 0]
    assert all(r["sampler_gap"] < GAP for r in steps)
    trace = json.loads((tmp_path / "r" / "timeline.json").read_text())["traceEvents"]
    assert [e["args"]["name"] for e in trace if e["ph"] == "M"] == [
        f"{role} {number}" for role in ("rollout", "teacher", "learner") for number in (0, 1)
    ]
    assert {"generate", "encode", "backbone", "loss", "backward", "send weights", "receive weights"} <= {
        e["name"] for e in trace
    }
    assert (tmp_path / "r" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    for actual, expected in zip(losses(tmp_path / "r"), losses(finished_run[0])[:3], strict=True):
        assert actual == pytest.approx(expected | {"lr": actual["lr"]}, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "victim", "ranks"),
    [("vllm", "Rollout", 1), ("transformers", "Rollout", 1), ("transformers", "Teacher", 2)],
)
def test_rollouts_that_are_learned_from_as_they_come_train_the_same(run_here, tmp_path, engine, victim, ranks):
    """From two engines, whose rollouts come in any order; the step of a killed actor is repeated."""
    common = [f"rollout.engine={engine}", "run.steps=4", "learner.batch_size=16", "faults.backoff_seconds=0"]
    assert run_here(tmp_path, *common, "run.name=undisturbed").returncode == 0
    streaming = ["run.name=r", "pipeline.streaming=true", "rollout.actors=2", f"learner.ranks={ranks}"]
    process = subprocess.Popen(command(tmp_path, *common, *streaming), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("step 2/"):
            actors(process.pid, victim)[0].kill()
    assert process.wait() == 0, printed
    assert printed.count(f"fault: {victim.lower()}: its process ended") == 1
    for record in read(tmp_path / "r" / "metrics.jsonl"):
        if "loss" in record:  # each phase is timed, though they overlap
            assert min(record["seconds"][phase] for phase in ("rollout", "filter", "learn", "sync")) > 0
    for actual, expected in zip(losses(tmp_path / "r"), losses(tmp_path / "undisturbed"), strict=True):
        assert actual == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_run_with_overlap_resumes_with_the_losses_of_an_undisturbed_one(run_here, tmp_path):
    """The prefetched rollouts, by weights that are gone, are in the checkpoint."""
    common = [*TRANSFORMERS, "pipeline.max_staleness=1", "run.steps=6", "run.checkpoint_every=3"]
    assert run_here(tmp_path, *common, "run.name=undisturbed").returncode == 0
    process = subprocess.Popen(command(tmp_path, *common, "run.name=r"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.kill()
            break
    done = run_here(tmp_path, *common, "run.name=r", "resume=auto")
    assert "resuming after step 3" in done.stdout, done.stdout + done.stderr
    steps = [r for r in read(tmp_path / "r" / "metrics.jsonl") if "loss" in r]
    assert [r["staleness"] for r in steps] == [0, 1, 1, 1, 1, 1]
    assert steps[0]["sampler_gap"] < GAP
    assert all("sampler_gap" not in r and 0 < r["policy_gap"] < 0.5 for r in steps[1:])
    assert losses(tmp_path / "r") == losses(tmp_path / "undisturbed")


@pytest.mark.slow
def test_the_teacher_in_the_learners_process_trains_the_same(finished_run, run_here, tmp_path):
    done = run_here(tmp_path, HELD_OUT, "teacher.placement=learner", "run.steps=5", "run.name=r")
    assert done.returncode == 0, done.stdout + done.stderr
    for actual, expected in zip(losses(tmp_path / "r"), losses(finished_run[0]), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_prefilter_scores_once_and_spends_nothing_on_what_it_drops(run_here, tmp_path):
    options = [*ONE_ACTOR, "samples.keep=0.25", "samples.when=prefilter", "data.train_problems=64", "run.epochs=1"]
    done = run_here(tmp_path, *options, "run.steps=null", "run.name=first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 of 64 prompts kept" in done.stdout
    steps = [r for r in read(tmp_path / "first" / "metrics.jsonl") if "loss" in r]
    assert [r["generated"] for r in steps] == [8, 8]
    again = run_here(tmp_path, *options, "run.steps=1", "run.name=second")
    assert "reused from" in again.stdout


@pytest.mark.slow
def test_each_steps_rollouts_are_ranked_and_dropped_ones_counted(run_here, tmp_path):
    """By entropies that the engine in the learner's process recorded."""
    options = ["rollout.entropy=engine", "samples.keep=0.25", "samples.truncated=keep", "run.steps=2", "run.name=r"]
    done = run_here(tmp_path, *ONE_ACTOR, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [r for r in read(tmp_path / "r" / "metrics.jsonl") if "loss" in r]
    assert [(r["generated"], r["samples"], r["dropped"]) for r in steps] == [(32, 8, {"not_selected": 24})] * 2
    assert all(r["sampler_gap"] < GAP and r["entropy_gap"] < 10 * GAP for r in steps)


@pytest.mark.slow
def test_a_batch_left_empty_is_an_event_and_not_a_crash(run_here, tmp_path):
    done = run_here(tmp_path, *ONE_ACTOR, "rollout.max_tokens=4", "run.steps=2", "run.name=r")
    assert done.returncode == 0, done.stdout + done.stderr
    events = [r for r in read(tmp_path / "r" / "metrics.jsonl") if r.get("event") == "empty_batch"]
    assert [r["dropped"] for r in events] == [{"truncated": 8}, {"truncated": 8}]
    assert "samples.truncated=keep" in done.stdout


@pytest.mark.slow
def test_a_sampler_without_the_learners_weights_stops_the_run(run_here, tmp_path):
    """bfloat16 rollouts of a float32 learner stand in for a lost update."""
    done = run_here(tmp_path, "rollout.engine=transformers", "rollout.dtype=bfloat16", "run.steps=1", "run.name=r",
                    "sync.max_gap=1e-5", "teacher.placement=learner")  # fmt: skip
    assert done.returncode == 1
    assert "sync.max_gap=1e-05" in done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", 0)
    assert "sync.max_gap" in summary["reason"]
    assert list((tmp_path / "r" / "checkpoints").glob("step-*"))  # the weights that the update would have spoilt


def other_tokenizer(folder: Path) -> str:
    from onpolicy_skd.models.loading import load_tokenizer, resolve_path

    tokenizer = load_tokenizer("bundled:demo_teacher")
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(resolve_path("bundled:demo_teacher")) / name, folder / name)
    return str(folder)


def without_weights(folder: Path) -> str:
    from onpolicy_skd.models.loading import resolve_path

    ignored = shutil.ignore_patterns("*.safetensors")
    return str(shutil.copytree(resolve_path("bundled:demo_student"), folder, ignore=ignored))


def test_bad_input_is_one_clear_error_and_a_non_zero_exit(run_here, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "2"}\nnot json\n')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("")
    cases = {
        ("student.model=/no/such/folder",): "'/no/such/folder': no such folder",
        (f"teacher.model={other_tokenizer(tmp_path / 'other')}",): "tokenizers of student",
        ("data.source=jsonl", f"data.train_file={rows}"): "rows.jsonl line 2: not JSON",
        ("data.max_prompt_tokens=20",): "data.max_prompt_tokens=20",
        ("learner.lrate=1",): "did you mean 'learner.lr'",
        ("positions.k=0",): "positions.k=0",
        ("run.device=cuda", "cluster.learner_gpus=50", "cluster.rollout_gpus=8", "rollout.actors=2"):
            "asks for 66.3 GPUs (learner 1 x 50 + teacher 1 x 0.3 + rollout 2 x 8) but the cluster has"
            if torch.cuda.is_available() else "torch sees no CUDA device here",
        ("run.name=used",): "already holds a run",
        (f"student.model={without_weights(tmp_path / 'empty')}",): "safetensors",
    }  # fmt: skip
    for overrides, needle in cases.items():
        done = run_here(tmp_path, *overrides)
        code, err = done.returncode, done.stderr
        assert code == 2, (overrides, err)
        assert needle in err
        assert "Traceback" not in err
        assert err.count("error:") == 1


def test_vllm_asked_for_but_not_installed(monkeypatch, capsys, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else True)
    assert train.main([*BASE, f"run.dir={tmp_path}"]) == 2
    assert "rollout.engine=transformers" in capsys.readouterr().err


@pytest.mark.slow
def test_the_worked_example_of_the_docs_runs(run_here, tmp_path):
    """docs/extending.md: its module and the settings of its command, in real actors."""
    page = (ROOT / "docs" / "extending.md").read_text()
    module = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "surprise.py").write_text(module)
    line = next(text for text in page.splitlines() if "positions.metric=surprise" in text)
    overrides = [word for word in line.split() if word.startswith(("positions.", "alignment."))]
    done = run(tmp_path, *ONE_ACTOR, *overrides, "run.steps=2", "run.name=r", paths=[tmp_path])
    assert done.returncode == 0, done.stdout + done.stderr
    for record in losses(tmp_path / "r", ("positions_selected", "positions", "entropy")):
        assert 0 < record["positions_selected"] < record["positions"]
    refused = run_here(tmp_path, *ONE_ACTOR, *overrides, "run.steps=2", "run.name=s")
    assert refused.returncode == 2
    assert "positions.policy=surprise:above_mean: cannot be imported" in refused.stderr


@pytest.mark.slow
def test_steps_whose_loss_is_not_finite_are_skipped_and_then_end_the_run(tmp_path):
    """A user's policy returns NaN weights, in real actors."""
    (tmp_path / "broken.py").write_text(
        "from onpolicy_skd.selection.positions import top_k\n"
        "def weights(scores, counts, context):\n"
        "    selection = top_k(scores, counts, context)\n"
        "    selection.weights_K[0] = float('nan')\n"
        "    return selection\n"
    )
    done = run(tmp_path, *ONE_ACTOR, "positions.policy=broken:weights", "run.steps=5", "learner.max_skipped=1",
               "run.name=r", paths=[tmp_path])  # fmt: skip
    assert done.returncode == 1
    assert "error: 2 steps had a loss or gradient that is not finite, learner.max_skipped=1" in done.stderr
    assert "Traceback" not in done.stderr
    skipped = [r for r in read(tmp_path / "r" / "metrics.jsonl") if r.get("event") == "skipped"]
    assert [(r["step"], len(r["samples"])) for r in skipped] == [(0, 8), (1, 8)]
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", 2)
    assert (tmp_path / "r" / "checkpoints" / "step-00000002").is_dir()  # with weights that are as they were


def test_off_policy_the_reference_answers_teach(run_here, tmp_path):
    """The same learner, fed with reference answers; the rollout engine serves evaluations alone."""
    off = ["mode=off_policy", "classes.sampler=rs_kd", "positions.policy=gls", "alignment.ema_weight=0.1",
           "run.steps=4", "run.name=r", "eval.before=true", "eval.teacher=true"]  # fmt: skip
    done = run_here(tmp_path, *ONE_ACTOR, *off)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact match teacher" in done.stdout
    records = [r for r in read(tmp_path / "r" / "metrics.jsonl") if "loss" in r]
    assert [r["version"] for r in records] == [1, 2, 3, 4]
    assert all("sampler_gap" not in r for r in records)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["mode"] == "off_policy"
    assert summary["exact_match"]["teacher"] >= 0.9
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["alignment"]["divergence"] == "forward_kl"
    before, after = (tmp_path / "r" / "evaluations" / f"{n}.jsonl" for n in ("before-000000", "after-000004"))
    assert before.read_text() != after.read_text()  # the engine has the new weights by then


@pytest.mark.slow
def test_half_of_a_batch_may_be_the_teachers_own_answers(run_here, tmp_path):
    """mode=mixed with sequence-level KD: the teacher writes its answers once, and a second run reads them."""
    mixed = ["mode=mixed", "rollout.share=0.5", "references.source=teacher", "references.temperature=0",
             "data.train_problems=24", "run.steps=3"]  # fmt: skip
    for name, needle in (("first", "has answered 24/24"), ("second", "reused from")):
        done = run_here(tmp_path, *TRANSFORMERS, *mixed, f"run.name={name}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert needle in done.stdout
    steps = [r for r in read(tmp_path / "first" / "metrics.jsonl") if "loss" in r]
    assert [(r["generated"], r["version"]) for r in steps] == [(8, 1), (8, 2), (8, 3)]
    assert all(r["sampler_gap"] < GAP for r in steps)  # of the half that the student wrote
    assert losses(tmp_path / "second") == losses(tmp_path / "first")


@pytest.mark.slow
def test_a_student_teaches_itself_with_the_answer_at_hand(run_here, tmp_path):
    """Another prompt, a moving teacher, a growing limit: a resumed run has the losses of an undisturbed one."""
    options = [*ONE_ACTOR, "teacher.model=student", "teacher.prompt={question} Solution: {answer} Again:",
               "teacher.max_prompt_tokens=256", "teacher.ema_decay=0.5", "rollout.max_tokens_start=20",
               "rollout.max_tokens_steps=8", "alignment.reference_weight=0.1", "learner.schedule=constant"]  # fmt: skip
    done = run_here(tmp_path, *options, "run.name=whole", "run.steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [r for r in read(tmp_path / "whole" / "metrics.jsonl") if "loss" in r]
    assert [r["max_tokens"] for r in steps] == [20, 35, 51, 66]
    assert [r["dropped"] for r in steps] == [{}] * 4  # what the limit cuts is kept
    assert steps[0]["divergence_selected"] > 0.05
    assert steps[3]["reference_kl"] > 0
    for steps_done in (2, 4):
        done = run_here(tmp_path, *options, "run.name=parts", "resume=auto", f"run.steps={steps_done}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_the_teacher_ranks_and_math_verify_judges(run_here, tmp_path):
    """Samples and positions by KL with the teacher in its actor, on wrong answers, weighted by pass rates."""
    options = ["samples.metric=kl", "samples.keep=0.5", "samples.correctness=wrong", "samples.weight=paced",
               "rollout.n=4", "learner.batch_size=32", "positions.metric=kl", "run.steps=2"]  # fmt: skip
    done = run_here(tmp_path, *TRANSFORMERS, "rollout.placement=learner", *options, "run.name=r")
    assert done.returncode == 0, done.stdout + done.stderr
    for record in read(tmp_path / "r" / "metrics.jsonl"):
        dropped = record.get("dropped", {"right": 1, "no_pace": 1})
        assert dropped["right"] > 0
        assert dropped["no_pace"] > 0


def test_resuming_with_other_settings_is_refused_by_name(finished_run, run_here):
    done = run_here(finished_run[0].parent, HELD_OUT, "run.name=r", "resume=auto", "run.steps=5", "learner.lr=0.5",
               "eval.divergence_prompts=9")  # fmt: skip
    assert done.returncode == 2
    assert "learner.lr: 0.001 then, 0.5 now" in done.stderr
    assert "eval." not in done.stderr


@pytest.mark.slow
def test_the_demo_pair_learns(tmp_path):
    """The learning test: on-policy, a fifth of the positions, and exact match rises on the same problems."""
    start = time.monotonic()
    done = run(tmp_path, "learner.batch_size=64", "run.steps=110", "eval.before=true", "eval.problems=300",
               "run.name=r", "run.checkpoint_every=0", "teacher.placement=learner", timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (
        paired.read(tmp_path / "r" / "evaluations" / f"{n}.jsonl") for n in ("before-000000", "after-000110")
    )
    columns = paired.arm(before, after, list(before))
    change = paired.Change.of(columns["before"], columns["after"])
    print(f"{change} in {time.monotonic() - start:.0f} s")
    assert change.gained > change.lost
    assert change.p_value < 0.01
