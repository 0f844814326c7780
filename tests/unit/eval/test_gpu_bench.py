"""The benchmark of the GPU path, at a toy shape on the CPU: the same code, sums and page."""

import json
import types

import pytest
import torch
from learner_helpers import graphs_without_code

from eval import gpu_bench
from eval.gpu_bench import (
    LOSSES,
    NOMINAL,
    SHAPES,
    backbone_figures,
    card,
    loss_bytes,
    loss_flops,
    losses,
    main,
    measured,
    page,
    predicted_gb,
    run_figures,
)
from onpolicy_skd.tracing import Span


@pytest.mark.slow
def test_the_toy_shape_writes_figures_and_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_bench, "LOSSES", [name for name in LOSSES if name != "trl"])  # slow to import
    with graphs_without_code():
        assert main(["--device", "cpu", "--shape", "toy", "--out", str(tmp_path / "bench.json")]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["losses"].keys() == set(LOSSES) - {"trl"}
    for name in ("dense", "ours_k100", "ours_k20", "ours_k5"):
        assert result["losses"][name]["ms"] > 0
    assert len(result["steps"]) == 2 * len(SHAPES["toy"].tokens) + 4
    assert {row["tokens"] for row in result["steps"]} == {320, 640}
    assert all(row["backbone_seconds"] > 0 for row in result["steps"])
    text = (tmp_path / "bench.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("\n| ours_k") == 3
    assert "| 640 | 0.05 | no | no |" in text
    assert "| 640 | 0.2 | yes | yes |" in text


def test_without_a_gpu_the_default_device_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "accepted: cpu" in capsys.readouterr().err


def test_what_does_not_fit_is_a_row_of_the_table():
    def action():
        raise torch.OutOfMemoryError("full")

    error = measured(action, "cpu")
    assert error == {"error": "out of memory"}
    card = {"name": "x", "torch": "2", "reached": {"flops": 1e12, "bytes_per_second": 1e12}}
    step = {"tokens": 2048, "k": 0.2, "checkpointing": False, "compiled": False, "predicted_gb": 90.0} | error
    text = page({"shape": "qwen3", "card": card, "rows": 8, "losses": {"dense": error}, "steps": [step]})
    assert "| dense | out of memory |" in text
    assert "| 2048 | 0.2 | no | no | out of memory |" in text


def test_a_row_that_fails_leaves_the_others(monkeypatch):
    def broken(_):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate\nmore")

    monkeypatch.setattr(gpu_bench, "LOSSES", ("liger", "dense"))
    monkeypatch.setattr(gpu_bench, "liger_step", broken)
    monkeypatch.setattr(gpu_bench.importlib.util, "find_spec", lambda _: True)
    rows = losses(SHAPES["toy"], "cpu")
    assert rows["liger"]["error"] == "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"
    assert rows["dense"]["ms"] > 0


def test_a_section_that_fails_leaves_the_others_in_the_file(tmp_path, monkeypatch, capsys):
    out, earlier = tmp_path / "bench.json", []

    def broken(*_):
        earlier.append(json.loads(out.read_text()))
        raise RuntimeError("exit code 1: error: no GPU")

    monkeypatch.setattr(gpu_bench, "losses", lambda *_: {"dense": {"error": "out of memory"}})
    monkeypatch.setattr(gpu_bench, "steps", broken)
    monkeypatch.setattr(gpu_bench, "whole_run", broken)
    options = ["--device", "cpu", "--shape", "toy", "--run", "gsm8k_one_gpu", "--out", str(out)]
    assert main(["run.seed=1", *options, "student.model=x"]) == 1
    assert [set(r) & {"losses", "steps", "run"} for r in earlier] == [{"losses"}, {"losses", "steps"}]
    assert json.loads(out.read_text())["run"] == {"error": "RuntimeError: exit code 1: error: no GPU"}
    text = capsys.readouterr().out
    assert text.count("\nRuntimeError: exit code 1: error: no GPU\n") == 2
    assert "| dense | out of memory |" in text


def test_the_backbone_s_rate_is_over_its_own_seconds():
    spans = [Span("backbone", 0.0, 1.0), Span("loss", 1.0, 9.0), Span("backward", 9.0, 12.0)]
    kept, recomputed = (backbone_figures(12e12, spans, r) for r in (False, True))
    assert kept["backbone_seconds"] == 4.0
    assert kept["backbone_flops_per_second"] == recomputed["backbone_flops_per_second"] == 3e12
    assert kept["computed_flops_per_second"] == 3e12
    assert recomputed["computed_flops_per_second"] == 4e12


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", True), ("NVIDIA H200", True), ("NVIDIA GH200 480GB", False),
        ("NVIDIA H100 PCIe", False), ("NVIDIA H200 NVL", False), ("NVIDIA A100-SXM4-40GB", True),
    ],
)  # fmt: skip
def test_nominal_rates_are_of_the_card_itself(name, known, monkeypatch):
    properties = types.SimpleNamespace(name=name, total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones(2, 2))
    monkeypatch.setattr(gpu_bench, "seconds_of", lambda *_: 1.0)
    assert ("nominal" in card("cuda")) == known
    if known:
        assert tuple(card("cuda")["nominal"].values()) == NOMINAL[name]


def test_arithmetic_of_the_loss():
    shape = SHAPES["qwen3"]
    full, fifth = loss_flops(shape, "ours_k100"), loss_flops(shape, "ours_k20")
    assert full == loss_flops(shape, "dense") == 2 * 151_936 * 8192 * (3 * 2048 + 4096)
    assert fifth == pytest.approx(0.2 * full + 2 * 151_936 * 8192 * 2048)
    assert loss_bytes(shape, "ours_k20") < loss_bytes(shape, "ours_k100")


def test_the_estimated_peak_is_the_sum_of_its_terms():
    """16 bytes per weight of 1.72 billion, the two heads in bfloat16, logits, inputs of 28 layers and one layer."""
    peak = predicted_gb(SHAPES["qwen3"], 8192, 0.2, True)
    assert peak == pytest.approx(27.5 + 1.24 + 0.62 + 3.2 + 1.88 + 1.51, abs=0.3)
    assert predicted_gb(SHAPES["qwen3"], 8192, 0.2, False) == pytest.approx(peak - 1.88 - 1.51 + 27.2, abs=0.1)


def test_figures_of_a_run_leave_out_its_first_step():
    def record(step, rollout):
        return {"step": step, "loss": 1.0, "seconds": {"rollout": rollout, "step": 4.0}, "response_tokens": 50.0,
                "generated": 8, "learner_memory_mib": 1024.0 * step, "sampler_gap": 0.01}  # fmt: skip

    figures = run_figures([record(0, 99.0), {"step": 0, "event": "warning"}, record(1, 1.0), record(2, 3.0)])
    assert figures["steps"] == 2
    assert figures["seconds"] == {"rollout": 2.0, "step": 4.0}
    assert figures["tokens_per_second"] == 100.0
    assert figures["learner_memory_gb"] == pytest.approx(2.147, abs=1e-3)
    assert figures["sampler_gap"] == pytest.approx(0.01)
