"""Commands of README.md and docs/ that no other test runs, as written but shorter."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
SMALL = [
    "data.train_problems=8", "rollout.engine=transformers", "rollout.max_tokens=128", "learner.batch_size=4",
    "run.trackers=[]", "run.device=cpu", "eval.problems=4", "eval.teacher=false",
]  # fmt: skip


def run(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_short_soak_writes_its_report(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "eval.soak", "--out", "soak", "--steps", "3", "--engine", "transformers", *SMALL],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=False,
    )  # fmt: skip
    report = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert (report["steps"], report["exit"]) == (3, 0)
    assert (tmp_path / "soak" / "soak.png").exists()


@pytest.mark.slow
def test_the_bundled_pair_is_trained_from_scratch(tmp_path):
    run(tmp_path, "onpolicy_skd.data.demo_pair", "--out", "pair", "--only", "student", "--steps", "20")
    assert (tmp_path / "pair" / "student" / "model.safetensors").exists()
    assert (tmp_path / "pair" / "student" / "tokenizer.json").exists()
