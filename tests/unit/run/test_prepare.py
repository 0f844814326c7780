"""The run folder: what is locked, refused and recorded before anything is replaced."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers import tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data.prompts import load_prompts
from onpolicy_skd.report.metrics_log import MetricsLog
from onpolicy_skd.run.prepare import Run, check_mask_tokens, check_plugins, open_folder, prepare
from onpolicy_skd.storage import checkpoint
from onpolicy_skd.storage.files import LockedError, lock


def rows(*names):
    return "".join(json.dumps({"question": f"How many {n}?", "answer": f"Some. #### {len(n)}"}) + "\n" for n in names)


@pytest.fixture
def jsonl(tmp_path):
    (tmp_path / "train.jsonl").write_text(rows("pens", "cards", "eggs"))
    return {"source": "jsonl", "train_file": tmp_path / "train.jsonl"}


def make(tmp_path, data, **sections):
    run = {"dir": tmp_path / "runs", "trackers": [], **sections.pop("run", {})}
    return prepare(tiny_settings(data=data, run=run, **sections))


def interrupted_run(tmp_path, data, steps=(5, 10)):
    """A run with metrics of 12 steps and checkpoints after ``steps``."""
    run = make(tmp_path, data)
    with open_folder(run) as loaded:
        assert loaded is None
        log = MetricsLog(run.folder)
        for step in range(12):
            log.write({"step": step, "loss": 1.0})
        log.close()
        for step in steps:
            checkpoint.save(run.paths.checkpoints, step, {"version": step}, {"a": torch.ones(500)}, keep=2)
    return run


def contents(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_a_run_resumes_from_its_newest_checkpoint(tmp_path, jsonl):
    interrupted_run(tmp_path, jsonl)
    with open_folder(make(tmp_path, jsonl, resume="auto")) as loaded:
        assert (loaded.step, loaded.state) == (10, {"version": 10})
    with pytest.raises(ConfigError, match="already holds a run"), open_folder(make(tmp_path, jsonl)):
        pass


def test_a_second_process_is_refused_before_anything_is_replaced(tmp_path, jsonl):
    run = interrupted_run(tmp_path, jsonl)
    before = contents(run.folder)
    hold = "import sys, time; from pathlib import Path; from onpolicy_skd.storage.files import lock\n"
    hold += "with lock(Path(sys.argv[1]), 'it'): print('held', flush=True); time.sleep(99)"
    command = [sys.executable, "-c", hold, str(run.paths.lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for resume in ("auto", "never"):
            with (
                pytest.raises(LockedError, match=rf"run\.name=run: .* in use by process {process.pid} on "),
                open_folder(make(tmp_path, jsonl, resume=resume)),
            ):
                pass
        process.kill()
    assert contents(run.folder) == before
    with open_folder(make(tmp_path, jsonl, resume="auto")) as loaded:  # its lock ended with it
        assert loaded.step == 10
        assert run.paths.lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(LockedError), lock(run.paths.lock, "the run"):
            pass


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
def test_a_run_without_a_readable_checkpoint_does_not_start_over(tmp_path, jsonl, name):
    run = interrupted_run(tmp_path, jsonl)
    for folder in run.paths.checkpoints.iterdir():
        os.truncate(folder / name, 1000 if name == checkpoint.TENSORS else 10)
    metrics = run.paths.metrics.read_bytes()
    for _ in range(2):  # the second time they are known to be damaged
        with (
            pytest.raises(
                ConfigError, match=r"nothing readable, 2 damaged checkpoints.*another run\.name.*resume=never"
            ),
            open_folder(make(tmp_path, jsonl, resume="auto")),
        ):
            pass
        assert run.paths.metrics.read_bytes() == metrics


def test_a_readable_checkpoint_behind_a_damaged_one_is_used(tmp_path, jsonl):
    run = interrupted_run(tmp_path, jsonl)
    os.truncate(run.paths.checkpoints / "step-00000010" / checkpoint.TENSORS, 1000)
    with open_folder(make(tmp_path, jsonl, resume="auto")) as loaded:
        assert loaded.step == 5


def test_a_run_before_its_first_checkpoint_starts_over_and_says_so(tmp_path, jsonl):
    interrupted_run(tmp_path, jsonl, steps=())
    said = []
    with open_folder(make(tmp_path, jsonl, resume="auto"), said.append) as loaded:
        assert loaded is None
    assert said == [f"resume: no checkpoint in {tmp_path / 'runs' / 'run' / 'checkpoints'} yet; the run starts over"]


HARMLESS = {
    "learner": {"tokens_per_micro_batch": 4096, "ranks": 2, "threads": 1},
    "teacher": {"tokens_per_batch": 4096, "actors": 2},
    "rollout": {"max_sequences": 8, "actors": 2, "gpu_memory": 0.5, "kv_cache_mib": 64},
    "student": {"activation_checkpointing": True},
    "sync": {"max_gap": 1.0},
    "run": {"steps": 99, "checkpoint_every": 3, "max_hours": 1.0},
    "alignment": {"chunk_rows": 16},
    "pipeline": {"packing": True, "streaming": True},
    "eval": {"problems": 3},
    "faults": {"restarts": 1},
}


def test_settings_that_cost_memory_or_time_may_change_and_are_recorded(tmp_path, jsonl):
    run = interrupted_run(tmp_path, jsonl)
    said = []
    with open_folder(make(tmp_path, jsonl, resume="auto", **HARMLESS), said.append) as loaded:
        assert loaded.step == 10
    (change,) = json.loads(run.paths.record.read_text())["changes"]
    assert change["step"] == 10
    assert change["changed"]["learner.tokens_per_micro_batch"] == [8192, 4096]
    assert change["changed"]["run.steps"] == [None, 99]
    assert "resume: rollout.max_sequences is 8 from here on, was 64" in said
    with open_folder(make(tmp_path, jsonl, resume="auto")):
        pass
    assert [c["changed"]["run.steps"] for c in json.loads(run.paths.record.read_text())["changes"]] == [
        [None, 99],
        [99, None],
    ]


def test_what_changes_the_result_is_refused_unless_named(tmp_path, jsonl):
    run = interrupted_run(tmp_path, jsonl)
    before = contents(run.folder)
    sections = {"learner": {"lr": 0.5, "clip": 9.0}, "resume": "auto"}
    refused = pytest.raises(ConfigError, match=r"learner\.lr: 1e-05 then, 0\.5 now\).*resume_with=\[learner\.lr\]")
    with refused, open_folder(make(tmp_path, jsonl, resume_with=["learner.clip"], **sections)):
        pass
    assert contents(run.folder) == before
    for names in (["learner.clip", "learner.lr"], ["learner"]):
        with open_folder(make(tmp_path, jsonl, resume_with=names, **sections)) as loaded:
            assert loaded.step == 10


@pytest.mark.parametrize(
    "changed", [("pens", "cards", "eggs", "books"), ("cards", "pens", "eggs"), ("pens", "cards", "egg")]
)
def test_changed_data_is_refused_unless_named(tmp_path, jsonl, changed):
    run = interrupted_run(tmp_path, jsonl)
    before = contents(run.folder)
    jsonl["train_file"].write_text(rows(*changed))
    refused = pytest.raises(ConfigError, match=r"training data .* has changed since its start.*resume_with=\[data\]")
    with refused, open_folder(make(tmp_path, jsonl, resume="auto")):
        pass
    assert contents(run.folder) == before
    with open_folder(make(tmp_path, jsonl, resume="auto", resume_with=["data"])) as loaded:
        assert loaded.step == 10
    assert "data" in json.loads(run.paths.record.read_text())["changes"][0]["changed"]


def test_the_same_data_may_lie_elsewhere(tmp_path, jsonl):
    interrupted_run(tmp_path, jsonl)
    jsonl["train_file"] = jsonl["train_file"].rename(tmp_path / "moved.jsonl")
    with open_folder(make(tmp_path, jsonl, resume="auto")) as loaded:
        assert loaded.step == 10


def test_changed_references_and_held_out_text_are_changed_data(tmp_path, jsonl):
    def digest(**sections):
        return make(tmp_path, **{"data": jsonl, "mode": "off_policy", **sections}).data_digest

    first = digest()
    assert digest() == first
    jsonl["train_file"].write_text(jsonl["train_file"].read_text().replace("Some.", "All."))
    assert digest() != first
    (tmp_path / "a.txt").write_text("Ann has 12 pens. " * 20)
    text = {"source": "text", "train_file": tmp_path / "a.txt", "sequence_length": 8}
    first = digest(data=text)
    assert digest(data=text, eval={"divergence_prompts": 2}) != first
    (tmp_path / "a.txt").write_text("Ann has 13 pens. " * 20)
    assert digest(data=text) != first


def test_a_folder_that_cannot_be_written_is_named(tmp_path, jsonl):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"run\.dir=.*runs: .* cannot be written"), open_folder(make(tmp_path, jsonl)):
        pass


def test_seeds_depend_on_questions_not_on_where_they_were_read(tmp_path, jsonl):
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text(jsonl["train_file"].read_text())
    (hub / "test.jsonl").write_text(rows("x"))
    runs = [make(tmp_path, data) for data in (jsonl, {"source": "hub", "name": str(hub)})]
    requests = [run.requests(run.train, 0) for run in runs]
    assert requests[0] == requests[1]
    assert [p.row for p in runs[0].train] == ["train.jsonl#1", "train.jsonl#2", "train.jsonl#3"]
    assert len({r.seed for r in requests[0]}) == len(requests[0])


def test_the_length_limit_of_rollouts_grows_to_its_maximum(jsonl, tmp_path):
    run = make(tmp_path, jsonl, rollout={"max_tokens": 100, "max_tokens_start": 10, "max_tokens_steps": 4})
    assert [run.max_tokens(step) for step in range(6)] == [10, 32, 55, 77, 100, 100]
    assert [run.sampling_at(step).max_tokens for step in (0, 9)] == [10, 100]
    assert run.sampling.max_tokens == run.greedy.max_tokens == 100
    fixed = make(tmp_path, jsonl, rollout={"max_tokens": 100})
    assert [fixed.max_tokens(step) for step in (0, 9)] == [100, 100]


def test_two_rows_with_one_question_have_different_keys(jsonl, tmp_path):
    jsonl["train_file"].write_text(rows("pens", "pens", "cards"))
    run = make(tmp_path, jsonl)
    assert len({p.key for p in run.train}) == 3
    assert isinstance(run, Run)
    assert [p.key for p in run.train] == [p.key for p in load_prompts(run.settings.data, run.tokenizer, "train")]


def test_a_metric_that_looks_at_the_whole_batch_is_refused_with_streaming(tmp_path, monkeypatch):
    (tmp_path / "user_ranges.py").write_text(
        "from onpolicy_skd.selection.metrics import scaled_over_batch\n"
        "@scaled_over_batch('kl_N')\ndef score(signals):\n    return signals.scaled('kl_N')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    positions, pipeline = {"metric": "user_ranges:score"}, {"streaming": True}
    with pytest.raises(ConfigError, match=r"pipeline\.streaming: positions\.metric=user_ranges:score looks at the"):
        check_plugins(tiny_settings(positions=positions, pipeline=pipeline))
    check_plugins(tiny_settings(positions=positions))
    check_plugins(tiny_settings(pipeline=pipeline))


def test_masked_tokens_must_be_tokens():
    check_mask_tokens(tiny_settings(positions={"mask_tokens": ["special", 9]}), 10)
    with pytest.raises(ConfigError, match=r"positions\.mask_tokens=\[10\]: 10 is no token; accepted: ids below 10"):
        check_mask_tokens(tiny_settings(positions={"mask_tokens": [10]}), 10)
