"""The wheel, installed without the source tree: what it holds, and a run by a config's name.  `make test-slow`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "onpolicy_skd", "actors", "eval", "configs")


def run(*command: object, cwd: Path) -> str:
    """Return the output of ``command``, which must succeed; this process's import paths do not reach it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:  # a copy: a build writes next to its sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", ".", cwd=folder)
    (file,) = (folder / "out").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def skd(wheel, tmp_path_factory) -> Path:
    """The command in a fresh environment that borrows every other package from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=folder)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "skd"


def test_the_wheel_holds_code_configs_assets_and_license(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("onpolicy_skd", "actors", "eval"):
        sources = {f.relative_to(ROOT).as_posix() for f in (ROOT / package).rglob("*.py")}
        assert sources <= names, sources - names
    for folder, prefix in (("configs", "onpolicy_skd/configs"), ("onpolicy_skd/assets", "onpolicy_skd/assets")):
        files = {f"{prefix}/{f.relative_to(ROOT / folder).as_posix()}" for f in (ROOT / folder).rglob("*.*")}
        assert files <= names, files - names
    assert "onpolicy_skd/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "configs/", "docs/")) for name in names)


def test_a_run_by_name_from_an_empty_folder(skd, tmp_path):
    assert run(skd, "--version", cwd=tmp_path).startswith("skd ")
    assert str(skd.parents[1]) in run(skd, "configs", cwd=tmp_path).splitlines()[0]
    assert "positions.k=0.2" in run(skd, "train", "--help", cwd=tmp_path)
    output = run(
        skd, "train", "--config", "demo", "run.steps=2", "run.evaluate_every=0", "learner.batch_size=8",
        "rollout.engine=transformers", "eval.problems=8", "eval.teacher=false", "eval.before=false", cwd=tmp_path,
    )  # fmt: skip
    assert "finished after 2 steps" in output
    assert json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())["status"] == "finished"


def test_a_config_that_extends_others_is_resolved_inside_the_wheel(skd, tmp_path):
    code = (
        "from onpolicy_skd.config.loading import load_settings as load;"
        "s = load(['--config', 'paper/table5/on_se_kd']); print(s.run.name, s.mode, s.learner.lr)"
    )
    assert run(skd.with_name("python"), "-c", code, cwd=tmp_path).split() == ["table5_on_se_kd", "on_policy", "1e-05"]
