"""The table of gradient angles, on the bundled pair."""

import json

import pytest

from eval import gradients


def test_the_command_measures_every_sampler_against_the_exact_gradient(tmp_path, capsys):
    argv = ["--config", "configs/demo.yaml", "--samples", "2", "--json", str(tmp_path / "g.json"), "run.device=cpu"]
    assert gradients.main(argv) == 0
    found = json.loads((tmp_path / "g.json").read_text())
    records = found["records"]
    assert [r["sampler"] for r in records[:3]] == ["rs_kd", "rs_kd", "top_k"]
    assert len(records) == 2 + len(gradients.TRUNCATIONS)
    for record in records:
        assert 0 <= record["angle"] < 90
        assert record["norm_ratio"] == pytest.approx(1.0, abs=0.5)
    assert {"student", "teacher", "positions", "divergence"} <= found.keys()
    assert capsys.readouterr().out.count("|") >= 5 * len(records)


def test_bad_settings_are_one_line(capsys):
    assert gradients.main(["learner.lrr=1"]) == 2
    assert "unknown setting 'learner.lrr'" in capsys.readouterr().err
