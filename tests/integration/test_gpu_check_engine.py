"""The stage of the GPU check that needs vLLM, on its CPU build."""

import json

import pytest

from eval.gpu_check.__main__ import main


@pytest.mark.slow
def test_the_engine_agrees_with_the_learner_and_takes_new_weights(tmp_path):
    file = tmp_path / "check.json"
    arguments = ["--stage", "engine", "--device", "cpu", "--small", "--model", "bundled:demo_student"]
    assert main([*arguments, "--json", str(file)]) == 0
    results = {r["name"]: r for r in json.loads(file.read_text())["results"]}
    assert results["gap of sampled responses, nats"]["value"] < 1e-4
    assert results["new weights: gap, nats (a stale prefix cache shows here)"]["status"] == "ok"
