"""Build settings from mappings, YAML files and command lines.

``load_settings(["--config", "configs/demo.yaml", "learner.lr=5e-6"])`` reads a YAML file (which may name another one
under ``extends``) and applies the overrides.  Unknown keys, wrong types and impossible combinations are refused; the
error names the setting and what is accepted.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from onpolicy_skd.config import shipped, validation, yaml_text
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.plugins import BuiltinOrPlugin
from onpolicy_skd.config.schema import Settings, is_text, walk

DEEPEST = 20  # files that extend each other, and sections within sections
MOST_PROBLEMS = 20  # lines of an error
OVERRIDE = "an override reads section.name=value, for example learner.lr=5e-6"
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


@functools.cache
def fields_by_key() -> dict[str, FieldInfo]:
    """Return all settings by dotted key."""
    return dict(walk())


def accepted(field: Any) -> str:
    """Return the choices or the range of a setting in words; empty if the type alone says it."""
    for item in field.metadata:
        if isinstance(item, AfterValidator) and isinstance(item.func, BuiltinOrPlugin):
            return " | ".join((*item.func.names, "module:function"))
    values = get_args(field.annotation)
    if values and all(isinstance(v, str) for v in values):
        return " | ".join(values)
    words = {"gt": "above", "ge": "at least", "le": "at most", "lt": "below"}
    bounds = [(words[name], getattr(item, name)) for item in field.metadata for name in words if hasattr(item, name)]
    return ", ".join(f"{word} {bound:g}" for word, bound in bounds)


def resolve(tree: dict[str, Any]) -> Settings:
    """Return the validated settings of a nested mapping.  Raises ConfigError with one line per problem."""
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ConfigError("\n".join(problems[:MOST_PROBLEMS] + more)) from None
    validation.check(settings)
    return settings


def _problem(item: ErrorDetails) -> str:
    """Return pydantic's error as one line that names the setting; long inputs are shortened."""
    fields, key = fields_by_key(), ".".join(str(name) for name in item["loc"])[:200]
    if item["type"] == "extra_forbidden":
        known = [*fields, *Settings.model_fields]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in known if k.rsplit(".")[-1] == key.rsplit(".")[-1]][:1]
        return f"unknown setting {key!r}" + (
            f"; did you mean {near[0]!r}?" if near else "; see --help for all settings"
        )
    message = item["msg"].removeprefix("Value error, ")
    allowed = accepted(fields[key]) if key in fields and item["type"] != "literal_error" else ""
    if item["type"] == "list_type":
        allowed = "a list, for example [a, 'b #c'], with quotes around text that holds any of # : , [ ]"
    if item["type"] == "string_type":
        allowed = "text; in a file, quote what YAML reads as a number or date"
    hint = f"; accepted: {allowed}" if allowed else ""
    return f"{key}={_repr.repr(item['input'])}: {message[0].lower()}{message[1:]}{hint}"


def describe() -> str:
    """Return the text of ``--help``: each setting with its default, what is accepted, and its meaning."""
    lines = []
    for key, field in fields_by_key().items():
        conditions = validation.conditions_of(field)
        limits = [accepted(field), f"only with {conditions}" if conditions else ""]
        shown = "; ".join(limit for limit in limits if limit)
        lines.append(f"  {key}={_shown(field.default)}" + (f"   [{shown}]" if shown else ""))
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "" if value is None else repr(value) if value == "" or "\n" in str(value) else str(value)


def read_yaml(path: Path, seen: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the mapping in ``path``, merged over the file that its ``extends`` names (relative to itself)."""
    try:
        tree = yaml_text.parse(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from None
    except yaml_text.RefusedYAML as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates that do not exist, not UTF-8
        why = " ".join(str(error).split())[:500]
        raise ConfigError(f"--config {path}: not YAML: {why} (quote text that holds ': ' or ' #')") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must hold a mapping of settings, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if not parent:
        return tree
    if not isinstance(parent, str) or "\0" in parent:
        shown = _repr.repr(parent)
        raise ConfigError(f"--config {path}: extends={shown}; accepted: the name of another YAML file")
    if len(seen) >= DEEPEST:
        raise ConfigError(f"--config {path}: extends goes round, or through more than {DEEPEST} files")
    return merge(read_yaml(path.parent / parent, (*seen, path)), tree)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with the values of ``over``, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """Return ``"a.b=value"`` as a nested mapping.

    The value of a setting that holds text is taken as given; other values are YAML.  Raises ConfigError.
    """
    key, equals, value = text.partition("=")
    if not equals or not key or key.count(".") > DEEPEST:
        raise ConfigError(f"{_repr.repr(text)}: {OVERRIDE}")
    field = fields_by_key().get(key.removeprefix("settings."))  # overrides of a comparison have this prefix
    node: Any = value
    if field is None or not is_text(field.annotation):
        node = _parse_value(text, key, value)
    elif value in ("", "null") and field.default is None:
        node = None
    return nest(key, node)


def nest(key: str, value: Any) -> Any:
    """Return ``value`` inside the sections of a dotted key: ``nest("a.b", 1)`` is ``{"a": {"b": 1}}``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _parse_value(text: str, key: str, value: str) -> Any:
    try:
        return yaml_text.parse(value, key)
    except yaml_text.RefusedYAML as error:
        raise ConfigError(f"{_repr.repr(text)}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{_repr.repr(text)}: the value is not YAML (quote text that holds ': ' or ' #')") from None


def load_settings(argv: Sequence[str], prog: str = "python -m onpolicy_skd.train", about: str = "") -> Settings:
    """Return the settings of a command line: ``--config FILE-OR-NAME`` and ``a.b=value`` overrides.

    ``--help`` prints all settings and exits.  Raises ConfigError.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=about,
        epilog="settings (name=default, what is accepted, meaning):\n" + describe().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="a YAML file with any of the settings below, or the name of a shipped one (skd configs)",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that win over the file's")
    args = parser.parse_args(argv)
    return build_settings(args.config, [parse_override(text) for text in args.overrides])


def load_config(config: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a config, for Python: ``load_config("demo", {"run.steps": 20})``.

    ``config`` is a YAML file or the name of a shipped config; None takes all defaults.  ``overrides`` maps dotted keys
    to values.  Raises ConfigError with one line per problem.
    """
    trees = [nest(key, value) for key, value in (overrides or {}).items()]
    return build_settings(None if config is None else Path(config), trees)


def build_settings(file: Path | None, overrides: Sequence[dict[str, Any]] = ()) -> Settings:
    """Return the settings of a YAML file or a shipped config, merged with each of ``overrides`` in order.

    Raises ConfigError.
    """
    try:
        return resolve(functools.reduce(merge, overrides, read_yaml(shipped.find(file.expanduser())) if file else {}))
    except RecursionError:
        raise ConfigError(f"--config {file}: nested without end; accepted: sections of settings") from None


def dump(settings: Settings) -> str:
    """Return the resolved settings as YAML; ``resolve(yaml.safe_load(dump(s))) == s``."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
