"""Shipped configs by name: lookup, suggestions, the list."""

from pathlib import Path

import pytest
from helpers import ROOT

from onpolicy_skd.comparison import grid
from onpolicy_skd.config import shipped
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import load_settings


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "paper/table5/on_se_kd"])
def test_a_name_is_the_shipped_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs" / f"{name.removesuffix('.yaml')}.yaml"
    assert load_settings(["--config", name]) == load_settings(["--config", str(file)])


def test_a_file_wins_over_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert shipped.find(Path("demo")) == ROOT / "configs" / "demo.yaml"
    Path("demo.yaml").write_text("run: {seed: 7}\n")
    assert load_settings(["--config", "demo.yaml"]).run.seed == 7


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dmeo", "did you mean demo?"),
        ("on_se_kd", "did you mean paper/table5/on_se_kd?"),
        ("configs/gsm8k_one_gpu.yaml", "did you mean gsm8k_one_gpu?"),
        ("../demo", "did you mean demo?"),
        ("zzz", "`skd configs` lists"),
        (".", "`skd configs` lists"),
    ],
)
def test_an_unknown_name_gets_near_ones(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        load_settings(["--config", name])
    assert str(refused.value).startswith(f"--config {Path(name)}: neither a file nor a shipped config; {hint}")


def test_grids_are_found_by_name_with_their_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert grid.load(Path("compare_demo")).untrained.settings.student.model == "bundled:demo_student"


def test_the_list_has_every_config_with_its_comment(capsys):
    assert shipped.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"in {ROOT / 'configs'}:"
    assert len(lines) == 1 + len(list((ROOT / "configs").rglob("*.yaml")))
    assert any(line.startswith("demo ") and "bundled tiny pair" in line for line in lines)
