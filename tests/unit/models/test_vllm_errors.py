"""vLLM's errors in one line with its reason, for both engines."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pydantic
import pytest
from helpers import tiny_settings

from onpolicy_skd.models import vllm_setup
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.rollout.vllm_engine import VLLMEngine
from onpolicy_skd.teacher import vllm_teacher

MODEL = "bundled:demo_student"


class Config(pydantic.BaseModel):
    length: int

    @pydantic.field_validator("length")
    @classmethod
    def refuse(cls, length):
        raise ValueError(f"{length} tokens are more than the model has positions\nPages of advice")


def start_rollout():
    VLLMEngine(MODEL, tiny_settings())


def start_teacher():
    vllm_teacher._start({"model": MODEL}, "cpu")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (lambda **_: Config(length=9), "Value error, 9 tokens are more than the model has positions"),
        (lambda **_: int("x\ny"), "ValueError: invalid literal for int() with base 10: 'x\\ny'"),
    ],
)
@pytest.mark.parametrize(("start", "setting"), [(start_rollout, "rollout"), (start_teacher, "teacher")])
def test_a_configuration_that_vllm_refuses_is_reported_with_its_reason(monkeypatch, start, setting, failure, reason):
    vllm, config = ModuleType("vllm"), ModuleType("vllm.config")
    vllm.__spec__ = ModuleSpec("vllm", None)
    vllm.LLM, config.PoolerConfig = lambda *_, **kwargs: failure(**kwargs), None
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    monkeypatch.setattr(vllm_setup, "vllm_version", lambda: "0+cpu")
    with pytest.raises(ModelError) as refusal:
        start()
    assert str(refusal.value) == f"{setting}.engine=vllm: vLLM cannot run {MODEL!r}: {reason}"
