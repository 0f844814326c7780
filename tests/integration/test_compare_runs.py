"""A comparison as its user runs it: killed, started again, one row broken, and the report at the end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers import ROOT

from actors.cluster import is_loopback

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}


def write_grid(folder, **changes):
    tree = {
        "base": str(ROOT / "configs" / "demo.yaml"), "dir": str(folder / "out"), "seeds": [1], "baseline": "Full KD",
        "settings": {
            "run": {"steps": 3, "evaluate_every": 0, "checkpoint_every": 1, "trackers": []},
            "data": {"train_problems": 64}, "learner": {"batch_size": 8},
            "rollout": {"engine": "transformers"}, "teacher": {"placement": "learner"},
            "eval": {"problems": 20, "before": False, "teacher": False},
        },
        "rows": [
            {"name": "Full KD", "modes": ["off_policy"], "settings": {"positions": {"policy": "full"}}},
            {"name": "TRL", "trainer": "trl", "modes": ["on_policy"],
             "settings": {"positions": {"policy": "full"}, "samples": {"truncated": "keep"}}},
        ],
        **changes,
    }  # fmt: skip
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(path, *arguments):
    return [sys.executable, "-m", "onpolicy_skd.compare", "--config", str(path), *arguments]


def compare(path, *arguments):
    done = subprocess.run(
        command(path, *arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=900,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def table(folder):
    record = json.loads((folder / "out" / "results.json").read_text())
    return [{k: r[k] for k in ("row", "mode", "seeds", "exact_match", "strict", "difference")} for r in record["rows"]]


@pytest.mark.slow
def test_the_command_of_the_readme_runs_where_no_ray_is_running(tmp_path):
    """The child joins the private Ray of the comparison, also on a host with a network address."""
    tree = yaml.safe_load((ROOT / "configs" / "compare_demo.yaml").read_text())
    settings = tree["settings"] | {"data": {"train_problems": 64, "validation_problems": 4}}
    settings["eval"] |= {"problems": 4, "divergence_prompts": 2}
    row = tree["rows"][0] | {"modes": ["on_policy"]}
    path = tmp_path / "grid.yaml"
    base = str(ROOT / "configs" / tree["base"])
    path.write_text(yaml.safe_dump(tree | {"base": base, "settings": settings, "rows": [row]}))
    code, printed = compare(path, "--parallel", "1", "seeds=[1340]", "settings.run.steps=3", f"dir={tmp_path / 'out'}")
    assert code == 0, printed
    assert "2 of 2 runs to do, 1 at a time" in printed
    assert "2/2 full_kd-on_policy-1340: exact match" in printed
    assert "have not finished" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1:6379", True), ("localhost:6379", True), ("[::1]:6379", True), ("127.8.0.1:1", True),
     ("10.0.0.7:6379", False), ("head:6379", False), ("auto", False), ("ray://head:10001", False)],
)  # fmt: skip
def test_a_loopback_address_is_dialed_as_it_is(address, loopback):
    assert is_loopback(address) == loopback


@pytest.mark.slow
def test_a_killed_comparison_continues_and_ends_with_the_same_table(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    code, said = compare(write_grid(undisturbed))
    assert code == 0, said
    assert "3 of 3 runs to do" in said
    process = subprocess.Popen(
        command(write_grid(killed), "--parallel", "1"), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    for line in process.stdout:
        if line.startswith("1/3"):
            break
    time.sleep(5)  # in the middle of the next one
    process.kill()
    process.communicate()
    time.sleep(20)  # its run stops with a checkpoint, or has ended
    kept = [
        p for p in (killed / "out" / "runs").glob("*/summary.json") if json.loads(p.read_text())["status"] == "finished"
    ]
    times = {p: p.stat().st_mtime_ns for p in kept}
    assert 1 <= len(kept) < 3
    code, said = compare(write_grid(killed))
    assert code == 0, said
    assert f"{3 - len(kept)} of 3 runs to do" in said
    assert {p: p.stat().st_mtime_ns for p in kept} == times  # finished runs are not repeated
    assert table(killed) == table(undisturbed)
    page = (undisturbed / "out" / "report.md").read_text()
    assert "Untrained student" in page
    assert "teacher 100.0" in page


@pytest.mark.slow
def test_a_failed_run_is_reported_and_tried_again_when_asked(tmp_path):
    path = write_grid(tmp_path, rows=[{"name": "Full KD", "modes": ["off_policy"]}])
    blocked = tmp_path / "out" / "runs" / "full_kd-off_policy-1"
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("a file where a folder must be")
    code, said = compare(path)
    assert code == 1
    assert "full_kd-off_policy-1: " in said
    assert "--retry tries those that failed again" in said
    assert "1 of 2 runs have not finished" in (tmp_path / "out" / "report.md").read_text()
    (blocked / "checkpoints").unlink()
    code, said = compare(path, "--retry")
    assert code == 0, said
    assert "1 of 2 runs to do" in said


@pytest.mark.slow
def test_an_interrupted_comparison_stops_its_runs_with_a_checkpoint(tmp_path):
    """A second comparison in its folder is refused while it runs."""
    row = {"name": "SE-KD", "modes": ["on_policy"]}
    path = write_grid(tmp_path, baseline="SE-KD", rows=[row])
    options = ("settings.run.steps=400", "settings.run.checkpoint_every=0")
    process = subprocess.Popen(
        command(path, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    metrics = tmp_path / "out" / "runs" / "se_kd-on_policy-1" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 1' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    code, said = compare(path, *options)
    assert code == 2
    assert f"dir={tmp_path / 'out'} is in use by process {process.pid}" in said
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, out + err
    assert "SIGINT: stopped; the same command continues" in err
    assert "Traceback" not in err
    summary = json.loads((metrics.parent / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 2 <= summary["steps"] < 400
    assert (metrics.parent / "checkpoints" / f"step-{summary['steps']:08d}").is_dir()
