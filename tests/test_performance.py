import json

import pytest

from eval import performance


def test_the_loss_benchmark_compares_equal_losses_and_writes_its_keys(tmp_path, capsys):
    file = tmp_path / "deep" / "loss.json"
    assert performance.main(["loss", "--json", str(file), "--shapes", "tiny", "--rounds", "1"]) == 0
    found = json.loads(file.read_text())
    assert set(found["ratio_to_trl"]) == {"time_k100", "time_k20", "memory_k100", "memory_k20"}
    runs = {name: rounds[0] for name, rounds in found["shapes"]["tiny"]["runs"].items()}
    for variant in ("trl", "ours_k100"):  # three ways to the same number
        assert runs[variant]["loss"] == pytest.approx(runs["dense"]["loss"], rel=1e-4)
    assert found["ratio_to_trl"]["time_k100"] == runs["trl"]["seconds"] / runs["ours_k100"]["seconds"]
    assert "TRL's figure over ours" in capsys.readouterr().out
