"""Verdicts of exact match and of a user's judge."""

import json

import numpy as np
import pytest
from helpers import tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.evaluation.evaluate import evaluate
from onpolicy_skd.evaluation.judge import verdict, with_correctness
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.types import SamplingParams, Trajectory

TOKENIZER = load_tokenizer("bundled:demo_student")
JUDGE = "user_judges:polite"
CODE = """
def polite(output, columns):
    return columns["word"] in output

def broken(output, columns):
    return columns["gone"]
"""


@pytest.fixture(autouse=True)
def user_judges(tmp_path, monkeypatch):
    (tmp_path / "user_judges.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def rows(tmp_path):
    """Settings of a file with a conversation that has an answer and one that has none."""
    rows = [
        {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"},
        {"messages": [{"role": "user", "content": "Thank me."}], "word": "thanks"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "rows.jsonl"
    return {"source": "jsonl", "train_file": file, "eval_file": file, "messages_column": "messages"}


def answer(request, text):
    ids = np.array(TOKENIZER(text)["input_ids"])
    return Trajectory(request.key, np.array(request.prompt_ids), ids, np.zeros(len(ids), np.float32), "stop", 0)


def test_exact_match_where_a_row_has_an_answer_and_the_judge_otherwise(rows):
    run = prepare(tiny_settings(data=rows, eval={"judge": JUDGE}))

    def evaluated(*texts):
        def generate(requests, _):
            return [answer(r, text) for r, text in zip(requests, texts, strict=True)]

        return evaluate(generate, run.held_out, TOKENIZER, SamplingParams(9), judge=run.settings.eval.judge)

    assert [r["match"] for r in evaluated("It is 4", "many thanks").records] == [True, True]
    result = evaluated("thanks", "It is 4")
    assert [(r["match"], r["strict"]) for r in result.records] == [(False, False), (False, False)]
    assert evaluated("thanks", "thanks").result["match"]["share"] == 0.5


def test_a_judge_decides_which_rollouts_are_right(rows):
    run = prepare(tiny_settings(data=rows, eval={"judge": JUDGE}, samples={"correctness": "right"}))
    requests = sorted(run.requests(run.train, 0)[:2], key=lambda r: r.answer or "")
    answers = [answer(requests[0], "thanks"), answer(requests[1], "thanks")]
    assert [t.correct for t in with_correctness(answers, requests, TOKENIZER, judge=JUDGE)] == [True, False]
    assert requests[1].columns is None
    unjudged = prepare(tiny_settings(data=rows, eval={"judge": JUDGE})).requests(run.train, 0)
    assert {(r.answer, r.columns) for r in unjudged} == {(None, None)}


def test_answers_that_nothing_could_judge_are_refused_before_a_model_loads(rows):
    with pytest.raises(DataError, match=r"rows\.jsonl#2: has no reference answer .*eval\.judge=module:function"):
        prepare(tiny_settings(data=rows))
    train_only = rows | {"eval_file": None}
    assert len(prepare(tiny_settings(data=train_only)).train) == 2
    with pytest.raises(DataError, match=r"rows\.jsonl#2: has no reference answer"):
        prepare(tiny_settings(data=train_only, samples={"correctness": "right"}))
    with pytest.raises(ConfigError, match=r"eval\.judge=user_judges:gone: cannot be imported"):
        prepare(tiny_settings(data=rows, eval={"judge": "user_judges:gone"}))
    with pytest.raises(ConfigError, match=r"eval\.judge='polite': not known; accepted: exact_match \| module:function"):
        tiny_settings(eval={"judge": "polite"})


def test_questions_without_an_answer_column(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "Thank me.", "word": "thanks"}\n')
    data = {"source": "jsonl", "train_file": tmp_path / "rows.jsonl", "answer_column": ""}
    run = prepare(tiny_settings(data=data))
    assert [(p.question, p.answer) for p in run.train] == [("Thank me.", "")]
    with pytest.raises(ConfigError, match=r"rows\.jsonl#1: has no reference answer; correct that"):
        prepare(tiny_settings(data=data, mode="off_policy"))


def test_a_judge_that_fails_is_named():
    with pytest.raises(ConfigError, match=r"eval\.judge=user_judges:broken: failed on 'hello': KeyError: 'gone'"):
        verdict("hello", "", {}, "user_judges:broken")
