"""A learner with its teacher, and its gradients, for tests of one or several ranks."""

from functools import partial
from unittest import mock

import torch
from helpers import VOCABULARY, tiny_model, tiny_settings

from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.lora import add_lora
from onpolicy_skd.models.split_model import split
from onpolicy_skd.teacher.teacher import Teacher

LENGTHS = [(5, 9), (3, 20), (12, 4), (7, 1), (2, 15), (9, 11), (4, 6), (6, 17)]
FAMILIES = [(f, tied) for f in ("qwen3", "llama", "gpt_neox") for tied in (True, False)]


def build(
    family="qwen3",
    tied=False,
    teacher=None,
    budget=10_000,
    steps=100,
    ranks=None,
    lora=0,
    model=None,
    teacher_class=Teacher,
    **sections,
):
    """Return a learner of ``model``, or of a new one, and its teacher, which is wider unless one is given."""
    settings = tiny_settings(**sections)
    settings = settings.model_copy(
        update={"learner": settings.learner.model_copy(update={"tokens_per_micro_batch": budget})}
    )
    model = model or tiny_model(family, tied)
    student = split(add_lora(model, lora, 2 * lora, seed=0) if lora else model, VOCABULARY)
    teacher_model = split(teacher or tiny_model("qwen3", False, hidden=48, seed=1), VOCABULARY)
    other = teacher_class(teacher_model, 10_000, 0)
    return Learner(student, other, settings, pad_id=0, steps=steps, ranks=ranks, special_ids=[0, 1]), other


def gradients(learner, teacher, batch):
    """Return the gradient of the objective on ``batch`` by parameter name."""
    teacher.encode(batch)
    learner.state.optimizer.zero_grad()
    learner.accumulate(batch)
    return {n: p.grad.clone() for n, p in learner.state.named.items()}


def relative(actual, expected):
    """Return the length of the difference of two gradients relative to the expected one."""
    squares = sum((actual[n] - expected[n]).double().square().sum() for n in expected)
    return (squares / sum(g.double().square().sum() for g in expected.values())).sqrt().item()


def compiled_graphs():
    """Return the number of graphs that torch.compile has captured."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graphs_without_code():
    """Let torch.compile capture forward and backward graphs within the block, but run them without generated code.

    The C++ compiler takes a minute or more for the layers of a tiny model.
    """
    return mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))
