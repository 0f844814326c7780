"""Every command of README.md and docs/ has a test, and every test of the list exists."""

import ast
import os
import re
import shutil
import subprocess

import pytest
from documented_commands import TESTS
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
COMMAND = re.compile(
    r"python -m\s+((?:onpolicy_skd|eval|actors)[\w.]*"
    r"(?:\s+(?:build|info|verify|loss|step|end-to-end|curves|overlap)\b)?)"
    r"|(?<![\w-])(make [a-z][a-z-]*|skd [a-z][a-z-]*|ray job submit)"
)


def documented_commands(text):
    """Return the normalized commands in the code of a page: module or verb, and subcommand."""
    commands = set()
    for code in CODE.findall(text):
        for module, other in COMMAND.findall(code):
            commands.add(f"python -m {' '.join(module.split())}" if module else other)
    return commands


def is_there(test):
    """Tell whether ``file`` or ``file::function`` exists."""
    file, _, function = test.partition("::")
    if not (ROOT / file).is_file():
        return False
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    return function in names if function else bool(names)


def test_commands_are_extracted_from_code_only():
    text = (
        "make sure of it: `make test`\n```bash\ntime python -m onpolicy_skd.cache build --config x \\\n  a=b\n"
        "python -m   eval.performance loss  # fast\nskd eval --model m\nskd --help\n"
        "ray job submit --working-dir . -- python -m onpolicy_skd.train\npython -m nltk.downloader x\n```\n"
    )
    assert documented_commands(text) == {
        "make test", "python -m onpolicy_skd.cache build", "python -m eval.performance loss", "skd eval",
        "ray job submit", "python -m onpolicy_skd.train",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_documented_command_has_a_test(page):
    missing = documented_commands(page.read_text(encoding="utf-8")) - TESTS.keys()
    assert not missing, f"add to tests/documented_commands.py the tests of {sorted(missing)}"


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"- (?:\w+: )?(\S+\.md)$", navigation, re.MULTILINE)
    absent = {page.name for page in PAGES[1:]} - set(listed)
    assert not absent, "add these to nav in mkdocs.yml"


@pytest.mark.parametrize("command", TESTS)
def test_every_listed_test_exists(command):
    absent = [test for test in TESTS[command] if not is_there(test)]
    assert not absent


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "program"),
    [
        ("demo", "-m onpolicy_skd.train --config configs/demo.yaml"),
        ("test", '-m pytest -m "not slow" tests/integration'),
        ("test-slow", "-m pytest -m slow"),
        ("examples", "-m pytest -m slow tests/integration/test_examples.py"),
        ("docs", "-m mkdocs build --strict"),
        ("faults", "-m eval.faults --out runs/faults"),
        ("soak", "-m eval.soak --out runs/soak"),
        ("gpu-check", "-m eval.gpu_check --json runs/gpu_check.json"),
        ("gpu-bench", "-m eval.gpu_bench --out runs/gpu_bench.json"),
        ("setup", ""),
    ],
)
def test_make_targets_start_what_they_name(target, program, tmp_path):
    """A dry run without a virtual environment; what the targets start is tested elsewhere."""
    command = ["make", "-n", target, "BACKEND=cpu", f"VENV={tmp_path / 'none'}"]
    # `make test` exports MAKELEVEL and MAKEFLAGS, which make this one print the directories that it enters.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    lines = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("-m venv" in line for line in lines)  # each target sets up what it needs first
    assert program in lines[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", sources)) | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for name, rest in re.findall(r"\b(test_\w+)(…?)", page.read_text(encoding="utf-8")):
        known = any(test.startswith(name) for test in defined) if rest else name in defined
        assert known, f"{page.name} names {name}"
