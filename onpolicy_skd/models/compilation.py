"""Compilation of the decoder layers of a model by torch.compile."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.models.errors import ModelError

COMPILERS = {"cpu": ("CXX", ("g++",)), "cuda": ("CC", ("gcc", "clang"))}  # as Inductor and Triton look for them


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """Return the layers of a transformers ``model``, which its ``_no_split_modules`` names; none if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: Any) -> None:
    """Make each decoder layer of ``model`` compile at its first forward; layers of one kind share the compiled code.

    Names of parameters do not change, and copies of the model are not compiled.  Raises ModelError if the model family
    does not name its layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ModelError(f"learner.compile: {type(model).__name__} does not name its decoder layers; accepted: false")
    for layer in layers:
        layer.compile(dynamic=True)


def check_compiler(device: str) -> None:
    """Raise ConfigError if ``learner.compile`` finds no compiler here for code on ``device``, cpu or cuda."""
    variable, names = COMPILERS[device]
    candidates = [os.environ[variable]] if os.environ.get(variable) else list(names)
    if not any(shutil.which(candidate) for candidate in candidates):
        raise ConfigError(
            f"learner.compile=true: torch.compile needs a compiler, for run.device={device} {' or '.join(candidates)}, "
            f"and none is on the PATH; install one, name one in the environment variable {variable}, or use false"
        )
