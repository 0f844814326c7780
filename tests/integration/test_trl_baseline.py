"""TRL's trainer as a row of a comparison: same prompts, optimizer and run folder; refusal of what it cannot do."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest
from helpers import ROOT, tiny_settings

from onpolicy_skd.comparison import grid as comparison
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.validation import check_trl
from onpolicy_skd.models.loading import resolve_path
from onpolicy_skd.report.metrics_log import MetricsLog, read
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.types import Trajectory

OPTIONS = [
    "data.source=demo", "data.max_prompt_tokens=96", "data.train_problems=40", "student.model=bundled:demo_student",
    "teacher.model=bundled:demo_teacher", "teacher.dtype=float32", "rollout.max_tokens=32", "rollout.dtype=float32",
    "rollout.engine=transformers", "positions.policy=full", "samples.truncated=keep",
    "learner.batch_size=4", "learner.compute_dtype=float32",
    "learner.lr=1e-4", "run.trackers=[]", "run.device=cpu", "run.checkpoint_every=2", "run.steps=4",
    "eval.problems=4", "eval.teacher=false", "eval.before=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def trl_baseline():
    """The module under test; TRL takes seconds to import, which every process would spend to list the tests."""
    from eval import trl_baseline

    return trl_baseline


def losses(folder):
    return [r["loss"] for r in read(folder / "metrics.jsonl") if "loss" in r]


def test_a_students_generation_settings_do_not_count(trl_baseline, tmp_path):
    """Only its end tokens: a repetition penalty and a cut of the distribution would change what is trained on."""
    hostile = tmp_path / "student"
    shutil.copytree(resolve_path("bundled:demo_student"), hostile)
    settings = {"do_sample": True, "repetition_penalty": 1.5, "top_k": 2, "eos_token_id": 1}
    (hostile / "generation_config.json").write_text(json.dumps(settings))
    options = [*OPTIONS, f"run.dir={tmp_path}", "run.steps=2"]
    assert trl_baseline.main([*options, "run.name=plain"]) == 0
    assert trl_baseline.main([*options, "run.name=hostile", f"student.model={hostile}"]) == 0
    assert losses(tmp_path / "hostile") == losses(tmp_path / "plain")
    saved = json.loads((tmp_path / "hostile" / "final" / "generation_config.json").read_text())
    assert saved["repetition_penalty"] == 1.5


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_losses_and_writes_a_run_folder(trl_baseline, tmp_path, monkeypatch):
    options = [*OPTIONS, f"run.dir={tmp_path}"]
    seen = []
    tokenize = trl_baseline.Trainer._tokenize_prompts

    def spy(self, prompts):
        seen.extend(tokenize(self, prompts)[0])
        return tokenize(self, prompts)

    monkeypatch.setattr(trl_baseline.Trainer, "_tokenize_prompts", spy)
    assert trl_baseline.main([*options, "run.name=complete"]) == 0
    complete = losses(tmp_path / "complete")
    assert len(complete) == 4
    run = prepare(trl_baseline.load_settings([*options, "run.name=complete"]))
    assert seen == [r.prompt_ids for step in range(4) for r in run.requests(run.train, step)]  # our order
    summary = json.loads((tmp_path / "complete" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["problems"]) == ("finished", 4, 4)
    assert (tmp_path / "complete" / "final" / "model.safetensors").exists()
    steps = [r for r in read(tmp_path / "complete" / "metrics.jsonl") if "loss" in r]
    for r in steps:
        assert r["positions"] <= 4 * 32
        assert r["train_tokens"] > r["positions"]
        assert r["seconds"]["step"] > 0

    class StopsAfterThree(trl_baseline.Recorder):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 3:
                self._stop.request("enough")
            super().on_step_end(args, state, control, **given)

    with monkeypatch.context() as patch:
        patch.setattr(trl_baseline, "Recorder", StopsAfterThree)
        assert trl_baseline.main([*options, "run.name=cut"]) == 3
    assert losses(tmp_path / "cut") == complete[:3]
    assert trl_baseline.main([*options, "run.name=cut", "resume=auto"]) == 0
    assert losses(tmp_path / "cut") == pytest.approx(complete, rel=1e-5)
    tokens = [
        [r["train_tokens"] for r in read(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in ("cut", "complete")
    ]
    assert tokens[0] == tokens[1]
    (tmp_path / "cut" / "checkpoints" / "checkpoint-9").mkdir()  # what a kill while saving leaves
    assert trl_baseline.newest(tmp_path / "cut" / "checkpoints").name == "checkpoint-4"


def test_settings_without_a_counterpart_in_trl_are_refused():
    full = {"positions": {"policy": "full"}, "samples": {"truncated": "keep"}}
    check_trl(tiny_settings(**full))
    with pytest.raises(ConfigError, match=r"positions.policy=top_k: TRL's DistillationTrainer .* accepted: full"):
        check_trl(tiny_settings(samples={"truncated": "keep"}))
    with pytest.raises(ConfigError, match="mode=off_policy"):
        check_trl(tiny_settings(mode="off_policy", **full))
    with pytest.raises(ConfigError, match=r"one temperature; accepted: 1.0"):
        check_trl(tiny_settings(alignment={"temperature": 2.0}, **full))
    with pytest.raises(ConfigError, match=r"hub.push=me/pair: .* not uploaded; accepted: null"):
        check_trl(tiny_settings(hub={"push": "me/pair"}, **full))


def test_a_grid_refuses_such_a_row_by_name(tmp_path):
    grid = {
        "base": str(ROOT / "configs" / "demo.yaml"), "dir": str(tmp_path), "seeds": [1],
        "baseline": "TRL", "rows": [{"name": "TRL", "trainer": "trl", "modes": ["on_policy"], "settings": {}}],
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    with pytest.raises(ConfigError, match=r"row 'TRL', on_policy: positions.policy=top_k"):
        comparison.load(tmp_path / "grid.yaml")


class WritesOneToken:
    def load_weights(self, weights, version):
        pass

    def stream(self, requests, sampling):
        for r in requests:
            yield Trajectory(r.key, np.array(r.prompt_ids), np.array([9, 1]), np.zeros(2, np.float32), "stop", 0)


def test_the_users_judge_decides_where_the_data_has_no_answer(trl_baseline, tmp_path, monkeypatch):
    (tmp_path / "judge_of_trl.py").write_text("def right(output, columns):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    eval_cfg = {"judge": "judge_of_trl:right"}
    run = prepare(tiny_settings(run={"dir": tmp_path}, rollout={"engine": "transformers"}, eval=eval_cfg))
    run.folder.mkdir()
    metrics = MetricsLog(run.folder, 0)
    recorder = trl_baseline.Recorder(run, metrics, None, types.SimpleNamespace(named_parameters=dict))
    recorder._engine = WritesOneToken()
    recorder.evaluate("after", 2, [dataclasses.replace(p, answer="") for p in run.held_out[:2]])
    metrics.close()
    assert recorder.evaluations["after"]["match"]["share"] == 1.0
