"""The configuration: how YAML files and ``key=value`` words become one checked object of the schema.

Hydra composes the YAML files of the ``conf`` package; only group choices (``swarm=join``) go through it. Values are laid on
top here, so that any wrong key, type or range is answered with one sentence that names the full key. A config builds nothing:
``app.py`` unpacks it into plain arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib.resources
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from swarmtune.errors import UsageError
from swarmtune.schema import Config

T = TypeVar("T")

REQUIRED = "???"
"""What stands in a YAML file where the user must give a value."""

VERBATIM = ("run_dir", "model.path", "data.path", "adapter.path")
"""Keys whose value is a path, taken as typed: spaces, commas and brackets mean nothing to Hydra there."""
PATH_GROUPS = {"model": "model.path", "data": "data.path", "adapter": "adapter.path"}
"""Groups that also take a path: ``model=some/directory``."""
PATH_OPTIONS = {"data": "dataset", "adapter": "saved"}
"""The group option under such a path, where the default option would not do."""


def options(group: str) -> list[str]:
    """Names of the YAML files of one group of ``conf``."""
    folder = importlib.resources.files("conf").joinpath(group)
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_config(overrides: Sequence[str]) -> Config:
    """The checked configuration of a training run, from words such as ``recipe=lora_bloom``.

    Raises:
        UsageError: anything wrong with a word or a value, in one sentence.
    """
    if not any(word.split("=", 1)[0].strip() == "recipe" for word in overrides):
        raise UsageError(f"say which recipe to run, such as recipe=lora_bloom (there are: {', '.join(options('recipe'))})")
    from swarmtune.train.library_keys import check_trainer_flags, peft_config

    config = compose("config", list(overrides), Config)
    resolve_path(config.model.path)
    if config.data.path is not None:
        existing_path("data.path", config.data.path)
    check_trainer_flags(config.trainer)
    if any(word.lstrip("+~").startswith("adapter") for word in overrides):
        from swarmtune.adapters.tuners import check_supported

        chosen = peft_config(config.adapter)
        if not isinstance(chosen, str):
            check_supported(chosen)
    return config


def compose(config_name: str, overrides: list[str], schema: type[T], verbatim: Mapping[str, str] | None = None) -> T:
    """Compose ``conf/<config_name>.yaml`` with ``overrides`` and check it against the dataclass ``schema``.

    Values in ``verbatim`` are text by key, laid on top as they are.

    Raises:
        UsageError: an unknown option or key (with the nearest right one), a wrong type, or a value out of range.
    """
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = _groups_of(config_name)
    choices, values, paths = _sort_overrides(overrides, groups)
    try:
        with hydra.initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose(config_name, overrides=choices)
        OmegaConf.set_struct(config, False)
        parser = OverridesParser.create()
        for word in values:
            _apply(config, _parse(parser, word), word)
        node = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(one_line(error)) from error
    for key, text in (*paths, *(verbatim or {}).items()):
        _set(node, key, text)
    known = list(_keys(schema))
    for key in _unknown_keys(schema, node):
        raise UsageError(f"there is no key {key}{nearest(key, known)}")
    return _convert(schema, node, "")


def _parse(parser: Any, word: str) -> Any:
    """One ``key=value`` in Hydra's grammar."""
    from hydra.errors import HydraException

    try:
        return parser.parse_override(word)
    except HydraException as error:
        raise UsageError(
            f"{word}: this value cannot be read; put text with special characters in quotes: {word.partition('=')[0]}='\"...\"'"
        ) from error


def _apply(config: Any, override: Any, word: str) -> None:
    """Lay one parsed ``key=value`` on the composed configuration; a mapping is merged, ``~key`` removes."""
    from omegaconf import OmegaConf

    if override.is_sweep_override():
        raise UsageError(f"{word}: one run takes one value; write a list in brackets: {override.key_or_group}=[...]")
    key = override.key_or_group
    if override.is_delete():
        parent, _, name = key.rpartition(".")
        holder = OmegaConf.select(config, parent) if parent else config
        if not OmegaConf.is_dict(holder) or name not in holder:
            raise UsageError(f"there is no key {key} to remove")
        del holder[name]
        return
    OmegaConf.update(config, key, override.value(), merge=True, force_add=True)


def _groups_of(config_name: str) -> list[str]:
    """The groups in the defaults list of ``conf/<config_name>.yaml``."""
    from omegaconf import OmegaConf

    text = importlib.resources.files("conf").joinpath(f"{config_name}.yaml").read_text(encoding="utf-8")
    defaults: Any = OmegaConf.to_container(OmegaConf.create(text))
    return [next(iter(item)).split()[-1].lstrip("/") for item in defaults.get("defaults", []) if isinstance(item, dict)]


def _sort_overrides(overrides: list[str], groups: list[str]) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Split words into group choices (for Hydra), values, and paths taken as typed."""
    choices: list[str] = []
    values: list[str] = []
    paths: list[tuple[str, str]] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not key or (not equals and not key.startswith("~")):
            raise UsageError(f"expected key=value, got {word!r}")
        if key not in groups:
            name = key.lstrip("+")
            if name in VERBATIM and text not in ("", "null"):
                paths.append((name, existing_path(name, _unquote(text))))
            else:
                values.append(word)
        elif (text := _unquote(text)) in options(key) or text == "null":
            choices.append(f"{key}={text}")
        elif key in PATH_GROUPS:
            paths.append((PATH_GROUPS[key], _model_or_path(key, text)))
            choices.extend([f"{key}={PATH_OPTIONS[key]}"] if key in PATH_OPTIONS else [])
        else:
            raise UsageError(f"there is no {key} {text!r}; there are: {', '.join(options(key))}{nearest(text, options(key))}")
    return choices, values, paths


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def _model_or_path(group: str, text: str) -> str:
    """What ``model=``, ``data=`` or ``adapter=`` names when it is no option of its group: a local path or a hub id.

    Raises:
        UsageError: a path that does not exist, or a word that is neither.
    """
    close = difflib.get_close_matches(text, options(group), 1, 0.8)
    if close and not Path(text).exists():
        raise UsageError(f"there is no {group} {text!r}; there are: {', '.join(options(group))}; did you mean {close[0]!r}?")
    return existing_path(PATH_GROUPS[group], text)


def existing_path(key: str, text: str) -> str:
    """An absolute local path, ``pkg://...`` or a hub id; ``run_dir`` need not exist."""
    if not text.strip():
        raise UsageError(f"{key} must not be empty")
    local = Path(text).expanduser()
    if key == "run_dir" or local.exists():
        return str(local.absolute())
    if text.startswith("pkg://") or (key != "adapter.path" and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) and not _looks_like_file(text)):
        return text
    kind = "no such directory" if key in ("model.path", "adapter.path") else "no such file or directory"
    hub = "" if key == "adapter.path" else " (and this is not a hub id such as bigscience/bloom-560m)"
    raise UsageError(f"{key.removesuffix('.path')}: {kind}: {text}{hub}")


def _looks_like_file(text: str) -> bool:
    """Whether ``org/name`` is rather a path: its folder is here, or it ends as a data file does."""
    parent, _, _ = text.rpartition("/")
    return bool(parent and Path(parent).is_dir()) or text.endswith((".json", ".jsonl", ".parquet", ".csv", ".txt", ".arrow", ".safetensors"))


def resolve_path(path: str) -> str:
    """The local directory that ``pkg://package/folder`` means; any other path or hub id unchanged.

    Raises:
        UsageError: the package has no such folder, or a local path that does not exist.
    """
    if not path.startswith("pkg://"):
        return existing_path("model.path", path)
    package, _, folder = path.removeprefix("pkg://").partition("/")
    try:
        found = Path(str(importlib.resources.files(package))) / folder
    except ModuleNotFoundError as error:
        raise UsageError(f"{path}: there is no Python package {package}") from error
    if not found.is_dir():
        raise UsageError(f"{path}: the package {package} has no folder {folder}")
    return str(found)


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean ...?`` for the nearest of ``known``, or nothing where none is near."""
    found = difflib.get_close_matches(word, known, 1, 0.6)
    return f"; did you mean {found[0]}?" if found else ""


def one_line(error: BaseException) -> str:
    """The message of another library's error, without its line breaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))


def _set(node: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value


# --- checking ----------------------------------------------------------------------------------------------------------------


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


def to_plain(value: Any) -> Any:
    """A config as plain dictionaries, lists and scalars, ready for YAML, JSON and checkpoints."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def save_yaml(config: Any, path: Path) -> None:
    """Write a config as YAML."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(to_plain(config)), path)
