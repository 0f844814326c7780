"""The shipped configs of published methods: each loads, says what is the paper's, and is in the table of methods."""

import re

import pytest
from helpers import ROOT

from onpolicy_skd.config.loading import build_settings, flat
from onpolicy_skd.config.shipped import shipped

METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
# What may make a method; models, data, budget and optimizer are those of methods/opd.
PARTS = re.compile(
    r"mode|run\.name|eval\.teacher|(positions|samples|classes|alignment|references)\..*"
    r"|rollout\.(n|share|max_tokens_.*|top_p)|teacher\.(model|prompt|ema_decay|placement)"
)


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_each_method_loads_by_its_name_and_differs_in_its_method_alone(path):
    settings = build_settings(path)
    assert settings.run.name == path.stem
    assert f"methods/{path.stem}" in shipped()
    base = flat(build_settings(path.with_name("opd.yaml")).model_dump(mode="json"))
    changed = [key for key, value in flat(settings.model_dump(mode="json")).items() if base[key] != value]
    assert [key for key in changed if not PARTS.fullmatch(key)] == []
    assert len(changed) > 1 or path.stem == "opd"


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_each_method_says_what_is_the_papers_and_what_is_our_reading(path):
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"The (paper|draft)'s|Theirs", comment)
    assert "Our reading: " in comment


def test_the_table_of_methods_names_every_config_and_no_other():
    text = (ROOT / "docs" / "method.md").read_text()
    table = text[text.index("## 12. All methods") :]
    named = set(re.findall(r"`((?:methods|paper)/[\w/]+)`", table))
    assert {f"methods/{p.stem}" for p in METHODS} == {n for n in named if n.startswith("methods/")}
    assert named <= shipped().keys()
