"""Settings from mappings, YAML files and command lines.

``load_settings(["--config", "configs/demo.yaml", "learner.lr=5e-6"])`` reads a YAML file (which may name another one
under ``extends``), applies the overrides, and refuses unknown keys, wrong types and impossible combinations with the
key's name and what is accepted.
"""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import AfterValidator, ValidationError

from onpolicy_skd.config import validation as compatibility
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.plugins import BuiltinOrPlugin
from onpolicy_skd.config.schema import Section, Settings

DEEPEST = 20  # files that extend each other, and sections within sections


def walk(section: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf as (dotted key, pydantic field)."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from walk(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def accepted(field: Any) -> str:
    """The choices or the range of a setting, in words; empty if its type says it all."""
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
    """Validated settings of a nested mapping. Raises ConfigError with one line per problem."""
    fields = dict(walk())
    known = [*fields, *Settings.model_fields]
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                near = near or [k for k in known if k.rsplit(".")[-1] == key.rsplit(".")[-1]][:1]
                hint = f"; did you mean {near[0]!r}?" if near else "; see --help for all settings"
                problems.append(f"unknown setting {key!r}{hint}")
            else:
                message = item["msg"].removeprefix("Value error, ")
                own = item["type"] == "value_error" and key not in fields
                allowed = accepted(fields[key]) if key in fields and item["type"] != "literal_error" else ""
                hint = f"; accepted: {allowed}" if allowed else ""
                problems.append(message if own else f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}{hint}")
        raise ConfigError("\n".join(problems)) from None
    compatibility.check(settings)
    return settings


def describe() -> str:
    """The text of ``--help``: each setting with its default, what is accepted, and its meaning."""
    lines = []
    for key, field in walk():
        allowed = accepted(field)
        lines.append(f"  {key}={_shown(field.default)}" + (f"   [{allowed}]" if allowed else ""))
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "" if value is None else repr(value) if value == "" or "\n" in str(value) else str(value)


def read_yaml(path: Path, seen: Sequence[Path] = ()) -> dict[str, Any]:
    """The mapping in ``path``, merged over the file that its ``extends`` names (relative to itself)."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and numbers that are none
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: must hold a mapping of settings, not {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if not parent:
        return tree
    if not isinstance(parent, str) or "\0" in parent:
        raise ConfigError(f"--config {path}: extends={parent!r}; accepted: the name of another YAML file")
    if len(seen) >= DEEPEST:
        raise ConfigError(f"--config {path}: extends goes round, or through more than {DEEPEST} files")
    return merge(read_yaml(path.parent / parent, (*seen, path)), tree)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on top, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """``"a.b=value"`` as a nested mapping; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r}: an override reads section.name=value, for example learner.lr=5e-6")
    try:
        node: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{text!r}: the value is not YAML") from None
    if key.count(".") > DEEPEST:
        raise ConfigError(f"{key!r}: an override reads section.name=value, for example learner.lr=5e-6")
    for part in reversed(key.split(".")):
        node = {part: node}
    return node


def load_settings(argv: Sequence[str], program: str = "onpolicy_skd.train", about: str = "") -> Settings:
    """Settings of a command line: ``--config FILE`` and ``a.b=value`` overrides.

    ``--help`` prints every setting and exits.  Raises ConfigError.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=about,
        epilog="settings (name=default, what is accepted, meaning):\n" + describe().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="a YAML file with any of the settings below")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that win over the file's")
    args = parser.parse_args(argv)
    return build_settings(args.config, [parse_override(text) for text in args.overrides])


def build_settings(file: Path | None, overrides: Sequence[dict[str, Any]] = ()) -> Settings:
    """Settings of a YAML file, each of ``overrides`` laid on top in turn.  Raises ConfigError."""
    try:
        return resolve(functools.reduce(merge, overrides, read_yaml(file) if file else {}))
    except RecursionError:  # an alias within itself, or brackets without end
        raise ConfigError(f"--config {file}: nested without end; accepted: sections of settings") from None


def dump(settings: Settings) -> str:
    """The resolved settings as YAML; ``resolve(yaml.safe_load(dump(s))) == s``."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
