"""The command `skd`: dispatch, help without heavy imports, and files that share our packages' names."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from onpolicy_skd import __version__, cli, siblings

HEAVY = ("torch", "ray", "vllm", "transformers", "numpy")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with ``arguments`` in ``folder``, with this checkout after the working directory on sys.path."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, check=False
    )


@pytest.fixture
def occupied(tmp_path) -> Path:
    """A folder whose files are called like our packages and must never be imported."""
    (tmp_path / "eval.py").write_text("raise SystemExit('the wrong eval was imported')\n")
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text("raise SystemExit('the wrong actors were imported')\n")
    return tmp_path


@pytest.mark.parametrize("argument", ["--help", "--version", "trian"])
def test_help_imports_nothing_heavy(tmp_path, argument):
    code = f"from onpolicy_skd import cli; cli.main([{argument!r}]); import sys; print({set(HEAVY)} & set(sys.modules))"
    assert python(tmp_path, "-c", code).stdout.splitlines()[-1] == "set()"


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    listed = re.findall(r"^  (\S+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(cli.MODULES)


def test_nothing_to_do_prints_the_help_as_an_error(capsys):
    assert cli.main([]) == 2
    assert "usage: skd COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "needle"), [("trian", "did you mean 'train'?"), ("xyz", "accepted: train, compare")])
def test_an_unknown_verb_is_refused_in_one_line(capsys, verb, needle):
    assert cli.main([verb, "--config", "demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: skd has no command {verb!r}")
    assert needle in line


def test_the_version_is_the_citations_too(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"skd {__version__}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.parametrize("verb", cli.MODULES)
def test_each_program_names_itself_as_it_was_started(capsys, verb):
    module = importlib.import_module(cli.MODULES[verb])
    as_module = f"python -m {module.__name__.removesuffix('.__main__')}"
    for start, name in (
        (lambda: cli.main([verb, "--help"]), f"skd {verb}"),
        (lambda: module.main(["--help"]), as_module),
    ):
        try:
            code = start()
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr().out
        assert code == 0
        assert shown.startswith(f"usage: {name} ")
        assert shown.count("python -m") == name.count("python -m"), shown


def test_arguments_and_exit_code_pass_through(capsys):
    assert cli.main(["eval", "--model", "bundled:none", "data.source=demo"]) == 2
    assert "bundled:none" in capsys.readouterr().err


def test_files_with_our_packages_names_do_not_hide_them_from_a_program(occupied):
    done = python(occupied, "-m", "onpolicy_skd.train", "--help")
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stdout + done.stderr


@pytest.mark.parametrize("binding", ["siblings.bind()", "siblings.worker_setup()()"])
def test_binding_comes_before_the_working_directory(occupied, binding):
    code = f"from onpolicy_skd import siblings; {binding}; import actors, eval; print(actors.__file__, eval.__file__)"
    files = f"{ROOT / 'actors' / '__init__.py'} {ROOT / 'eval' / '__init__.py'}"
    assert python(occupied, "-c", code).stdout.strip() == files
    assert "the wrong actors" in python(occupied, "-c", code.replace(binding, "None")).stderr


def test_hidden_in(occupied, tmp_path_factory):
    assert siblings.hidden_in(occupied)
    assert not siblings.hidden_in(tmp_path_factory.mktemp("empty"))
    assert not siblings.hidden_in(ROOT)


@pytest.mark.slow
def test_a_run_beside_files_with_our_packages_names(occupied):
    """Ray puts the working directory first on its workers' sys.path."""
    done = python(
        occupied, "-m", "onpolicy_skd.train", "--config", "demo", "run.steps=1", "learner.batch_size=4",
        "rollout.engine=transformers", "eval.problems=0", "eval.teacher=false", "run.trackers=[]",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((occupied / "runs" / "demo" / "summary.json").read_text())["status"] == "finished"
