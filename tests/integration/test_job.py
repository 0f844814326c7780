"""`ray job submit` and `ray job stop` on a one-node cluster with token authentication.  Minutes: `make test-slow`."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import ROOT

RAY = str(Path(sys.executable).parent / "ray")
SMALL = [
    "--config", "configs/demo.yaml", "learner.batch_size=8", "rollout.engine=transformers", "eval.teacher=false",
    "eval.before=false", "eval.problems=8", "run.evaluate_every=0", "run.trackers=[]",
]  # fmt: skip
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """Start a Ray head for this module; yield a function that runs `ray job ...` against it.

    Where another Ray runs on the machine, its agent has the default port, and jobs would join the Ray that was started
    last: hence a port and a folder for this one.
    """
    dashboard, folder = free_port(), tempfile.mkdtemp()  # short: sockets lie in it
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--port", str(free_port()), "--node-ip-address", "127.0.0.1",
         "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--num-cpus", "2",
         "--dashboard-agent-listen-port", str(free_port()), "--temp-dir", folder],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def job(*arguments, timeout=400):
        command = [RAY, "job", arguments[0], "--address", f"http://127.0.0.1:{dashboard}", *arguments[1:]]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout, cwd=ROOT, check=False
        )

    deadline = time.monotonic() + 120
    while (tried := job("submit", "--no-wait", "--", "true")).returncode != 0:  # the head is up before its job agent
        assert time.monotonic() < deadline, tried.stdout + tried.stderr
        time.sleep(2)
    yield job
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def submit(job, folder, *overrides, wait=True):
    options = [] if wait else ["--no-wait", "--submission-id", folder.name]
    return job("submit", *options, "--working-dir", ".", "--", "python", "-m", "onpolicy_skd.train", *SMALL,
               f"run.dir={folder}", "run.name=r", *overrides)  # fmt: skip


def test_a_submitted_job_runs_to_its_end(cluster, tmp_path):
    done = submit(cluster, tmp_path, "run.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished after 2 steps" in done.stdout
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "finished"


def test_a_jobs_bad_setting_fails_the_job_with_one_error(cluster, tmp_path):
    done = submit(cluster, tmp_path, "learner.lrr=2")
    assert done.returncode != 0
    assert "unknown setting 'learner.lrr'" in done.stdout + done.stderr


def test_job_stop_leaves_a_checkpoint_that_resumes(cluster, tmp_path):
    folder = tmp_path / "stopped"
    assert submit(cluster, folder, "run.steps=300", wait=False).returncode == 0
    deadline = time.monotonic() + 400
    while "step 2/" not in cluster("logs", "stopped").stdout:
        assert time.monotonic() < deadline, cluster("logs", "stopped").stdout
        time.sleep(2)
    assert cluster("stop", "stopped").returncode == 0
    printed = cluster("logs", "stopped").stdout
    assert "SIGTERM: ending after this step" in printed
    summary = json.loads((folder / "r" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert (folder / "r" / "checkpoints" / f"step-{summary['steps']:08d}" / "state.json").exists()
