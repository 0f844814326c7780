"""The comparison of teacher engines, as far as it needs no vLLM."""

import pytest
from helpers import tiny_settings

from eval.teacher_engines import measure
from onpolicy_skd.data.chat import special_ids
from onpolicy_skd.learner import learner
from onpolicy_skd.models.loading import load_tokenizer


def test_its_learner_knows_the_special_tokens(tmp_path, monkeypatch):
    class LearnerStartedError(Exception):
        pass

    def start(*_, special_ids=()):
        raise LearnerStartedError(special_ids)

    monkeypatch.setattr(learner, "Learner", start)
    settings = tiny_settings(run={"dir": tmp_path, "device": "cpu"}, mode="off_policy")
    with pytest.raises(LearnerStartedError) as error:
        measure(settings, samples=1, steps=1)
    assert set(error.value.args[0]) == special_ids(load_tokenizer("bundled:demo_student"))
