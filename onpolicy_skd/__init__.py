"""On-policy selective distillation of language models on Ray.

``from onpolicy_skd import Settings, load_config, train, evaluate`` is the Python API (docs/python.md).  Names are
imported on first use, because they import torch and Ray.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onpolicy_skd.config.errors import ConfigError
    from onpolicy_skd.config.loading import load_config
    from onpolicy_skd.config.schema import Settings
    from onpolicy_skd.evaluation.evaluate import Evaluation
    from onpolicy_skd.run.evaluate import evaluate
    from onpolicy_skd.run.exits import RunError
    from onpolicy_skd.train import RunResult
    from onpolicy_skd.train import run_settings as train

__version__ = "0.1.0"
__all__ = ["ConfigError", "Evaluation", "RunError", "RunResult", "Settings", "evaluate", "load_config", "train"]

if sys.argv[:1] == ["-m"]:  # `python -m onpolicy_skd.X` puts the working directory first on sys.path
    from onpolicy_skd import siblings

    siblings.bind()

_MODULES = {
    "ConfigError": "config.errors",
    "Evaluation": "evaluation.evaluate",
    "RunError": "run.exits",
    "RunResult": "train",
    "Settings": "config.schema",
    "evaluate": "run.evaluate",
    "load_config": "config.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or the callable module ``train``."""
    from importlib import import_module

    if name in ("train", "RunResult"):
        from onpolicy_skd import siblings

        siblings.bind()
    if name == "train":
        return import_module("onpolicy_skd.train")
    if name in _MODULES:
        return getattr(import_module(f"onpolicy_skd.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
