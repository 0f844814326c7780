"""AdamW with moments of 32 and of 8 bits."""

import importlib.util

import pytest
import torch
from helpers import tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import LearnerSettings
from onpolicy_skd.config.validation import check
from onpolicy_skd.learner import optimizer
from onpolicy_skd.learner.optimizer import build_optimizer, load_optimizer_tensors, optimizer_tensors
from onpolicy_skd.run.preflight import preflight
from onpolicy_skd.storage import checkpoint

STEPS = 12
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}


def parameters() -> dict[str, torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(1)
    shapes = {"matrix": (96, 64), "vector": (5000,)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=rng)) for name, shape in shapes.items()}


def gradient(name: str, parameter: torch.Tensor, step: int) -> torch.Tensor:
    """A noisy gradient whose size differs by rows."""
    rng = torch.Generator().manual_seed(100 * step + len(name))
    return (parameter.detach() - 1.0) * torch.randn(parameter.shape, generator=rng).exp()


def step(named: dict[str, torch.nn.Parameter], opt: torch.optim.Optimizer, number: int) -> None:
    for name, parameter in named.items():
        parameter.grad = gradient(name, parameter, number)
    opt.step()


def reference(names: tuple[str, ...] = ("matrix", "vector")) -> dict[str, torch.Tensor]:
    """AdamW in float64 (Loshchilov and Hutter, 2019, Algorithm 2); vectors do not decay."""
    lr, beta1, beta2, decay = (SETTINGS[k] for k in ("lr", "beta1", "beta2", "weight_decay"))
    result = {}
    for name in names:
        w = parameters()[name].detach().double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t in range(1, STEPS + 1):
            g = gradient(name, w.float(), t).double()
            w = w * (1 - lr * decay * (w.ndim > 1))
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            w = w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        result[name] = w
    return result


@pytest.mark.parametrize(("kind", "tolerance"), [("adamw", 1e-5), ("adamw_8bit", 0.05)])
def test_the_optimizer_is_adamw(kind, tolerance):
    named, expected = parameters(), reference()
    opt = build_optimizer(named, LearnerSettings(optimizer=kind, **SETTINGS))
    for number in range(1, STEPS + 1):
        step(named, opt, number)
    for name, parameter in named.items():
        moved = (expected[name] - parameters()[name].double()).norm()
        assert (parameter.double() - expected[name]).norm() < tolerance * moved, name
    moments = [t for t in optimizer_tensors(opt, named).values() if t.shape == (96, 64)]
    assert [t.dtype for t in moments] == [torch.uint8 if kind == "adamw_8bit" else torch.float32] * 2


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_checkpoint_continues_with_the_same_weights(kind, tmp_path):
    settings, named = LearnerSettings(optimizer=kind, **SETTINGS), parameters()
    opt = build_optimizer(named, settings)
    for number in range(3):
        step(named, opt, number)
    checkpoint.save(tmp_path, 3, {}, optimizer_tensors(opt, named), keep=1)
    resumed = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    again = build_optimizer(resumed, settings)
    load_optimizer_tensors(again, resumed, checkpoint.newest(tmp_path).tensors)
    for number in range(3, 6):
        step(named, opt, number)
        step(resumed, again, number)
    assert all(torch.equal(resumed[name], named[name]) for name in named)


def test_8_bit_moments_are_refused_without_their_package_and_on_several_ranks(monkeypatch):
    with pytest.raises(ConfigError, match=r"learner\.ranks=2: learner\.optimizer=adamw_8bit"):
        check(tiny_settings(learner={"optimizer": "adamw_8bit", "ranks": 2}))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        optimizer.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    with pytest.raises(ConfigError, match="the package bitsandbytes is not installed"):
        preflight(tiny_settings(learner={"optimizer": "adamw_8bit"}))
