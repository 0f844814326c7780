"""The settings of examples/ are valid, and the stored notebook shows results; `make examples` runs them."""

import importlib.util
import json
import re

import pytest
from helpers import ROOT

from onpolicy_skd import load_config

EXAMPLES = ROOT / "examples"
CELLS = [c for c in json.loads((EXAMPLES / "distil.ipynb").read_text())["cells"] if c["cell_type"] == "code"]


class Trained(Exception):
    """Raised in place of training, with the settings."""


def refuse(settings):
    raise Trained(settings)


@pytest.mark.parametrize(
    ("script", "arguments", "changed"),
    [
        ("own_metric", [], "positions"),
        ("own_data", [[]], "data"),
        ("compare_methods", [], "eval"),
    ],
)
def test_a_script_trains_with_valid_settings(script, arguments, changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(script, EXAMPLES / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "train", refuse)
    with pytest.raises(Trained) as stopped:
        module.main(*arguments)
    (settings,) = stopped.value.args
    demo = load_config("demo")
    assert getattr(settings, changed) != getattr(demo, changed)
    assert settings.run.steps < demo.run.steps


def test_the_notebook_has_valid_settings_and_code():
    scope = {}
    exec("".join(CELLS[0]["source"]), scope)
    assert scope["settings"].run.name == "notebook"
    for cell in CELLS:
        compile("".join(cell["source"]), "cell", "exec")


def test_the_stored_notebook_has_figures_and_no_path_of_a_machine():
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    shown = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs]
    assert any("% right" in text for text in shown)
    assert not any(re.search(r"(^|\s)/\w|[A-Z]:\\", text) for text in shown)
