"""The checks of the GPU path: what of them runs on a CPU, their criteria, and what becomes of failures."""

import json
import subprocess
import sys
import types

import pytest
import torch

from eval.gpu_check import __main__ as command
from eval.gpu_check import machine, mathematics, runs
from eval.gpu_check.report import Report, Result, as_json, table


def statuses(report):
    return {r.name: r.status for r in report.results}


def test_the_mathematics_pass_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "check.json"
    assert command.main(["--part", "mathematics", "--device", "cpu", "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    named = {r["name"]: r for r in results}
    assert named["step, float16: relative difference of the gradient"]["status"] == "ok"
    assert named["a checkpoint restored: largest difference"]["value"] == 0.0
    assert named["CUDA IPC"]["status"] == "skipped"
    assert sum(r["status"] == "ok" for r in results) > 18
    assert "all checks passed" in capsys.readouterr().out


def test_a_wrong_loss_fails(monkeypatch):
    right = mathematics._loss
    monkeypatch.setattr(mathematics, "_loss", lambda *given: {n: 1.1 * t for n, t in right(*given).items()})
    report = Report("mathematics", show=lambda _: None)
    mathematics.check_loss(report, "cpu")
    assert len(report.failed) == len(report.results)


def test_the_machine_of_a_gpu_run(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    for driver, expected in (("580.65.06", "ok"), ("550.54", "FAILED")):
        monkeypatch.setattr(
            machine.subprocess, "run", lambda *_, driver=driver, **__: types.SimpleNamespace(stdout=driver + "\n")
        )
        report = Report("machine", show=lambda _: None)
        machine.check(report, "cuda", with_vllm=False)
        assert statuses(report)["driver"] == expected
        assert statuses(report)["torch sees the card"] == ("ok" if torch.cuda.is_available() else "FAILED")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    report = Report("machine", show=lambda _: None)
    machine.check(report, "cuda", with_vllm=False)
    assert statuses(report)["driver"] == statuses(report)["C compiler, for Triton"] == "FAILED"


def test_an_error_is_a_failed_check_and_a_figure_that_is_no_number_is_text():
    report = Report("p", show=lambda _: None)
    with report.guard("division"):
        raise ZeroDivisionError("by zero\nsecond line")
    report.at_most("gap", float("nan"), 1.0)
    assert [r.status for r in report.results] == ["FAILED", "FAILED"]
    assert report.results[0].value == "ZeroDivisionError: by zero"
    assert json.loads(json.dumps(as_json(report.results), allow_nan=False))[1]["value"] == "nan"
    text = table([*report.results, Result("p", "seconds", "note", 1.0)])
    assert "| p | gap | FAILED | nan | at most 1 |" in text
    assert "seconds" not in text


@pytest.mark.parametrize(("failing", "expected"), [(None, command.PARTS), ("mathematics", command.WITHOUT_VLLM)])
def test_the_first_part_that_fails_ends_the_check(failing, expected, tmp_path, monkeypatch, capsys):
    opened = []

    def part(name, arguments):
        opened.append(name)
        return [Result(name, "check", "FAILED" if name == failing else "ok", 1.0, "at most 1")]

    monkeypatch.setattr(command, "run_separately", part)
    file = tmp_path / "check.json"
    assert command.main(["--device", "cpu", "--json", str(file)]) == int(failing is not None)
    assert tuple(opened) == expected
    assert len(json.loads(file.read_text())["results"]) == len(expected)
    assert "| part | check |" in capsys.readouterr().out


def test_without_vllm_there_are_two_parts_and_a_process_that_dies_is_a_failed_check(tmp_path, monkeypatch):
    commands = []

    def dies(given, check):
        commands.append(given)
        return subprocess.CompletedProcess(given, -9)

    monkeypatch.setattr(command.subprocess, "run", dies)
    file = tmp_path / "check.json"
    assert command.main(["--without-vllm", "--device", "cpu", "--json", str(file)]) == 1
    assert json.loads(file.read_text())["results"][0]["value"] == "exit code -9"
    (only,) = commands
    assert only[:3] == [sys.executable, "-m", "eval.gpu_check"]
    assert "machine" in only


def records(gap=0.01, restarted=("rollout",), numbers=range(4)):
    steps = [{"step": n, "loss": 1.0, "sampler_gap": gap, "seconds": {"rollout": 1.0}, "learner_memory_mib": 10.0}
             for n in numbers]  # fmt: skip
    return [*steps, {"step": 2, "event": "fault", "restarted": list(restarted)}]


@pytest.mark.parametrize(
    ("code", "given", "failed"),
    [
        (3, records(), 0),
        (1, records(), 1),
        (3, records(gap=0.2), 1),
        (3, records(restarted=[]), 1),
        (3, [], 0),
    ],
)
def test_the_run_with_faults_is_judged_by_its_records(code, given, failed):
    report = Report("runs", show=lambda _: None)
    runs.check_stopped(report, code, "output", given)
    assert len(report.failed) == failed


def test_the_resumed_run_makes_each_step_once():
    for numbers, failed in ((range(6), 0), ([0, 1, 1, 2], 1)):
        report = Report("runs", show=lambda _: None)
        runs.check_resumed(report, 0, "", records(numbers=numbers))
        assert len(report.failed) == failed


def test_the_demo_is_judged_by_gap_and_teacher(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records()[0] | {"sampler_gap": 1e-6}) + "\n")
    for match, failed in ((0.99, 0), (0.5, 1)):
        (tmp_path / "summary.json").write_text(json.dumps({"exact_match": {"teacher": match}}))
        report = Report("runs", show=lambda _: None)
        runs.check_demo(report, 0, "", tmp_path)
        assert len(report.failed) == failed
    runs.check_demo(report, 1, "error: no model", tmp_path)
    assert report.failed[-1].value == "error: no model"


def test_a_run_that_ends_early_is_not_waited_for(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    runs.wait_for_steps(process, tmp_path / "none.jsonl", 3)
