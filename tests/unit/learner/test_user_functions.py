"""The example of docs/extending.md: a metric, a policy, a weighting and a gate of the user's."""

import sys

import pytest
import torch
from helpers import ROOT, make_trajectories
from learner_helpers import LENGTHS, build, gradients, relative

from onpolicy_skd.config.loading import merge, parse_override

PAGE = (ROOT / "docs" / "extending.md").read_text()
LINE = next(text for text in PAGE.splitlines() if "positions.metric=surprise" in text)


@pytest.fixture
def sections(tmp_path, monkeypatch):
    """Return the settings of the example's command, whose module can be imported."""
    (tmp_path / "surprise.py").write_text(PAGE.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "surprise", raising=False)
    tree = {}
    for word in LINE.split():
        if "=surprise:" in word:
            tree = merge(tree, parse_override(word))
    assert len(tree["positions"]) == 3
    assert len(tree["alignment"]) == 1
    return tree


def test_the_example_trains_and_each_function_takes_part(sections):
    batch = make_trajectories(LENGTHS)
    learner, teacher = build(**sections)
    together = gradients(learner, teacher, batch)
    assert relative(gradients(*build(budget=40, **sections), batch), together) < 1e-5
    record = learner.step(batch)
    assert 0 < record.positions_selected < record.positions
    assert torch.isfinite(torch.tensor(record.grad_norm))
    for section, key in (("positions", "metric"), ("positions", "policy"), ("positions", "weighting"),
                         ("alignment", "mixture")):  # fmt: skip
        without = sections | {section: {k: v for k, v in sections[section].items() if k != key}}
        assert relative(gradients(*build(**without), batch), together) > 1e-3, key
