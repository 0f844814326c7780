"""A run on a mix of questions and conversations: judged by exact match and by a user's function, killed, resumed."""

import json

import pytest
from helpers import ROOT

from onpolicy_skd import train
from onpolicy_skd.data.demo_task import problems
from onpolicy_skd.report.metrics_log import read

JUDGE = '''
def short(output, columns):
    """Judge an output right if it is no longer than the row allows."""
    return len(output) <= columns["longest"]
'''


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The arguments of a run on the demo task and on conversations made from it, half of them without an answer."""
    (tmp_path / "user_judge.py").write_text(JUDGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    demo, rows = problems("train", seed=5), []
    for number in range(24):
        first, second = next(demo), next(demo)
        roles = {"question": "user", "answer": "assistant"}
        messages = [{"role": roles[name], "content": m[name]} for m in (first, second) for name in roles]
        rows.append({"messages": messages} | ({"answer": second["answer"]} if number % 2 else {"longest": 400}))
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = f"{{source: jsonl, train_file: {file}, eval_file: {file}, messages_column: messages}}"
    mix = f"[{{source: demo, weight: 2}}, {chats}]"
    return [
        "--config", str(ROOT / "configs" / "demo.yaml"), f"data.mix={mix}", "mode=mixed", "data.max_prompt_tokens=360",
        "data.source=gsm8k", "data.train_problems=null", f"run.dir={tmp_path}", "eval.judge=user_judge:short",
        "rollout.engine=transformers", "rollout.placement=learner", "teacher.placement=learner",
        "learner.batch_size=8", "run.trackers=[]", "run.evaluate_every=0", "run.checkpoint_every=2",
        "eval.problems=16", "eval.teacher=false", "eval.before=false", "data.validation_problems=0",
        "eval.divergence_prompts=8", "samples.truncated=keep",
    ]  # fmt: skip


def losses(folder):
    return [(r["loss"], r["positions"], r["grad_norm"]) for r in read(folder / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
def test_a_mix_of_questions_and_conversations_is_trained_on_judged_and_resumed(arguments, address, tmp_path):
    arguments = [*arguments, f"cluster.address={address}"]
    assert train.main([*arguments, "run.name=whole", "run.steps=4"]) == 0
    assert train.main([*arguments, "run.name=resumed", "run.steps=2"]) == 0
    assert train.main([*arguments, "run.name=resumed", "run.steps=4", "resume=auto"]) == 0
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4
    records = [json.loads(r) for r in (tmp_path / "whole/evaluations/after-000004.jsonl").read_text().splitlines()]
    by_judge = [r for r in records if not r["reference"]]
    assert 0 < len(by_judge) < len(records) == 16
    assert all(r["match"] == (len(r["output"]) <= 400) for r in by_judge)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["divergence_reference"]["after"] > 0
