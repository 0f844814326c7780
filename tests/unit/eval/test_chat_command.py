"""`skd chat` on the bundled pair: pipes, models to compare with, and the layout in terminals."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, tiny_settings
from rich.console import Console

from eval import chat
from onpolicy_skd.config.loading import dump
from onpolicy_skd.data.demo_task import problems
from onpolicy_skd.evaluation.exact_match import score
from onpolicy_skd.models.loading import ASSETS

PROBLEMS = list(itertools.islice(problems("test"), 2))
COMMAND = [sys.executable, "-m", "eval.chat", "--model", "bundled:demo_student", "--config", "demo", "--alone"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def model(tmp_path):
    """A run whose student has become its teacher."""
    settings = tiny_settings(rollout={"engine": "transformers"}, run={"device": "cpu"})
    (tmp_path / "config.yaml").write_text(dump(settings))
    shutil.copytree(ASSETS / "demo_teacher", tmp_path / "final")
    return str(tmp_path / "final")


@pytest.fixture
def run_chat(monkeypatch, capsys):
    """Return a function that pipes lines into a chat and returns exit code, answers and standard error."""

    def run(text, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = chat.main(arguments)
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def test_a_run_answers_lines_of_a_pipe_with_its_three_models(model, run_chat):
    code, answers, _ = run_chat("\n".join(["", *(p["question"] for p in PROBLEMS), " "]), "--model", model)
    assert code == 0
    assert [a["question"] for a in answers] == [p["question"] for p in PROBLEMS]
    for answer, problem in zip(answers, PROBLEMS, strict=True):
        assert list(answer) == ["question", "before", "after", "teacher"]
        assert score(answer["teacher"], problem["answer"]).match
        assert answer["after"] == answer["teacher"] != answer["before"]


def test_other_models_to_compare_with(model, run_chat):
    question = PROBLEMS[0]["question"]
    _, (run,), _ = run_chat(question, "--model", model)
    _, (answer,), _ = run_chat(question, "--model", model, "--versus", "bundled:demo_student")
    assert answer == {"question": question, "bundled:demo_student": run["before"], model: run["after"]}
    _, (answer,), _ = run_chat(question, "--model", model, "--alone")
    assert answer == {"question": question, model: run["after"]}
    _, (answer,), _ = run_chat(question, "--model", "bundled:demo_student", "--config", "demo", "--alone")
    assert answer == {"question": question, "bundled:demo_student": run["before"]}


def test_a_sampled_answer_is_the_same_each_time_and_other_than_the_greedy_one(run_chat):
    question = PROBLEMS[0]["question"]
    base = ("--model", "bundled:demo_student", "--config", "demo", "--alone")
    greedy, first, second = (run_chat(question, *base, "--temperature", t)[1] for t in ("0", "2", "2"))
    assert first == second != greedy


def test_a_refused_question_does_not_end_the_chat(model, run_chat):
    question = PROBLEMS[0]["question"]
    code, answers, err = run_chat(f"{'long ' * 200}\n{question}", "--model", model, "--alone")
    assert code == 2
    assert [a["question"] for a in answers] == [question]
    assert "error: the prompt has" in err
    assert "data.max_prompt_tokens=96" in err


@pytest.mark.parametrize(
    "errors", [pytest.param("strict", marks=pytest.mark.slow), "surrogateescape"]
)  # as Python reads stdin in different locales
def test_each_line_of_a_pipe_is_answered_before_the_next_is_read_and_other_bytes_are_one_error(errors):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": f"utf-8:{errors}"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(COMMAND, env=environment, **pipes) as process:
        for problem in PROBLEMS:
            process.stdin.write(problem["question"].encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())  # the pipe is still open for more questions
            assert answer["question"] == problem["question"]
        _, err = process.communicate(b"x" * 20_000 + b"\n\xff?\n", timeout=60)
    assert process.returncode == 2, err
    assert err.decode().splitlines()[-1].startswith("error: the questions are not utf-8 text: ")


@pytest.mark.slow
def test_a_chat_ends_when_its_pipe_closes():
    done = subprocess.run(
        COMMAND, env=ENVIRONMENT, input=PROBLEMS[0]["question"].encode(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["question"] == PROBLEMS[0]["question"]


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--model", "bundled:none"], "bundled:none"),
        (["--model", "bundled:demo_student", "--temperature", "-1"], "--temperature -1: accepted"),
        (["--model", "bundled:demo_student", "data.nothing=1"], "data.nothing"),
    ],
)
def test_bad_input_is_one_line(run_chat, arguments, needle):
    code, answers, err = run_chat("a question", *arguments)
    assert (code, answers) == (2, [])
    (line,) = (line for line in err.splitlines() if not line.startswith("loading"))
    assert line.startswith("error: ")
    assert needle in line


ANSWERS = {
    "before": chat.Answer("a [bold]b[/bold] " + "word " * 30 + "\n#### 4", 40, True),
    "after": chat.Answer("x" * 100, 512, False),
    "teacher": chat.Answer("", 1, True),
}


def shown(width, answers=ANSWERS):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(chat.side_by_side(answers, width))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_answers_fit_the_terminal_and_nothing_is_lost(width):
    lines = shown(width)
    assert max(map(len, lines)) == width
    text = "\n".join(lines)
    assert (text.count("word"), text.count("x")) == (30, 100)
    for needle in ("[bold]b[/bold]", "#### 4", "cut at the", "(nothing)"):
        assert needle in text


def test_three_columns_need_sixty_characters():
    assert sum("before" in line and "teacher" in line for line in shown(80)) == 1
    assert not any("before" in line and "teacher" in line for line in shown(40))


def test_answers_appear_as_they_come():
    console = Console(width=80, height=30, file=io.StringIO(), force_terminal=True, color_system=None)
    seen = []

    def answers():
        for answer in ANSWERS.values():
            seen.append(console.file.getvalue().count("#### 4"))
            yield answer

    chat.show(list(ANSWERS), answers(), console)
    assert seen[0] == 0
    assert console.file.getvalue().splitlines()[-len(shown(80)) :][1:3] == shown(80)[1:3]


def test_a_model_cannot_control_the_terminal():
    trajectory = SimpleNamespace(response_ids=np.arange(3), finish_reason="stop")
    engine = SimpleNamespace(generate=lambda requests, sampling: [trajectory])
    tokenizer = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: "a\x1b[2Jb\x07\nc",
        chat_template="x",
        get_chat_template=lambda **_: "x",
        apply_chat_template=lambda *_, **__: [1, 2],
    )
    speaker = chat.Speaker("after", engine, tokenizer)
    answer = speaker.answer("q", tiny_settings(), chat.SamplingParams(8, 0.0))
    assert answer.text == "a\ufffd[2Jb\ufffd\nc"
