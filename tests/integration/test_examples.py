"""The notebook and the scripts of examples/, executed as a user would.  `make examples`."""

import base64
import os
import re
import subprocess
import sys

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "distil.ipynb"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def texts_of(cell):
    """The printed and the returned text of an executed cell."""
    return [o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in cell.outputs]


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    figures = [o.data["image/png"] for cell in cells for o in cell.outputs if "data" in o and "image/png" in o.data]
    assert len(figures) == 2
    assert all(base64.b64decode(figure).startswith(b"\x89PNG") for figure in figures)
    assert any("'status': 'finished'" in text for cell in cells for text in texts_of(cell))
    printed = "".join(text for cell in cells for text in texts_of(cell))
    assert re.search(r"before: \d+ % right", printed)
    assert re.search(r"after: \d+ % right", printed)
    assert (tmp_path / "runs" / "notebook" / "final" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "runs", "expected"),
    [
        ("own_metric", ["own_metric"], [r"divergence: \d\.\d+ before, \d\.\d+ after", r"exact_match: "]),
        ("own_data", ["own_data"], [r"pass@4: \d\.\d+", r"an answer: \S+"]),
        (
            "compare_methods",
            ["compare_student_entropy", "compare_random"],
            [r"student_entropy: [\d.]+ % of 200", r"student_entropy - random: .* points .*p = [\d.]+"],
        ),
    ],
)
def test_a_script_runs_and_prints_its_result(script, runs, expected, tmp_path):
    command = [sys.executable, EXAMPLES / f"{script}.py"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [text for text in expected if not re.search(text, done.stdout)] == [], done.stdout
    assert all((tmp_path / "runs" / run / "final" / "model.safetensors").exists() for run in runs)
