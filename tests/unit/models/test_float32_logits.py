"""Logits of coarse types: on GPUs summed in float32 and never rounded, in learner, teacher and transformers engine.

A GPU's product is emulated: exact for bfloat16 inputs, with a float32 output.
"""

import pytest
import torch
from helpers import tiny_model, tiny_settings

from onpolicy_skd.models import lm_head
from onpolicy_skd.models.lm_head import Projector, row_statistics
from onpolicy_skd.rollout import transformers_engine
from onpolicy_skd.rollout.transformers_engine import TransformersEngine
from onpolicy_skd.types import RolloutRequest, SamplingParams

MM = torch.mm


def emulated(a, b, out_dtype=None, out=None):
    if out_dtype is None:
        return MM(a, b, out=out)
    assert a.dtype == b.dtype != torch.float32
    assert out_dtype == out.dtype == torch.float32
    return out.copy_(MM(a.float(), b.float()))


@pytest.fixture
def like_a_gpu(monkeypatch):
    for module in (lm_head, transformers_engine):
        monkeypatch.setattr(module, "keeps_float32_sums", lambda device: True)
    monkeypatch.setattr(torch, "mm", emulated)


def test_torch_has_the_product_with_float32_output():
    a, b, out = (torch.empty(*shape, dtype=dtype, device="meta") for shape, dtype in
                 (((3, 8), torch.bfloat16), ((8, 5), torch.bfloat16), ((3, 5), torch.float32)))  # fmt: skip
    assert torch.mm(a, b, out_dtype=torch.float32, out=out).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_keep_their_digits(dtype, like_a_gpu):
    """Logits near 30, where bfloat16 has steps of 0.125."""
    rng = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=rng).to(dtype) for n in (16, 97))
    head[0] = (30 * hidden[0].float() / hidden[0].float().square().sum()).to(dtype)
    exact = hidden.double() @ head.double().T
    assert torch.allclose(Projector(head, 16)(hidden).double(), exact, atol=1e-4)
    rounded = torch.empty(16, 97).copy_(hidden @ head.T)
    assert (rounded - exact).abs().max() > 1e-3
    log_q = exact.log_softmax(-1)
    statistics = row_statistics(hidden, head, torch.zeros(16, dtype=torch.long))
    assert torch.allclose(statistics.logprob_N.double(), log_q[:, 0], atol=1e-4)
    assert torch.allclose(statistics.entropy_N.double(), -(log_q.exp() * log_q).sum(-1), atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_the_transformers_engine_records_the_learners_log_probabilities(shared, like_a_gpu, monkeypatch):
    from onpolicy_skd.models.split_model import split

    settings = tiny_settings(rollout={"dtype": "bfloat16", "max_tokens": 6})
    model = tiny_model("qwen3", True) if shared else tiny_model("qwen3", True).bfloat16()
    monkeypatch.setattr(transformers_engine, "load_model", lambda *_: model)
    engine = TransformersEngine("bundled:demo_student", settings, shared=split(model, 97) if shared else None)
    head, seen = model.get_output_embeddings(), []
    forward = head.forward
    head.forward = lambda states: seen.append((states, forward(states))) or seen[-1][1]
    engine.generate([RolloutRequest("a", [5, 6, 7], 0)], SamplingParams(4))
    for states, logits in seen:
        assert logits.dtype == torch.float32
        exact = states.bfloat16().double() @ head.weight.bfloat16().double().T
        assert torch.allclose(logits.double(), exact, atol=1e-4)
    assert seen
