"""Every shipped config of a method trains: its selection and its loss on tiny models."""

import dataclasses
import math

import pytest
from helpers import ROOT, make_trajectories
from learner_helpers import LENGTHS, build

from onpolicy_skd.config.loading import build_settings

METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_makes_its_first_steps(path):
    settings = build_settings(path)
    sections = {name: getattr(settings, name).model_dump() for name in ("positions", "classes", "alignment")}
    learner, teacher = build(**sections)
    for version in range(2):
        batch = make_trajectories(LENGTHS, seed=version, version=version)
        teacher.encode(batch)
        record = dataclasses.asdict(learner.step(batch))
        assert math.isfinite(record["loss"])
        assert record["grad_norm"] > 0
        assert 0 < record["positions_selected"] <= record["positions"]
