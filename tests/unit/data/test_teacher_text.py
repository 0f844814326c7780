"""Prompts that the teacher reads in place of the student's: made from the columns of the data."""

import json

import pytest
from helpers import tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data.prompts import render
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.run.prepare import prepare

TOKENIZER = load_tokenizer("bundled:demo_student")
HINT = "{question}\nHere is a solution: {answer}\nHint: {hint}"


def settings_for(tmp_path, prompt=HINT, rows=None, **sections):
    file = tmp_path / "rows.jsonl"
    rows = rows or [{"q": f"{i}+1?", "answer": f"#### {i + 1}", "hint": "count {on} \\boxed{}"} for i in range(6)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"source": "jsonl", "train_file": file, "question_column": "q", "instruction": " Go."}
    teacher = {"prompt": prompt} if prompt is None else {"prompt": prompt, "max_prompt_tokens": 300}
    tree = {"data": data | sections.pop("data", {}), "teacher": teacher, "run": {"dir": tmp_path}}
    return tiny_settings(**{**tree, **sections})


def test_the_text_takes_the_place_of_the_question(tmp_path):
    """Braces in the data are data, and the instruction and template of the student's prompt stay."""
    run = prepare(settings_for(tmp_path))
    for i, prompt in enumerate(run.train):
        text = f"{i}+1?\nHere is a solution: #### {i + 1}\nHint: count {{on}} \\boxed{{}}"
        assert prompt.teacher_ids == render(text, TOKENIZER, run.settings.data)
        assert prompt.token_ids == render(f"{i}+1?", TOKENIZER, run.settings.data)
        assert TOKENIZER.decode(prompt.teacher_ids).rstrip().endswith(TOKENIZER.decode(prompt.token_ids)[-9:].rstrip())
    requests = run.requests(run.train, 0)
    by_key = {p.key: p for p in run.train}
    assert all(r.teacher_prompt_ids == by_key[r.key.partition(":")[2][:-2]].teacher_ids for r in requests)


def test_the_question_alone_is_the_students_prompt(tmp_path):
    run = prepare(settings_for(tmp_path, "{question}", data={"shots": 2}))
    assert all(p.teacher_ids == p.token_ids for p in run.train)
    plain = prepare(settings_for(tmp_path, None))
    assert all(p.teacher_ids is None for p in plain.train)
    assert all(r.teacher_prompt_ids is None for r in plain.requests(plain.train, 0))


def test_references_and_held_out_problems_have_it_too(tmp_path):
    sections = {"mode": "off_policy", "eval": {"divergence_prompts": 2}, "data": {"validation_problems": 2}}
    run = prepare(settings_for(tmp_path, **sections))
    texts = {p.key: p.teacher_ids for p in [*run.train, *run.validation]}
    assert len(texts) == 6
    for t in [*run.every_reference(run.train), *run.references(run.train, 0)]:
        key = t.prompt_key.rpartition(":")[2]
        assert t.teacher_prompt_ids.tolist() == texts[key]
    assert prepare(settings_for(tmp_path, HINT + "!", **sections)).data_digest != run.data_digest


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "{question} {proof}",
            r"rows.jsonl#1: column 'proof' of teacher.prompt is missing.*has .*\{answer\}",
        ),
        ("{question} {hint}", r"rows.jsonl#4: column 'hint' of teacher.prompt is missing, empty or not text"),
        ("{question} {level}", r"rows.jsonl#1: column 'level' of teacher.prompt is .*not text"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path, prompt, message):
    rows = [{"q": f"{i}?", "answer": "#### 1", "level": 3, "hint": "x" * (i < 3)} for i in range(5)]
    with pytest.raises(DataError, match=message):
        prepare(settings_for(tmp_path, prompt, rows))


def test_long_prompts_of_the_teacher_are_refused_or_dropped(tmp_path):
    rows = [{"q": f"{i}?", "answer": "#### 1", "hint": "2 " * (9 if i else 90)} for i in range(4)]
    teacher = {"prompt": HINT, "max_prompt_tokens": 60}
    with pytest.raises(DataError, match=r"rows.jsonl#1: the teacher's prompt has \d+ tokens, teacher.max_prompt"):
        prepare(settings_for(tmp_path, rows=rows, teacher=teacher))
    settings = settings_for(tmp_path, rows=rows, teacher=teacher, data={"overlong": "drop"})
    assert [p.question for p in prepare(settings).train] == ["1?", "2?", "3?"]
    with pytest.raises(ConfigError, match=r"teacher.tokens_per_batch=100: .*teacher.max_prompt_tokens \+ rollout"):
        settings_for(tmp_path, teacher={"prompt": HINT, "tokens_per_batch": 100})
