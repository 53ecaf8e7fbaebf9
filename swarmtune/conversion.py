"""Plain values into checked dataclasses, strictly: nothing is cast that a person did not mean, and every refusal names the full key."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar

from swarmtune.errors import UsageError

T = TypeVar("T")

REQUIRED = "???"
"""What stands in a YAML file where the user must give a value."""


def to_schema(schema: type[T], node: Any, texts: Sequence[tuple[str, str]] = ()) -> T:
    """Plain values as an object of the dataclass ``schema``.

    Args:
        schema: a dataclass whose fields have types; nested dataclasses are groups.
        node: what YAML or words gave.
        texts: full keys and their text, laid on top as they are.

    Raises:
        UsageError: an unknown key (with the nearest right one), a missing one, a wrong type, or a value out of range.
    """
    if not isinstance(node, dict):
        raise UsageError(f"a configuration must be a group of keys, got {type(node).__name__}")
    for key, text in texts:
        _set(node, key, text)
    known = list(_keys(schema))
    for key in _unknown_keys(schema, node):
        raise UsageError(f"there is no key {key}{nearest(key, known)}")
    return typing.cast(T, _convert(schema, node, ""))


def flat_keys(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full key and value of everything in nested groups; an empty group is a value."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean ...?`` for the nearest of ``known``, or nothing where none is near."""
    found = difflib.get_close_matches(word, known, 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


def _set(node: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value


def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every full key of a schema, groups included."""
    for name, hint in _hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), f"{prefix}{name}.")


def _unknown_keys(schema: type, node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Full keys of ``node`` that the schema does not have."""
    hints = _hints(schema)
    for name, value in node.items():
        if name not in hints:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            yield from _unknown_keys(typing.cast(type, hints[name]), value, f"{prefix}{name}.")


def _convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as ``hint`` asks; strict, because a 4:8 that YAML read as 248 must not pass as text."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, str) and value == REQUIRED:
        raise UsageError(f"{key} must be given")
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(next(arg for arg in args if arg is not type(None)), value, key)
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(typing.cast(type, hint), value, key)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_convert(args[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _convert_enum(hint, value, key)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (str, bool, int) and type(value) is hint:
        return value
    raise UsageError(f"{key} must be {_NOUNS.get(origin or hint, str(hint))}, got {value!r}{_quote_hint(hint, value, key)}")


_NOUNS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", tuple: "a list", dict: "a group of keys"}


def _quote_hint(hint: Any, value: Any, key: str) -> str:
    return f" (quote it: {key}='\"{value}\"')" if hint is str and isinstance(value, int | float) else ""


def _convert_enum(hint: type[enum.Enum], value: Any, key: str) -> enum.Enum:
    allowed = [str(member.value) for member in hint]
    if value not in allowed:
        raise UsageError(f"{key} must be one of {', '.join(allowed)}, got {value!r}{nearest(str(value), allowed)}")
    return hint(value)


def _convert_dataclass(schema: type, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise UsageError(f"{key} must be a group of keys, got {value!r}")
    hints, prefix = _hints(schema), f"{key}." if key else ""
    arguments = {}
    for item in dataclasses.fields(schema):
        if item.name in value:
            arguments[item.name] = _convert(hints[item.name], value[item.name], prefix + item.name)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise UsageError(f"{prefix}{item.name} must be given")
    try:
        return schema(**arguments)
    except ValueError as error:
        raise UsageError(f"{prefix}{error}") from error
