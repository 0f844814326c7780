"""The interface from Python: light imports, settings by dotted keys, an evaluation, the page that describes it."""

import inspect
import json
import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT

import onpolicy_skd
from onpolicy_skd import ConfigError, Settings, evaluate, load_config, train
from onpolicy_skd.config.loading import dump, load_settings

SMALL = {
    "data.source": "demo", "data.max_prompt_tokens": 96, "rollout.max_tokens": 16, "rollout.engine": "transformers",
    "rollout.dtype": "float32", "run.device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("statement", ["import onpolicy_skd", "from onpolicy_skd import Settings, load_config"])
def test_an_import_brings_nothing_heavy(statement):
    code = f"{statement}; import sys; print({{'torch', 'ray', 'vllm', 'transformers', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(onpolicy_skd, name) is not None for name in onpolicy_skd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        _ = onpolicy_skd.distill


def test_a_config_with_overrides_is_the_command_lines():
    settings = load_config("demo", {"positions.k": 0.1, "run.name": "tenth", "rollout.stop": ["Q:"], "run.steps": None})
    assert isinstance(settings, Settings)
    arguments = ["positions.k=0.1", "run.name=tenth", "rollout.stop=['Q:']", "run.steps=null"]
    assert settings == load_settings(["--config", "demo", *arguments])
    assert load_config() == Settings()
    assert load_config(None, {"run": {"steps": 3}, "run.seed": 5}).run.steps == 3


@pytest.mark.parametrize(
    ("overrides", "needle"),
    [
        ({"positions.kk": 0.1}, "unknown setting 'positions.kk'"),
        ({"positions.k": "a lot"}, "positions.k='a lot'"),
        ({"alignment.beta": 0.3}, "alignment.beta"),
    ],
)
def test_a_wrong_setting_is_named(overrides, needle):
    with pytest.raises(ConfigError, match=re.escape(needle)):
        load_config("demo", overrides)


def test_training_refuses_settings_that_were_never_checked(monkeypatch):
    monkeypatch.setattr(train, "preflight", lambda _: pytest.fail("the rules between settings come first"))
    with pytest.raises(ConfigError, match=r"alignment\.beta"):
        train(Settings.model_validate({"alignment": {"beta": 0.3}}))


def test_an_evaluation_takes_its_settings_from_the_run_folder(tmp_path, capsys):
    settings = load_config(None, SMALL)
    (tmp_path / "config.yaml").write_text(dump(settings))
    model = tmp_path / "final"
    model.symlink_to(ROOT / "onpolicy_skd" / "assets" / "demo_student")
    lines = []
    defaults = evaluate(model, problems=2, log=lines.append)
    assert lines == [f"loading {model} into transformers"]
    given = evaluate("bundled:demo_student", settings, problems=2, out=tmp_path / "out", log=lines.append)
    assert defaults.records == given.records
    assert [len(r["output"]) > 0 for r in given.records] == [True, True]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["problems"] == 2
    assert result["match"]["share"] == given.result["match"]["share"]
    assert evaluate("bundled:demo_student", settings, problems=2, out=tmp_path / "out").result["resumed"] == 2
    assert "continues after 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("counts", [{"samples": 0}, {"problems": 0}])
def test_counts_below_one_are_refused(counts):
    with pytest.raises(ConfigError, match="accepted: at least 1"):
        evaluate("bundled:demo_student", load_config(None, SMALL), **counts)


def signature(function):
    """The signature without spaces and quotes, as the page may wrap it."""
    text = re.sub(r"<[^>]*print[^>]*>", "print", str(inspect.signature(function)))  # Ray replaces builtins.print
    return re.sub(r"[\s']", "", text)


@pytest.mark.parametrize("function", [load_config, evaluate, train], ids=["load_config", "evaluate", "train"])
def test_the_page_shows_the_signatures_as_they_are(function):
    page = re.sub(r"\s|,(?=\s*\))", "", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    name = "train" if function is train else function.__name__
    assert name + signature(function) in page


def test_the_page_names_every_public_name():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in onpolicy_skd.__all__ if not re.search(rf"\b{name}\b", page)] == []


def test_the_readme_uses_the_interface():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(from onpolicy_skd import .*?)```", readme, re.DOTALL)
    overrides = yaml.safe_load(re.search(r"load_config\(\"demo\", ({.*?})\)", code).group(1))
    assert load_config("demo", overrides).run.name == "tenth"
