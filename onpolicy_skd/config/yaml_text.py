"""YAML for settings: refuse values that YAML 1.1 reads differently from how they look, and aliases that explode."""

from __future__ import annotations

import re
from typing import Any

import yaml

LARGEST = 10_000  # values in a document, counting aliases at each use
# Settings whose text may well hold a "#"; those of data also within data.mix.
FREE_TEXT = re.compile(r"(data(\.mix\.\d+)?\.(instruction|system|plain)|teacher\.prompt)")
ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|.*:.*|.*(__|_$|_\.|\._|_[eE]).*)")


class RefusedYAML(yaml.YAMLError):
    """YAML that is easily misread; the message says what to write."""


def parse(text: str) -> Any:
    """Return the value of a YAML document.  Raises yaml.YAMLError, and ValueError for dates that do not exist."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, "", {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, key: str, sizes: dict[int, int]) -> int:
    """Check ``node`` and return its number of values, aliases expanded.

    ``sizes`` caches the results by ``id(node)``; 0 marks a node whose check has not ended.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise RefusedYAML(f"{key}: an alias of the mapping or list that contains it, so nested without end")
        return sizes[id(node)]
    sizes[id(node)] = size = 0
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, key)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        size = sum(_size(value, f"{key}.{name.value}".lstrip("."), sizes) for name, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        size = sum(_size(item, f"{key}.{number}", sizes) for number, item in enumerate(node.value))
    if size > LARGEST:
        raise RefusedYAML(f"{key or 'the document'}: its aliases expand to more than {LARGEST} values")
    sizes[id(node)] = size + 1
    return size + 1


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for name, _ in node.value:
        if isinstance(name, yaml.ScalarNode):
            line = name.start_mark.line + 1
            if (name.tag, name.value) in lines:
                first = lines[name.tag, name.value]
                raise RefusedYAML(
                    f"line {line}: {name.value!r} is there twice, the first time in line {first}; merge them"
                )
            lines[name.tag, name.value] = line


def _check_scalar(node: yaml.ScalarNode, key: str) -> None:
    if node.style is not None:
        return  # quoted or a block: YAML reads the text as written
    line = node.start_mark.line + 1
    if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ODD_NUMBER.fullmatch(node.value):
        value = yaml.safe_load(node.value)
        raise RefusedYAML(f"line {line}: YAML reads {node.value} as the number {value}; write {value}, or quote a text")
    rest = (node.end_mark.buffer or "")[node.end_mark.pointer :].partition("\n")[0]
    if FREE_TEXT.search(key) and rest.lstrip().startswith("#"):
        raise RefusedYAML(
            f"line {line}: {key}: a comment starts at {rest.strip()[:20]!r}; quote the text if it belongs to it"
        )
