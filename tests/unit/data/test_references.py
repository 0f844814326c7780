"""Responses the student did not write: where they come from, and what a step makes of them."""

import json
from collections import Counter

import pytest
from helpers import tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data import references
from onpolicy_skd.data.prompts import load_prompts
from onpolicy_skd.data.references import Response
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.run.prepare import Run, prepare
from onpolicy_skd.types import Trajectory


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled:demo_student")


def off(**sections):
    return tiny_settings(**{"mode": "off_policy", "data": {"train_problems": 8}, **sections})


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_reference_answers_end_with_the_end_of_sequence_and_may_lose_their_annotations(tokenizer):
    for annotations in ("keep", "strip"):
        run = prepare(off(references={"annotations": annotations}))
        assert len(run.train) == 8
        for prompt in run.train:
            (response,) = run.responses[prompt.key]
            assert response.ids[-1] == tokenizer.eos_token_id
            assert ("<<" in text_of(tokenizer, response.ids)) == (annotations == "keep")
            if annotations == "keep":
                assert text_of(tokenizer, response.ids) == prompt.answer


def test_real_annotations_are_stripped_and_nothing_else(gsm8k, tokenizer):
    settings = tiny_settings(
        data={"source": "gsm8k", "path": gsm8k, "max_prompt_tokens": 2000}, mode="off_policy",
        rollout={"max_tokens": 2000}, references={"annotations": "strip"},
    )  # fmt: skip
    prompts = load_prompts(settings.data, tokenizer, "train", 200)
    _, responses = references.from_text(settings, prompts, tokenizer)
    for prompt in prompts:
        assert references.ANNOTATION.sub("", prompt.answer).count("####") == 1
        assert "<<" not in references.ANNOTATION.sub("", prompt.answer)
        assert len(responses[prompt.key]) == 1


def test_long_answers_are_refused_or_dropped_by_row():
    with pytest.raises(ConfigError, match=r"demo:train#1: its reference answer has \d+ tokens, rollout.max_tokens=9"):
        prepare(off(rollout={"max_tokens": 9}))
    with pytest.raises(ConfigError, match=r"no prompt has a reference answer of rollout\.max_tokens=9"):
        prepare(off(rollout={"max_tokens": 9}, data={"train_problems": 8, "overlong": "drop"}))
    kept = prepare(off(rollout={"max_tokens": 60}, data={"train_problems": 50, "overlong": "drop"})).train
    assert 0 < len(kept) < 50


def test_a_file_may_bring_several_answers_to_a_question(tmp_path, tokenizer):
    prompts = load_prompts(off().data, tokenizer, "train")
    file = tmp_path / "answers.jsonl"
    rows = [{"question": p.question, "answer": f"Answer {i}.\n#### {i}"} for p in prompts[:3] for i in range(2)]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"question": "another", "answer": "x"}]))
    section = {"source": "file", "file": file}
    run = prepare(off(references=section, data={"train_problems": 8, "overlong": "drop"}))
    assert [p.key for p in run.train] == [p.key for p in prompts[:3]]
    assert [text_of(tokenizer, r.ids) for r in run.responses[prompts[0].key]] == [
        "Answer 0.\n#### 0",
        "Answer 1.\n#### 1",
    ]
    used = Counter(t.response_ids.tobytes() for step in range(40) for t in run.references(run.train[:1], step))
    assert len(used) == 2
    with pytest.raises(ConfigError, match=rf"{prompts[3].row}: its reference answer has no row in .*answers.jsonl"):
        prepare(off(references=section))
    file.write_text('{"question": "q"}\n')
    with pytest.raises(ConfigError, match="row 1: column 'answer' is missing"):
        prepare(off(references=section))


def test_question_tokens_are_supervised_only_if_asked_for(tokenizer):
    for supervise in ("response", "all"):
        run = prepare(off(references={"supervise": supervise}))
        for t in run.references(run.train, 0):
            prompt = next(p for p in run.train if p.key == t.prompt_key.partition(":")[2])
            (response,) = run.responses[prompt.key]
            assert [*t.prompt_ids, *t.response_ids] == [*prompt.token_ids, *response.ids]
            assert len(t.prompt_ids) == (len(prompt.token_ids) if supervise == "response" else 1)
            assert t.policy_version is None


def test_a_mixed_step_has_both_and_no_prompt_twice():
    settings = tiny_settings(mode="mixed", rollout={"n": 2, "share": 0.5}, learner={"batch_size": 10},
                             data={"train_problems": 40})  # fmt: skip
    run = prepare(settings)
    requests, others = run.requests(run.train, 3), run.references(run.train, 3)
    assert (len(requests), len(others)) == (5, 5)
    rolled_out = {r.key.rpartition("/")[0] for r in requests}
    assert len(rolled_out) == 3
    assert not rolled_out & {t.prompt_key for t in others}


class FakeTeacher:
    """Answers with two tokens; every third answer is cut off."""

    def __init__(self, fail_after=None):
        self.asked, self.seeds, self._fail_after = [], [], fail_after

    def __call__(self, requests):
        if self._fail_after is not None and len(self.asked) >= self._fail_after:
            raise RuntimeError("killed")
        self.asked += [r.key for r in requests]
        self.seeds += [r.seed for r in requests]
        ids = [references.np.array([5, 1]) for _ in requests]
        reasons = ["length" if r.seed % 3 == 0 else "stop" for r in requests]
        answers = zip(requests, ids, reasons, strict=True)
        return [Trajectory(r.key, references.np.array(r.prompt_ids), i, None, f, 0) for r, i, f in answers]


def test_the_teachers_answers_are_made_once_and_go_on_after_a_kill(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(references, "BATCH", 3)
    settings = off(references={"source": "teacher", "samples": 2}, run={"dir": tmp_path})
    prompts = load_prompts(settings.data, tokenizer, "train")
    with pytest.raises(RuntimeError, match="killed"):
        references.generated_responses(settings, prompts, FakeTeacher(fail_after=6), print)
    second, uninterrupted = FakeTeacher(), FakeTeacher()
    kept, answers = references.generated_responses(settings, prompts, second, print)
    assert len(second.asked) == 10  # five prompts were left
    again = references.generated_responses(settings, prompts, FakeTeacher(fail_after=0), print)
    assert again == (kept, answers)
    other = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": tmp_path / "other"})})
    assert references.generated_responses(other, prompts, uninterrupted, print) == (kept, answers)
    assert all(r.finish_reason == "stop" for responses in answers.values() for r in responses)
    (file,) = (tmp_path / "references").glob("*.jsonl")
    file.write_text('{"key": "x"}\n')
    with pytest.raises(ConfigError, match="damaged"):
        references.generated_responses(settings, prompts, second, print)


def test_the_initial_students_answers_are_its_own(tmp_path, tokenizer):
    """Other seeds and another file than a teacher's, even if the teacher is the same model."""
    section = {"source": "student", "temperature": 0.7}
    settings = off(references=section, run={"dir": tmp_path})
    prompts = load_prompts(settings.data, tokenizer, "train")
    student, teacher = FakeTeacher(), FakeTeacher()
    _, answers = references.generated_responses(settings, prompts, student, print)
    itself = {"teacher": {"model": "student"}, "references": section | {"source": "teacher"}}
    references.generated_responses(off(**itself, run={"dir": tmp_path}), prompts, teacher, print)
    assert student.asked == teacher.asked
    assert student.seeds != teacher.seeds
    assert len(list((tmp_path / "references").glob("*.jsonl"))) == 2
    run = Run(settings, tokenizer, 512, prompts, [], answers)
    assert not run.knows_its_texts
    assert all(t.policy_version is None for t in run.every_reference([p for p in prompts if p.key in answers]))


def test_truncated_answers_stay_if_asked_for(tmp_path, tokenizer):
    section = {"source": "teacher"}
    settings = off(references=section, run={"dir": tmp_path}, samples={"truncated": "keep"})
    prompts = load_prompts(settings.data, tokenizer, "train")
    kept, answers = references.generated_responses(settings, prompts, FakeTeacher(), print)
    assert len(kept) == 8
    assert {r.finish_reason for responses in answers.values() for r in responses} == {"stop", "length"}
    run = Run(settings, tokenizer, 512, kept, [], answers)
    assert {t.finish_reason for t in run.references(kept, 0)} <= {"stop", "length"}
    assert isinstance(answers[kept[0].key][0], Response)


def test_nothing_usable_is_an_error(tmp_path, tokenizer):
    settings = off(references={"source": "teacher"}, run={"dir": tmp_path})
    prompts = load_prompts(settings.data, tokenizer, "train")

    def cut(requests):
        return [
            Trajectory(r.key, references.np.array([1]), references.np.array([2]), None, "length", 0) for r in requests
        ]

    with pytest.raises(ConfigError, match="every answer is truncated"):
        references.generated_responses(settings, prompts, cut, print)
