import json
import re

import pytest
import torch

from eval.performance import __main__ as performance
from eval.performance import end_to_end, loss
from eval.performance.overlap import busy_seconds
from onpolicy_skd.run.exits import EXIT_BAD_INPUT
from onpolicy_skd.tracing import Span


@pytest.mark.slow
def test_the_loss_benchmark_compares_equal_losses_and_writes_its_keys(tmp_path, capsys):
    file = tmp_path / "deep" / "loss.json"
    assert performance.main(["loss", "--json", str(file), "--shapes", "tiny", "--rounds", "1"]) == 0
    result = json.loads(file.read_text())
    assert set(result["ratio_to_trl"]) == {"time_k100", "time_k20", "memory_k100", "memory_k20"}
    runs = {name: rounds[0] for name, rounds in result["shapes"]["tiny"]["runs"].items()}
    for variant in ("trl", "ours_k100"):  # equal losses
        assert runs[variant]["loss"] == pytest.approx(runs["dense"]["loss"], rel=1e-4)
    assert result["ratio_to_trl"]["time_k100"] == runs["trl"]["seconds"] / runs["ours_k100"]["seconds"]
    methods = result["shapes"]["tiny"]["methods"]
    assert methods.keys() == {*loss.METHODS, *loss.SCORES}
    assert methods["exact"]["time"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert methods["teacher_signals"]["over"] == "kl_alone"
    shown = capsys.readouterr().out
    assert "TRL's figure over ours" in shown
    assert "over exact: time" in shown


def test_the_methods_of_the_loss_benchmark_are_what_they_are_named_after():
    inputs = loss.make_inputs(loss.SHAPES["tiny"], "cpu")
    losses = {name: loss.loss_step(name, inputs)().item() for name in ("dense", *loss.METHODS, *loss.SCORES)}
    assert losses["exact"] == pytest.approx(losses["dense"], rel=1e-4)
    assert losses["mixture_constant"] == pytest.approx((losses["exact"] + losses["forward_kl"]) / 2, rel=1e-4)
    assert losses["student_topk_tail"] < losses["exact"]
    assert losses["clip"] < losses["exact"]
    hidden, head = (inputs[f"student_{n}"].detach().double() for n in ("hidden", "head"))
    log_q, log_q0 = (torch.log_softmax(h @ head.T, -1) for h in (hidden, loss.reference_hidden(inputs).double()))
    log_p = torch.log_softmax(inputs["teacher_hidden"].double() @ inputs["teacher_head"].double().T, -1)
    reference_kl = (log_q.exp() * (log_q - log_q0)).sum(-1).mean().item()
    assert losses["reference_kl"] == pytest.approx(losses["exact"] + 0.1 * reference_kl, rel=1e-4)
    drift_SN = ((log_p - log_q).gather(1, inputs["targets"][:, None]).abs()).view(loss.SEQUENCES, -1)
    factors_SN = 2 - (drift_SN.cumsum(1) - drift_SN) / drift_SN.sum(1, keepdim=True)
    factors_SN /= factors_SN.mean(1, keepdim=True)
    kl_SN = (log_q.exp() * (log_q - log_p)).sum(-1).view(loss.SEQUENCES, -1)
    assert losses["iw"] == pytest.approx((factors_SN * kl_SN).mean().item(), rel=1e-4)
    assert losses["kl_alone"] == pytest.approx(losses["teacher_signals"], rel=1e-4)
    assert losses["kl_alone"] == pytest.approx(losses["forward_kl"], rel=1e-4)


@pytest.mark.slow
def test_the_end_to_end_benchmark_writes_its_keys(tmp_path, capsys):
    file = tmp_path / "all.json"
    assert performance.main(["end-to-end", "--json", str(file), "--shapes", "tiny", "--rounds", "1"]) == 0
    result = json.loads(file.read_text())
    assert set(result["ratio_to_trl"]) == {"k100", "k20", "ragged", "prefilter", "memory"}
    assert set(result["step_over_unavoidable"]) == {"ours_k100", "ours_k20", "ours_ragged"}
    runs = {name: rounds[0] for name, rounds in result["shapes"]["tiny"]["runs"].items()}
    assert result["ratio_to_trl"]["k20"] == runs["trl"]["seconds"] / runs["ours_k20"]["seconds"]
    assert "step over unavoidable" in capsys.readouterr().out


def test_a_pair_that_cannot_be_read_is_one_error(tmp_path, capsys):
    for arguments, named in (
        (["--batch", "8"], "--batch is only for --pair"),
        (["--new-tokens", "8"], "--new-tokens is only for --pair"),
        (["--pair", str(tmp_path / "gone"), "bundled:demo_teacher"], str(tmp_path / "gone")),
        (["--pair", "bundled:demo_student", "bundled:demo_teacher", "--data", str(tmp_path)], "train.jsonl"),
    ):
        assert performance.main(["end-to-end", *arguments]) == EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", error), error
        assert named in error, error


@pytest.mark.slow
def test_the_end_to_end_benchmark_takes_a_pair_of_models(tmp_path, capsys):
    end_to_end.save_random_models(tmp_path, end_to_end.SHAPES["tiny"])
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(20)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = ["--pair", str(tmp_path / "student"), str(tmp_path / "teacher"), "--data", str(tmp_path)]
    assert performance.main(["end-to-end", *arguments, "--new-tokens", "8", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "pair: {'student': " in shown
    assert "ours_k20" in shown
    assert "ragged" not in shown


@pytest.mark.slow
def test_steps_and_curves_write_their_keys_and_a_plot(tmp_path, capsys):
    for name in ("step", "curves", "overlap"):
        arguments = [name, "--json", str(tmp_path / f"{name}.json"), "--shapes", "tiny", "--rounds", "1"]
        assert performance.main(arguments) == 0
    step, curves, overlap = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("step", "curves", "overlap")
    )
    runs = overlap["shapes"]["tiny"]["runs"]
    assert runs["overlap"][0]["step_over_longest"] < runs["one_by_one"][0]["step_over_longest"]
    assert set(step["step_over_unavoidable"]) == {"ours_k100", "ours_k20", "ours_ragged"}
    rows = curves["shapes"]["tiny"]["points"]["rows"]
    assert [p["rows"] for p in rows] == [40, 80]
    assert rows[1]["logits_mib"] == 2 * rows[0]["logits_mib"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "of logits, if kept" in capsys.readouterr().out


@pytest.mark.slow
def test_a_measured_step_is_the_sum_of_its_phases():
    figures = end_to_end.measure("ours_k20", "tiny", "cpu")
    assert set(figures["phases"]) == {"rollout", "filter", "teacher", "learn", "sync"}
    assert figures["seconds"] == pytest.approx(sum(figures["phases"].values()))
    assert figures["unavoidable"] > figures["phases"]["rollout"]


def test_busy_is_the_union_of_spans():
    spans = [Span("a", 1.0, 3.0), Span("b", 2.0, 2.5), Span("c", 2.5, 4.0), Span("d", 6.0, 7.0), Span("e", 0.0, 0.5)]
    assert busy_seconds(spans, since=1.5) == pytest.approx(2.5 + 1.0)


def test_ragged_answers_are_a_third_of_the_limit_on_average():
    shape = end_to_end.SHAPES["small"]
    lengths = end_to_end.ragged(shape)
    assert (len(lengths), max(lengths)) == (shape.batch, shape.new_tokens)
    assert sum(lengths) / shape.batch == pytest.approx(shape.new_tokens / 3, rel=0.05)
