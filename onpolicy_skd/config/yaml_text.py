"""YAML for settings: refuse values that YAML 1.1 reads differently from how they look, and aliases that explode."""

from __future__ import annotations

import functools
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from onpolicy_skd.config.plugins import BuiltinOrPlugin
from onpolicy_skd.config.schema import is_text, walk

LARGEST = 10_000  # values in a document, counting aliases at each use
# Settings whose text may well hold a "#"; those of data also within data.mix.
FREE_TEXT = re.compile(r"(data(\.mix\.\d+)?\.(instruction|system|plain)|teacher\.prompt|rollout\.stop(\.\d+)?)$")
SOURCE, ITEM = re.compile(r"\bdata\.mix\.\d+\."), re.compile(r"\.\d+$")
COMMENT = re.compile(r"(?P<gap>[ \t]*(?P<lines>(\r?\n[ \t]*)*))(?P<text>#[^\r\n\0]*)")
ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|.*:.*|.*(__|_$|_\.|\._|_[eE]).*)")


class RefusedYAML(yaml.YAMLError):
    """YAML that is easily misread; the message says what to write."""


def parse(text: str, key: str = "") -> Any:
    """Return the value of a YAML document, or of the setting ``key``.

    Raises yaml.YAMLError, and ValueError for dates that do not exist.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None and key and text.strip():
            raise RefusedYAML(f"a comment starts at {text.strip()[:20]!r}; quote text inside the value: ['####']")
        if node is None:
            return None
        _size(node, key, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, key: str, sizes: dict[int, int], column: int = -1) -> int:
    """Check ``node`` and return its number of values, aliases expanded.

    ``sizes`` caches the results by ``id(node)``; 0 marks a node whose check has not ended.  ``column``: column of the
    key or dash before ``node``; -1 in brackets and braces.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise RefusedYAML(f"{key}: an alias of the mapping or list that contains it, so nested without end")
        return sizes[id(node)]
    sizes[id(node)] = size = 0
    block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    if isinstance(node, yaml.ScalarNode):
        _check_number(node)
        _check_comment(node, key, column)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        for name, value in node.value:
            inner = name.start_mark.column if block else -1
            size += _size(value, f"{key}.{name.value}".lstrip("."), sizes, inner)
    elif isinstance(node, yaml.SequenceNode):
        inner = node.start_mark.column if block else -1
        size = sum(_size(item, f"{key}.{number}", sizes, inner) for number, item in enumerate(node.value))
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


def _check_number(node: yaml.ScalarNode) -> None:
    number = node.style is None and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    if number and ODD_NUMBER.fullmatch(node.value):
        line, value = node.start_mark.line + 1, yaml.safe_load(node.value)
        raise RefusedYAML(f"line {line}: YAML reads {node.value} as the number {value}; write {value}, or quote a text")


def _check_comment(node: yaml.ScalarNode, key: str, column: int) -> None:
    """Raise RefusedYAML if the comment after ``node`` may be meant as a part of its text.

    After free text, any comment may: in the same line, or in a later line that is indented like a continuation.  After
    a name, only a comment without the usual spaces may: ``my #model``, but neither ``model  #comment`` nor
    ``model # comment``.
    """
    comment = COMMENT.match(node.end_mark.buffer or "", node.end_mark.pointer)
    if node.style is not None or comment is None:
        return  # quoted or a block: YAML reads the text as written
    lines = comment["lines"].count("\n")
    if FREE_TEXT.search(key):
        misread = not lines or len(comment["gap"].rpartition("\n")[2]) > column
    else:
        misread = comment["gap"] == " " and re.match(r"#+[^#\s]", comment["text"]) is not None and _is_name(key)
    if misread:
        raise RefusedYAML(
            f"line {node.end_mark.line + 1 + lines}: {key}: a comment starts at {comment['text'].strip()[:20]!r}; "
            "quote the text if it belongs to it"
        )


def _is_name(key: str) -> bool:
    """Return True if the setting ``key`` holds any text or path, or a list of them, rather than one of some choices."""
    if key == "extends":
        return True
    key = ITEM.sub("", SOURCE.sub("data.", key)).removeprefix("settings.")
    field = _settings().get(re.sub(r"^teachers\.[^.]+\.", "teacher.", key))
    if field is None or any(isinstance(getattr(m, "func", None), BuiltinOrPlugin) for m in field.metadata):
        return False
    annotation = field.annotation
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    return is_text(annotation) and not any(get_origin(kind) is Literal for kind in kinds)


@functools.cache
def _settings() -> dict[str, FieldInfo]:
    return dict(walk())
