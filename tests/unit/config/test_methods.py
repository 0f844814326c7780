"""The shipped configs of published methods: each loads, says what is the paper's, and is in the table of methods."""

import re

import pytest
from helpers import ROOT

from onpolicy_skd.config.loading import build_settings, flat, parse_override
from onpolicy_skd.config.shipped import shipped

METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
TABLES = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").partition("## 12. All methods")[2]
SETTING = re.compile(r"(?<![\w.])(mode|[a-z]+\.[\w.]+)(?:=([^\s`]+))?")
# What may make a method; models, data, budget and optimizer are those of methods/opd.
METHOD_KEYS = re.compile(
    r"mode|run\.name|eval\.teacher|(positions|samples|classes|alignment|references)\..*"
    r"|rollout\.(n|share|max_tokens_.*|top_p)|teacher\.(model|prompt|ema_decay|placement)"
)


def settings_of(path):
    """Return the resolved settings of a config by dotted key."""
    return flat(build_settings(path).model_dump(mode="json"))


def changed_from_opd(path):
    """Return the keys whose value differs from that of methods/opd."""
    base = settings_of(path.with_name("opd.yaml"))
    return [key for key, value in settings_of(path).items() if base[key] != value]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_each_method_loads_by_its_name_and_differs_in_its_method_alone(path):
    settings = settings_of(path)
    assert settings["run.name"] == path.stem
    assert f"methods/{path.stem}" in shipped()
    changed = changed_from_opd(path)
    assert [key for key in changed if not METHOD_KEYS.fullmatch(key)] == []
    assert len(changed) > 1 or path.stem == "opd"


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_the_row_of_each_method_names_every_setting_that_differs_from_opd(path):
    row = next(line for line in TABLES.splitlines() if f"`methods/{path.stem}` |" in line)
    named = dict(SETTING.findall(" ".join(re.findall(r"`([^`]+)`", row.split(" | ")[1]))))
    derived = {"run.name", "eval.teacher"}  # eval.teacher follows teacher.model=student
    assert set(changed_from_opd(path)) - derived <= named.keys() <= settings_of(path).keys()
    settings = settings_of(path)
    given = [flat(parse_override(f"{key}={value}")) for key, value in named.items() if value]
    assert [pair for tree in given for pair in tree.items() if settings[pair[0]] != pair[1]] == []


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_each_method_says_what_is_the_papers_and_what_is_our_reading(path):
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"The (paper|draft)'s|Theirs", comment)
    assert "Our reading: " in comment


def test_the_table_of_methods_names_every_config_and_no_other():
    named = set(re.findall(r"`((?:methods|paper)/[\w/]+)`", TABLES))
    assert {f"methods/{p.stem}" for p in METHODS} == {n for n in named if n.startswith("methods/")}
    assert named <= shipped().keys()
