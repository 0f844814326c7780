"""The checks of the GPU path: what of them runs on a CPU, their criteria, and what becomes of failures."""

import json
import subprocess
import sys
import types

import pytest
import torch
from learner_helpers import graphs_without_code

from eval.gpu_bench import SHAPES, predicted_gb
from eval.gpu_check import __main__ as command
from eval.gpu_check import engine, machine, mathematics, runs
from eval.gpu_check.report import FAILED, Report, Result, as_json, table
from onpolicy_skd.config.loading import load_settings
from onpolicy_skd.models import loading
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.rollout.transformers_engine import TransformersEngine
from onpolicy_skd.run import machine as run_machine
from onpolicy_skd.storage.files import RunPaths


def statuses(report):
    return {r.name: r.status for r in report.results}


def failed_of(report):
    return [r for r in report.results if r.status == FAILED]


@pytest.mark.slow
def test_the_mathematics_pass_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "check.json"
    with graphs_without_code():
        assert command.main(["--stage", "mathematics", "--device", "cpu", "--json", str(file)]) == 0
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
    assert len(failed_of(report)) == len(report.results)


def test_the_machine_of_a_gpu_run(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(run_machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    for driver, expected in (("580.65.06", "ok"), ("550.54", "FAILED")):
        monkeypatch.setattr(
            run_machine.subprocess, "run", lambda *_, driver=driver, **__: types.SimpleNamespace(stdout=driver + "\n")
        )
        report = Report("machine", show=lambda _: None)
        machine.check(report, "cuda", with_vllm=False)
        assert statuses(report)["driver"] == expected
        assert statuses(report)["torch sees the card"] == ("ok" if torch.cuda.is_available() else "FAILED")
    monkeypatch.setattr(run_machine.shutil, "which", lambda name: None)
    report = Report("machine", show=lambda _: None)
    machine.check(report, "cuda", with_vllm=False)
    assert statuses(report)["driver"] == statuses(report)["C compiler, for Triton"] == "FAILED"


def test_a_conflict_counts_if_it_is_about_a_package_of_the_run(monkeypatch):
    lines = ["mkdocs 1.6 requires jinja2, which is not installed.", "vllm 0.32.0 has requirement setuptools<81"]
    for count, expected in ((1, []), (2, lines[1:])):
        output = "\n".join(lines[:count])
        monkeypatch.setattr(
            machine.subprocess, "run", lambda *_, output=output, **__: types.SimpleNamespace(stdout=output)
        )
        assert machine.package_conflicts() == expected


def test_kernels_that_do_not_load_fail(monkeypatch):
    def absent(name):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(machine, "package_conflicts", list)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(machine, "vllm_version", lambda: "0.32.0")
    for load, failed in ((lambda name: name, False), (absent, True)):
        monkeypatch.setattr(machine.importlib, "import_module", load)
        report = Report("machine", show=lambda _: None)
        machine.check(report, "cuda")
        assert ("vllm's kernels load" in {r.name for r in failed_of(report)}) == failed


# -- mathematics -----------------------------------------------------------------------------------------------------


def real_shape(monkeypatch, gb, reached, computed):
    """Return the statuses of the steps at the real shape, on a card of ``gb``; rates in TFLOP/s."""
    figures = {"seconds": 1.0, "computed_flops_per_second": computed * 1e12, "extra_gb": 30.0}
    monkeypatch.setattr(mathematics, "card", lambda _: {"gb": gb, "reached": {"flops": reached * 1e12}})
    monkeypatch.setattr(mathematics, "learner_step", lambda *_, **__: figures)
    report = Report("mathematics", show=lambda _: None)
    mathematics.check_real_shape(report)
    return [r.status for r in report.results if r.status != "note"]


def test_the_rate_is_judged_by_what_the_card_reaches(monkeypatch):
    assert real_shape(monkeypatch, 85.0, reached=250, computed=120) == ["ok"] * 4  # an A100
    assert real_shape(monkeypatch, 85.0, reached=700, computed=120) == ["FAILED", "ok"] * 2  # an H100


def test_a_step_that_the_card_cannot_hold_is_skipped(monkeypatch):
    assert real_shape(monkeypatch, 48.0, reached=250, computed=120) == ["ok", "ok", "skipped"]
    assert real_shape(monkeypatch, 24.0, reached=250, computed=120) == ["skipped"] * 2


# -- the engine ------------------------------------------------------------------------------------------------------


def engine_report(monkeypatch, kind):
    monkeypatch.setattr(engine, "build_engine", kind)
    report = Report("engine", show=lambda _: None)
    engine.check(report, "cpu", "bundled:demo_student", 6, 4)
    return report


def test_an_engine_that_takes_the_weights_passes(monkeypatch):
    report = engine_report(monkeypatch, TransformersEngine)
    assert not failed_of(report)
    assert sum(r.status == "ok" for r in report.results) == 4 + engine.PUSHES


def test_an_engine_that_keeps_its_old_weights_fails(monkeypatch):
    class Stale(TransformersEngine):
        def load_weights(self, weights, version):
            self.version = version

    assert [r.name.partition(",")[0] for r in failed_of(engine_report(monkeypatch, Stale))] == ["new weights: gap"]


def test_a_16_bit_type_has_a_looser_bound_after_the_noise():
    exact, exact_perturbed = engine.bounds(torch.float32)
    coarse, coarse_perturbed = engine.bounds(torch.bfloat16)
    assert exact == exact_perturbed < 0.007 < coarse < 1.5 * 0.031 < coarse_perturbed  # measured by bfloat16 alone


def test_the_engine_answers_questions_in_the_model_s_template():
    cfg = engine.settings("bundled:demo_student", "cpu", 8)
    tokenizer = loading.load_tokenizer("bundled:demo_student")
    requests = engine.questions(cfg, 5)
    assert len({r.key for r in requests}) == 5
    assert all("how many" in tokenizer.decode(r.prompt_ids).lower() for r in requests)
    assert cfg.cluster.topology == "colocated"  # only such engines sleep


# -- the command -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("failing", "expected"), [(None, command.STAGES), ("mathematics", command.WITHOUT_VLLM)])
def test_the_first_stage_that_fails_ends_the_check(failing, expected, tmp_path, monkeypatch, capsys):
    opened = []

    def run_stage(name, arguments):
        opened.append(name)
        return [Result(name, "check", "FAILED" if name == failing else "ok", 1.0, "at most 1")]

    monkeypatch.setattr(command, "run_separately", run_stage)
    file = tmp_path / "check.json"
    assert command.main(["--device", "cpu", "--json", str(file)]) == int(failing is not None)
    assert tuple(opened) == expected
    assert len(json.loads(file.read_text())["results"]) == len(expected)
    assert "| stage | check |" in capsys.readouterr().out


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


def test_overrides_and_options_mix_and_name_the_engine_s_model(tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr(engine, "check", lambda report, device, model, *sizes: models.append((model, sizes)))
    options = ["--device", "cpu", "--stage", "engine", "--json", str(tmp_path / "check.json")]
    assert command.main(["student.model=/models/a", "--small", "run.seed=3", *options]) == 0
    assert command.main([*options, "--model", "b", "student.model=/models/a"]) == 0
    assert command.main(options) == 0
    assert models == [("/models/a", (12, 4)), ("b", ()), ("Qwen/Qwen3-1.7B", ())]


def test_a_wrong_override_is_refused_before_any_check(capsys):
    assert command.main(["--device", "cpu", "student.modell=x"]) == 2
    assert "did you mean 'student.model'?" in capsys.readouterr().err


# -- the runs --------------------------------------------------------------------------------------------------------


def records(gap=0.01, restarted=("rollout",), numbers=(0, 1, 2, 3)):
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
    assert len(failed_of(report)) == failed


def test_the_resumed_run_makes_each_step_once():
    for numbers, failed in ((range(6), 0), ([0, 1, 1, 2], 1)):
        report = Report("runs", show=lambda _: None)
        runs.check_resumed(report, 0, "", records(numbers=list(numbers)))
        assert len(failed_of(report)) == failed


def test_the_demo_is_judged_by_gap_and_teacher(tmp_path):
    paths, report = RunPaths(tmp_path), Report("runs", show=lambda _: None)
    for gap, match, failed in ((1e-6, 0.99, 0), (5e-3, 0.99, 0), (0.02, 0.99, 1), (1e-6, 0.5, 1)):
        paths.metrics.write_text(json.dumps(records()[0] | {"sampler_gap": gap}) + "\n")
        paths.summary.write_text(json.dumps({"exact_match": {"teacher": match}}))
        report = Report("runs", show=lambda _: None)
        runs.check_demo(report, 0, "", paths)
        assert len(failed_of(report)) == failed
    runs.check_demo(report, 1, "error: no model", paths)
    assert failed_of(report)[-1].value == "error: no model"


def test_models_are_fetched_before_the_run_that_has_a_time_limit(monkeypatch):
    done = []
    monkeypatch.setattr(runs, "fetch", done.append)
    monkeypatch.setattr(runs, "run", lambda _: (1, "no"))
    monkeypatch.setattr(runs, "run_with_faults", lambda *_: (done.append("run"), (1, "no"))[1])
    runs.check(Report("runs", show=lambda _: None), "cpu", ["student.model=/models/a"])
    assert done == ["/models/a", "Qwen/Qwen3-8B", "run"]


def test_a_folder_is_checked_and_a_hub_name_is_downloaded(tmp_path, monkeypatch, capsys):
    downloads = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: downloads.append(name))
    monkeypatch.setattr(loading, "_in_cache", lambda _: True)
    runs.fetch("bundled:demo_student")
    assert not downloads
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights"):
        runs.fetch(str(tmp_path))
    runs.fetch("owner/name")
    assert downloads == ["owner/name"]
    assert "owner/name: fetching" in capsys.readouterr().out


def test_memory_and_weight_updates_of_the_run_have_bounds():
    steps = records(numbers=(0, 1))
    for sync, mib, failed in ((0.5, 10.0, 0), (9.0, 10.0, 1), (0.5, 50_000.0, 1)):
        for n, step in enumerate(steps[:2]):
            step |= {"seconds": {"sync": sync * n}, "learner_memory_mib": mib}
        report = Report("runs", show=lambda _: None)
        runs.check_costs(report, steps, 39.0)
        assert len(failed_of(report)) == failed


def test_the_memory_bound_is_the_estimate_at_the_settings_of_the_run(monkeypatch):
    cfg = load_settings(["--config", "gsm8k_one_gpu"])
    sizes = types.SimpleNamespace(vocab_size=151_936, hidden_size=2048, num_hidden_layers=28)
    config = types.SimpleNamespace(get_text_config=lambda: sizes)
    monkeypatch.setattr(loading, "load_config", lambda _: config)
    assert runs.memory_bound(cfg) == predicted_gb(SHAPES["qwen3"], 8192, 0.2, True) + 3
    sizes.num_hidden_layers = 36
    assert runs.memory_bound(cfg) is None


def test_a_run_that_ends_early_is_not_waited_for(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    runs.wait_for_steps(process, tmp_path / "none.jsonl", 3)
