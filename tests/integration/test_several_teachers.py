"""A run with two teachers on two sources: routed, killed and replaced, stopped and resumed."""

import os
import signal

import pytest

from actors.workers import Workers
from onpolicy_skd import train
from onpolicy_skd.report.metrics_log import read

CONFIG = """
data:
  max_prompt_tokens: 96
  mix: [{source: demo, teacher: large}, {source: demo, train_split: test, teacher: same}]
student: {model: "bundled:demo_student"}
teachers:
  large: {model: "bundled:demo_teacher", dtype: float32, tokens_per_batch: 8192}
  same: {model: student, dtype: float32}
  idle: {model: "bundled:demo_teacher", actors: 3}
rollout: {engine: transformers, placement: learner, max_tokens: 64, dtype: float32}
learner: {batch_size: 8, lr: 1.0e-3, tokens_per_micro_batch: 8192, compute_dtype: float32}
sync: {max_gap: 0.01}
run: {trackers: [], checkpoint_every: 1, timeline: null}
eval: {before: false, after: false}
faults: {backoff_seconds: 0}
"""


def steps(folder):
    return [r for r in read(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
def test_teachers_of_both_engines_have_the_first_step_of_transformers_alone(address, tmp_path):
    config, first = tmp_path / "config.yaml", []
    for name, engine in (("both", "vllm"), ("alone", "transformers")):
        config.write_text(CONFIG.replace("tokens_per_batch: 8192}", f"tokens_per_batch: 8192, engine: {engine}}}", 1))
        arguments = ["--config", str(config), f"run.dir={tmp_path}", f"cluster.address={address}"]
        assert train.main([*arguments, f"run.name={name}", "run.steps=1"]) == 0
        first += steps(tmp_path / name)
    for key in ("loss", "divergence_selected/large", "divergence_selected/same"):
        assert first[0][key] == pytest.approx(first[1][key], abs=1e-4)


@pytest.mark.slow
def test_two_teachers_are_routed_replaced_and_resumed(address, tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    arguments = ["--config", str(config), f"run.dir={tmp_path}", f"cluster.address={address}"]
    assert train.main([*arguments, "run.name=whole", "run.steps=4"]) == 0
    first, *_ = steps(tmp_path / "whole")
    assert abs(first["divergence_selected/same"]) < 1e-4  # the student itself
    assert first["divergence_selected/large"] > 0.01
    assert max(r.get("divergence_selected/same", 0) for r in steps(tmp_path / "whole")) > 1e-4  # it has left its start

    encode, pids = Workers.encode, []

    def encode_and_kill(self, kept):
        pids.append([self._groups.place(teacher).pid for teacher in self._groups.teachers])
        if len(pids) == 2:
            os.kill(pids[-1][0], signal.SIGKILL)
        return encode(self, kept)

    monkeypatch.setattr(Workers, "encode", encode_and_kill)
    assert train.main([*arguments, "run.name=disturbed", "run.steps=3"]) == 0
    assert [len(set(actor)) for actor in zip(*pids, strict=True)] == [2, 1]  # replaced, and not; the idle one has none
    assert train.main([*arguments, "run.name=disturbed", "run.steps=4", "resume=auto"]) == 0
    disturbed = steps(tmp_path / "disturbed")
    faults = [r for r in read(tmp_path / "disturbed" / "metrics.jsonl") if r.get("event") == "fault"]
    assert [fault["restarted"] for fault in faults] == [["teacher"]]
    names = ("loss", "divergence_selected/large", "divergence_selected/same")
    undisturbed = steps(tmp_path / "whole")
    assert [[r.get(n) for n in names] for r in disturbed] == [[r.get(n) for n in names] for r in undisturbed]
