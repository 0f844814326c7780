"""The command line of exact match: records as they come, continuing after a kill, pass@k."""

import json

import pytest

from eval import gsm8k
from onpolicy_skd.rollout.transformers_engine import TransformersEngine

PROBLEMS = 6


def run(out, *arguments, problems=PROBLEMS):
    options = ["data.source=demo", "data.max_prompt_tokens=96", "rollout.max_tokens=16", "rollout.engine=transformers",
               "rollout.dtype=float32", "run.device=cpu", "rollout.max_sequences=2"]  # fmt: skip
    model = ["--model", "bundled:demo_student", "--problems", str(problems), "--out", str(out)]
    return gsm8k.main([*model, *options, *arguments])


def records(out):
    return [json.loads(line) for line in (out / "records.jsonl").read_text().split("\n")[:-1]]


class Killed(BaseException):
    pass


def kill_after(monkeypatch, answers):
    """Make the engine die after ``answers`` answers, and return the keys it was asked for."""
    asked, stream = [], TransformersEngine.stream

    def dying(self, requests, sampling):
        asked.append([r.key for r in requests])
        for number, trajectory in enumerate(stream(self, requests, sampling)):
            if number == answers:
                raise Killed
            yield trajectory

    monkeypatch.setattr(TransformersEngine, "stream", dying)
    return asked


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(out) == 0
    return records(out)


def test_an_evaluation_continues_after_a_kill_with_the_same_records(undisturbed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run(tmp_path)
    assert len(records(tmp_path)) == 3
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"key": "demo:te')  # a kill in the middle of a line
    asked = kill_after(monkeypatch, None)
    assert run(tmp_path) == 0
    assert len(asked[0]) == PROBLEMS - 3
    assert f"continues after 3 of {PROBLEMS} answers" in capsys.readouterr().out
    assert records(tmp_path) == undisturbed  # in problem order
    assert run(tmp_path) == 0
    assert len(asked) == 1  # nothing is missing: no engine was started
    assert run(tmp_path, problems=PROBLEMS + 2) == 0
    assert len(asked[1]) == 2
    assert records(tmp_path)[:PROBLEMS] == undisturbed


def test_a_folder_of_another_evaluation_is_refused_in_a_line(undisturbed, tmp_path, capsys):
    assert run(tmp_path) == 0

    def refusal(*arguments, **options):
        capsys.readouterr()
        assert run(tmp_path, *arguments, **options) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "its answers are of another max_tokens; give another folder" in refusal("rollout.max_tokens=8")
    assert "of another data" in refusal("data.instruction= Think.")
    assert "of another model" in refusal("--model", "bundled:demo_teacher")
    assert "which this command does not ask" in refusal(problems=2)
    assert records(tmp_path) == undisturbed
    (tmp_path / "evaluation.json").unlink()
    assert "holds records.jsonl of unknown settings" in refusal()


def test_a_negative_temperature_is_refused(tmp_path, capsys):
    assert run(tmp_path / "out", "--temperature", "-1") == 2
    assert "temperature=-1: accepted: 0 or above" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_samples_print_pass_at_k(tmp_path, capsys):
    assert run(tmp_path, "--samples", "3") == 0
    printed = capsys.readouterr().out
    assert "avg@3" in printed
    assert "pass@1" in printed
    assert "pass@2" in printed
    assert "pass@4" not in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["pass_at"]["match"]["1"]["share"] == pytest.approx(result["match"]["share"])
    assert len(records(tmp_path)) == 3 * PROBLEMS
