"""Every command of README.md and docs/ has a test or a reason for none, and its program accepts its arguments."""

import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess

import pytest
from documented_commands import OUTSIDE, TESTS
from helpers import ROOT

from onpolicy_skd.cli import MODULES
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, load_settings, parse_override

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KEYS = [key.split() for key in (*TESTS, *OUTSIDE)]
PROGRAMS = {key[0] for key in KEYS}
ENTRY_POINTS = {module.removesuffix(".__main__"): module for module in MODULES.values()}
OF_SETTINGS = ("onpolicy_skd.train", "eval.trl_baseline")  # these parse with load_settings alone
OTHER_LANGUAGES = ("json", "python", "text", "yaml")  # of blocks that are no shell commands
OF_READERS = ("my.yaml", "chats.yaml")  # configs that the reader writes


def documented_commands(page):
    """Return the words of each command: all of the shell blocks, and code in the text that starts a known program."""
    commands = [
        words for language, code in BLOCK.findall(page) if language not in OTHER_LANGUAGES for words in run_by(code)
    ]
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*$", "", page, flags=re.MULTILINE)):
        if len(code.split()) > 1 and code.split()[0] in PROGRAMS:
            commands += run_by(code)
    return commands


def run_by(code):
    """Yield the words of each command that lines of a shell run, without assignments, redirections and loops."""
    variables = {}
    for line in re.sub(r"(?<!\S)#.*", "", code.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";<>")
        lexer.whitespace_split, lexer.commenters = True, ""
        for statement in " ".join(map(shlex.quote, lexer)).replace("';'", "\n").splitlines():
            words = shlex.split(re.split(r"'[<>]'", statement)[0])
            while words and (words[0] in ("do", "done", "time") or re.match(r"\w+=", words[0])):
                name, _, variables[name] = words.pop(0).partition("=")
            if words[:1] == ["for"]:
                variables[words[1]] = words[3]
            elif words:
                words = [new for word in words for new in expanded(word, variables)]
                yield words
                if words[:3] == ["ray", "job", "submit"]:
                    yield words[words.index("--") + 1 :] if "--" in words else words


def expanded(word, variables):
    """Return what the shell makes of a word: the words of ``$NAME``, or one word."""
    if re.fullmatch(r"\$\w+", word):
        return shlex.split(variables[word[1:]])
    return [re.sub(r"\$\{\w+[^}]*\}", "X", re.sub(r"\$(\w+)", lambda match: variables[match[1]], word))]


class ParsedError(BaseException):
    """Ends a program once its parser has accepted the arguments."""


def only_parses(method):
    """Return a method of ArgumentParser that checks settings among the arguments as well, and then ends the program."""

    def parse(parser, argv):
        args = method(parser, argv)
        build_settings(None, [parse_override(text) for text in getattr(args, "overrides", ())])
        raise ParsedError

    return parse


def check_arguments(words, monkeypatch):
    """Parse a command of ours by its program's own parser; raise SystemExit or ConfigError for what it refuses."""
    module, arguments = (MODULES[words[1]], words[2:]) if words[0] == "skd" else (words[2], words[3:])
    if module == "onpolicy_skd.cache" and arguments[:1] == ["build"]:
        module, arguments = "onpolicy_skd.train", arguments[1:]
    if not arguments or "--help" in arguments or module == "onpolicy_skd.cache":
        return
    if module in OF_SETTINGS:
        load_settings(["demo" if word in OF_READERS else word for word in arguments])
        return
    main = importlib.import_module(ENTRY_POINTS[module]).main
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, only_parses(getattr(argparse.ArgumentParser, name)))
        with pytest.raises(ParsedError):
            main(arguments)


def is_there(test):
    """Tell whether ``file`` or ``file::function`` exists."""
    file, _, function = test.partition("::")
    if not (ROOT / file).is_file():
        return False
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    return function in names if function else bool(names)


def test_commands_are_extracted_from_code_only():
    page = (
        "make sure of it: `make test`, `make` and `source`\n```\ntime python -m onpolicy_skd.cache build --config x \\"
        '\n  "a=b c;d"\nA="--x y"  # fast\nfor u in 4 16; do B=1 new $A u$u ${u#*=}_1 < in > out; done\n'
        "ray job submit -- python -m onpolicy_skd.train k=v  # after `ray start`\n```\n```text\nno command\n```\n"
    )
    assert documented_commands(page) == [
        ["python", "-m", "onpolicy_skd.cache", "build", "--config", "x", "a=b c;d"],
        ["new", "--x", "y", "u4", "X_1"],
        ["ray", "job", "submit", "--", "python", "-m", "onpolicy_skd.train", "k=v"],
        ["python", "-m", "onpolicy_skd.train", "k=v"],
        ["make", "test"],
        ["ray", "start"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_documented_command_has_a_test_or_a_reason(page):
    commands = documented_commands(page.read_text(encoding="utf-8"))
    missing = [" ".join(words) for words in commands if not any(words[: len(key)] == key for key in KEYS)]
    assert not missing, "add them to TESTS or OUTSIDE in tests/documented_commands.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_documented_command_of_ours_is_accepted_by_its_parser(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in documented_commands(page.read_text(encoding="utf-8")):
        ours = words[:2] == ["python", "-m"] and words[2] in ENTRY_POINTS
        try:
            if ours or (words[0] == "skd" and words[1] != "--help"):
                check_arguments(words, monkeypatch)
        except (SystemExit, ConfigError) as error:
            pytest.fail(f"{' '.join(words)}: {error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    "command",
    [
        "skd train --config demo positions.kk=0.1",
        "python -m onpolicy_skd.cache build --config demo cache.folder=x",
        "skd eval --model m --problem-count 3",
        "skd eval --model m eval.promblems=3",
        "python -m eval.performance lose --rounds 3",
        "skd compare --configs compare_demo",
    ],
)
def test_a_renamed_option_is_refused(command, monkeypatch):
    with pytest.raises((SystemExit, ConfigError)):
        check_arguments(command.split(), monkeypatch)


@pytest.mark.parametrize("command", OUTSIDE)
def test_every_command_without_a_test_is_shown_and_names_tests_that_exist(command):
    shown = [words for page in PAGES for words in documented_commands(page.read_text(encoding="utf-8"))]
    assert any(words[: len(command.split())] == command.split() for words in shown)
    assert command not in TESTS
    assert all(is_there(test) for test in re.findall(r"tests/[\w/]+\.py", OUTSIDE[command]))


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
        ("test", '-m pytest -m "not slow" tests/integration tests/unit -n auto'),
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
    printed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    lines = re.sub(r" \\\n\t+", " ", printed).splitlines()
    assert any("-m venv" in line for line in lines)  # each target sets up what it needs first
    assert program in lines[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", sources)) | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for name, rest in re.findall(r"\b(test_\w+)(…?)", page.read_text(encoding="utf-8")):
        known = any(test.startswith(name) for test in defined) if rest else name in defined
        assert known, f"{page.name} names {name}"
