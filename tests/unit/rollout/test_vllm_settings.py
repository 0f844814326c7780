"""What the vLLM engine asks of vLLM, without vLLM."""

from types import SimpleNamespace

import pytest

from onpolicy_skd.models import vllm_setup
from onpolicy_skd.models.loading import ModelError
from onpolicy_skd.models.vllm_setup import require_vllm
from onpolicy_skd.rollout.vllm_engine import VLLMEngine


def test_the_gpu_build_is_refused_on_the_cpu(monkeypatch):
    monkeypatch.setattr(vllm_setup.importlib.util, "find_spec", lambda _: object())
    for version, refused in (("0.32.0+cpu", False), ("0.32.0", True)):
        monkeypatch.setattr(vllm_setup, "vllm_version", lambda version=version: version)
        require_vllm("cuda")
        if refused:
            with pytest.raises(ModelError, match=r"run\.device=cpu.*GPU build.*transformers"):
                require_vllm("cpu")
        else:
            require_vllm("cpu")


@pytest.mark.parametrize("dropped", [True, False])
def test_a_prefix_cache_that_is_not_dropped_is_an_error(dropped):
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.version, engine._asleep, engine._on_cpu, engine._devices = 3, False, False, 1
    loaded = []
    engine._llm = SimpleNamespace(
        collective_rpc=lambda name, kwargs: loaded.append(name), reset_prefix_cache=lambda: dropped
    )
    if dropped:
        engine.load_weights([], 4)
    else:
        with pytest.raises(RuntimeError, match="prefix cache"):
            engine.load_weights([], 4)
    assert loaded == ["reload_weights"]
    assert engine.version == (4 if dropped else 3)
