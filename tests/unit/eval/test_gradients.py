"""The table of gradient angles on the bundled pair."""

import json

import pytest

from eval import gradients


@pytest.mark.slow
def test_the_command_measures_every_sampler_against_the_exact_gradient(tmp_path, capsys):
    """Temperature 3 gives the bundled teacher a tail that truncation can lose."""
    argv = ["--config", "configs/demo.yaml", "--samples", "2", "--json", str(tmp_path / "g.json"), "run.device=cpu"]
    assert gradients.main([*argv, "alignment.temperature=3", "alignment.estimator=topk_tail"]) == 0
    result = json.loads((tmp_path / "g.json").read_text())
    records = result["records"]
    assert len(records) == 2 + len(gradients.TRUNCATIONS)
    twelve, sixty_four, top_12, top_50, top_300 = records[:5]
    assert twelve["classes"] == pytest.approx(12, abs=1.5)
    assert top_300["angle"] < min(top_12["angle"], top_50["angle"])
    assert top_12["norm_ratio"] != pytest.approx(1.0, abs=0.01)
    assert sixty_four["draws"] == 64 > twelve["draws"]
    assert sixty_four["angle"] < twelve["angle"]
    assert {"student", "teacher", "positions", "divergence"} <= result.keys()
    assert capsys.readouterr().out.count("|") >= 5 * len(records)
    assert (
        gradients.main([*argv, "alignment.temperature=3", "student.lora_rank=2", "learner.compute_dtype=bfloat16"]) == 0
    )
    exact = json.loads((tmp_path / "g.json").read_text())["records"]  # of all parameters, in float32
    assert exact[2]["angle"] == pytest.approx(top_12["angle"], rel=1e-3)


def test_bad_settings_are_one_line(capsys):
    assert gradients.main(["learner.lrr=1"]) == 2
    assert "unknown setting 'learner.lrr'" in capsys.readouterr().err
