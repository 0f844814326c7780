"""Settings that name a built-in function or a plugin, ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, get_args

from onpolicy_skd.config.errors import ConfigError

PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class BuiltinOrPlugin:
    """Validator that accepts one of ``names`` or ``module:function``, which is imported later, where it is used."""

    def __init__(self, names: Any) -> None:
        self.names = get_args(names)

    def __call__(self, value: str) -> str:
        if value not in self.names and not PLUGIN.fullmatch(value):
            near = difflib.get_close_matches(value, self.names, n=1)
            raise ValueError(f"not known; did you mean {near[0]!r}?" if near else "not known")
        return value


def find(name: str, known: Mapping[str, Any], setting: str) -> Any:
    """Return ``known[name]`` or the function that ``module:function`` names.  Raises ConfigError naming ``setting``."""
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # the command skd omits the working directory, which Ray adds in its workers
        sys.path.append(os.getcwd())
    accepted = f"accepted: {', '.join(known)}, or module:function"
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}={name}: cannot be imported ({error}); {accepted}") from None
    if not callable(function):
        raise ConfigError(f"{setting}={name}: is not a function; {accepted}")
    return function
