"""Losses of five short runs against recorded ones: a change of structure must leave them equal bit for bit.

Record them again after a change that alters the computation:
``PYTHONPATH=tests python -m tests.integration.test_recorded_losses --write``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from ray_helpers import ray_cluster

from onpolicy_skd import cache, train

pytestmark = pytest.mark.slow

RECORD = Path(__file__).with_name("recorded_losses.json")
DEMO = ROOT / "configs" / "demo.yaml"
STEPS = 5
METRICS = {"loss": "loss", "divergence": "divergence_selected"}  # name here: name in metrics.jsonl
SETTINGS = [
    "run.device=cpu", f"run.steps={STEPS}", "run.evaluate_every=0", "run.checkpoint_every=0", "run.trackers=[]",
    "data.train_problems=200", "learner.batch_size=8", "learner.threads=1", "teacher.threads=1", "rollout.threads=1",
    "rollout.engine=transformers", "eval.problems=1", "eval.before=false", "eval.teacher=false",
]  # fmt: skip
OFF_POLICY = ["mode=off_policy", "samples.keep=0.2", "samples.when=prefilter", "samples.prefilter_text=prompt+answer",
              "classes.sampler=rs_kd", "classes.draws=64", "rollout.placement=learner",
              "rollout.threads=null"]  # fmt: skip
RUNS = {
    "on_policy": [],
    "off_policy_from_cache": OFF_POLICY,
    "mixed": ["mode=mixed"],
    "streaming": ["pipeline.streaming=true", "rollout.actors=1"],  # a second actor would make the order vary
    "two_ranks": ["learner.ranks=2"],
}


def run_losses(name: str, folder: Path, address: str) -> dict[str, list[float]]:
    """Train the run ``name`` in ``folder`` and return its loss and divergence per step."""
    arguments = ["--config", str(DEMO), *SETTINGS, f"run.dir={folder}", f"run.name={name}",
                 f"cluster.address={address}", *RUNS[name]]  # fmt: skip
    if name == "off_policy_from_cache":
        arguments.append(f"cache.path={folder / 'cache'}")
        assert cache.main(["build", *arguments]) == 0
    assert train.main(arguments) == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(STEPS))
    return {key: [record[metric] for record in steps] for key, metric in METRICS.items()}


def arithmetic() -> dict[str, str]:
    """Return what decides about the last bits of a result: MKL has other kernels on other processors."""
    info = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if sys.platform == "linux" else ""
    fields = dict(map(str.strip, line.split(":", 1)) for line in info.splitlines() if ":" in line)
    processor = " ".join(fields.get(name, "unknown") for name in ("vendor_id", "cpu family", "model"))
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu_capability": capability, "processor": processor}


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_the_recorded_ones(name, address, tmp_path):
    recorded = json.loads(RECORD.read_text())
    exact = recorded["arithmetic"] == arithmetic()
    for key, values in run_losses(name, tmp_path, address).items():
        expected = recorded["runs"][name][key]
        assert values == (expected if exact else pytest.approx(expected, rel=1e-4)), key


def write() -> None:
    """Record the losses of all runs in ``recorded_losses.json``."""
    with tempfile.TemporaryDirectory() as name, ray_cluster() as address:
        runs = {run: run_losses(run, Path(name), address) for run in RUNS}
    RECORD.write_text(json.dumps({"arithmetic": arithmetic(), "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record the losses of short runs again.")
    parser.add_argument("--write", action="store_true", required=True, help=f"write {RECORD.name} again")
    parser.parse_args()
    write()
