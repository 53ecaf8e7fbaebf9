"""The configuration: how YAML files and ``key=value`` words become one checked object of the schema.

Hydra composes the YAML files of the ``conf`` package; only group choices (``swarm=join``) go through it. Values are laid on
top here, so that any wrong key, type or range is answered with one sentence that names the full key. A config builds nothing:
``app.py`` unpacks it into plain arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import glob
import importlib.resources
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from swarmtune.conversion import flat_keys, nearest, to_schema
from swarmtune.errors import UsageError
from swarmtune.files import write_text
from swarmtune.own_recipe import ENDINGS, OwnRecipe
from swarmtune.schema import LOCAL_ONLY, Config, SwarmKind

T = TypeVar("T")

VERBATIM = ("run_dir", "model.path", "data.path", "data.validation_path", "data.chat_template_file", "data.cache_dir", "adapter.path")
"""Keys whose value is a path, taken as typed: spaces, commas and brackets mean nothing to Hydra there."""
VERBATIM_TEXT = ("data.text_template", "data.chat_template")
"""Keys whose value is text, taken as typed but for ``\\n`` and ``\\t``."""
FREE_PATHS = ("run_dir", "data.cache_dir")
"""Paths that need not exist."""
LOCAL_PATHS = ("adapter.path", "data.chat_template_file")
"""Paths that are never a hub id."""
FILE_ENDINGS = (
    *(".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".safetensors"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip"),
)
"""What ends like this is a file, never a hub id."""
PATH_GROUPS = {"model": "model.path", "data": "data.path", "adapter": "adapter.path"}
"""Groups that also take a path: ``model=some/directory``."""
PATH_OPTIONS = {"data": "dataset", "adapter": "saved"}
"""The group option under such a path, where the default option would not do."""


def options(group: str) -> list[str]:
    """Names of the YAML files of one group of ``conf``."""
    folder = importlib.resources.files("conf").joinpath(group)
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_config(overrides: Sequence[str]) -> Config:
    """The checked configuration of a training run, from words such as ``recipe=lora_bloom`` or ``recipe=./mine.yaml``.

    Raises:
        UsageError: anything wrong with a word, a value or the recipe's files, in one sentence.
    """
    chosen = [word for word in overrides if word.partition("=")[0].strip() == "recipe"]
    if not chosen:
        raise UsageError(f"say which recipe to run, such as recipe=lora_bloom (there are: {', '.join(options('recipe'))})")
    shown = _unquote(chosen[-1].partition("=")[2])
    own = OwnRecipe.read(shown) if _is_own(shown) else None
    words = [word for word in overrides if own is None or word not in chosen]
    if own is None:
        return _load(words, None, shown)
    try:
        return _load(words, own, own.name)
    except UsageError as error:
        raise UsageError(own.blame(str(error), [word.partition("=")[0].strip().lstrip("+~") for word in words])) from error


def _is_own(recipe: str) -> bool:
    """Whether ``recipe=`` names a file rather than a bundled recipe.

    Raises:
        UsageError: a word that is neither, with a file of that name here.
    """
    if recipe in options("recipe"):
        return False
    if recipe.endswith((*ENDINGS, ".py")) or "/" in recipe:
        return True
    for ending in ENDINGS:
        if recipe and Path(recipe + ending).is_file():
            raise UsageError(f"there is no recipe {recipe!r}; there are: {', '.join(options('recipe'))}; did you mean recipe={recipe}{ending}?")
    return False


def _load(words: list[str], own: OwnRecipe | None, name: str) -> Config:
    config = compose("config", words, Config, own)
    config = dataclasses.replace(config, name=config.name or name, recipe=config.recipe if own is None else own.code(config.recipe))
    touched = [word.lstrip("+~") for word in words] + ([*own.lines] if own is not None else [])
    check_config(config, adapter_given=any(key.startswith("adapter") for key in touched))
    return config


def check_config(config: Config, *, adapter_given: bool) -> None:
    """Check what the schema cannot: paths, flags of the Trainer, and the adapter where the user gave something of it.

    Raises:
        UsageError: anything wrong.
    """
    from swarmtune.train.library_keys import check_trainer_flags, peft_config

    resolve_path(config.model.path)
    for name in ("path", "validation_path", "chat_template_file"):
        if (given := getattr(config.data, name)) is not None:
            existing_path(f"data.{name}", given)
    check_trainer_flags(config.trainer)
    if adapter_given:
        from swarmtune.adapters.adapter import check

        chosen = peft_config(config.adapter)
        if not isinstance(chosen, str):
            check(chosen)


def load_saved(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the ``config.yaml`` of a run, with single keys of ``overrides`` laid on top.

    Raises:
        UsageError: it cannot be read, or anything wrong with a word.
    """
    import yaml
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    choices, values, paths = _sort_overrides(list(overrides), _groups_of("config"))
    if choices:
        raise UsageError(f"{choices[0]}: a saved configuration takes single keys only, such as logger.wandb=true or swarm.patience_s=60")
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config) or not config:
            raise UsageError(f"{path} must hold the keys of a configuration, but holds none")
        parser = OverridesParser.create()
        for word in values:
            _apply(config, _parse(parser, word), word)
        node = OmegaConf.to_container(config, resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        return to_schema(Config, node, paths)
    except UsageError as error:
        about_a_word = any(word.partition("=")[0].lstrip("+~") in str(error) for word in overrides)
        raise UsageError(str(error) if about_a_word else f"{path}: {error}") from error


def differing_keys(one: Config, other: Config) -> list[str]:
    """Full keys of the values in which two configurations differ."""
    flat = [dict(flat_keys(to_plain(config))) for config in (one, other)]
    return sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))


OWN_OPTION = "own_file"
"""The name under which Hydra knows the user's own YAML file while it composes."""


def compose(config_name: str, overrides: list[str], schema: type[T], own: OwnRecipe | None = None, verbatim: Mapping[str, str] | None = None) -> T:
    """Compose ``conf/<config_name>.yaml`` with ``overrides`` and check it against the dataclass ``schema``.

    Args:
        config_name: the file of ``conf``.
        overrides: group choices, values and paths.
        schema: a dataclass.
        verbatim: text by key, laid on top as it is.
        own: a file that takes the place of an option of the group ``recipe``; its defaults list counts.

    Raises:
        UsageError: an unknown option or key (with the nearest right one), a wrong type, or a value out of range.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = _groups_of(config_name)
    choices, values, paths = _sort_overrides(overrides, groups)
    try:
        if own is not None:
            ConfigStore.instance().store(group="recipe", name=OWN_OPTION, node=OmegaConf.create(own.text), package="_global_")
            choices.append(f"recipe={OWN_OPTION}")
        with hydra.initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose(config_name, overrides=choices)
        OmegaConf.set_struct(config, False)
        parser = OverridesParser.create()
        for word in values:
            _apply(config, _parse(parser, word), word)
        node = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_composition_error(error, own, overrides)) from error
    if own is not None:
        node.setdefault("recipe", "")
    return to_schema(schema, node, [*paths, *(verbatim or {}).items()])


def expand_sweep(words: Sequence[str]) -> list[list[str]]:
    """Every combination of the values that words such as ``optimizer.lr=1e-3,1e-2`` list, in order, as words of one run each; Hydra's sweep grammar.

    Raises:
        UsageError: a value cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob

    parser = OverridesParser.create()
    columns: list[list[str]] = []
    for word in words:
        if word.partition("=")[0].lstrip("+") in VERBATIM:
            columns.append([word])
            continue
        override = _parse(parser, word)
        if not override.is_sweep_override():
            columns.append([word])
        elif isinstance(override.value(), Glob):
            raise UsageError(f"{word}: name the values, separated by commas")
        else:
            columns.append([f"{word.partition('=')[0]}={value}" for value in override.sweep_string_iterator()])
    return [list(combination) for combination in itertools.product(*columns)]


def _composition_error(error: Exception, own: OwnRecipe | None, words: list[str]) -> str:
    """One sentence for what Hydra or OmegaConf refused, with the place in the user's own file if it is about a word there."""
    from hydra.errors import MissingConfigException

    sentence = one_line(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).lstrip("/").rpartition("/")
        known = [str(item) for item in error.options or []]
        listed = f"; there are: {', '.join(known)}" if known else ""
        sentence = f"there is no {group} '{option}'{listed}{nearest(option, known)}"
    if own is None:
        return sentence
    sentence = sentence.replace(f"In 'recipe/{OWN_OPTION}': ", "")
    for quoted in re.findall(r"'([^']+)'", sentence):
        if not any(quoted in word for word in words) and (line := own.line_with(quoted)):
            return f"{own.shown}, line {line}: {sentence}"
    return f"{own.shown}: {sentence}"


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
            if name in VERBATIM_TEXT and text not in ("", "null"):
                paths.append((name, _unquote(text).replace("\\n", "\n").replace("\\t", "\t")))
            elif name in VERBATIM and text not in ("", "null"):
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
    """An absolute local path, a pattern that matches some, ``pkg://...`` or a hub id; those of ``FREE_PATHS`` need not exist."""
    if not text.strip():
        raise UsageError(f"{key} must not be empty")
    local = Path(text).expanduser()
    if key in FREE_PATHS or local.exists():
        return str(local.absolute())
    if key in ("data.path", "data.validation_path") and glob.has_magic(text):
        if next(glob.iglob(str(local), recursive=True), None) is None:
            raise UsageError(f"{key}: no file matches {text}")
        return str(local.absolute())
    if text.startswith("pkg://") or (key not in LOCAL_PATHS and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) and not _looks_like_file(text)):
        return text
    kind = "no such directory" if key in ("model.path", "adapter.path") else "no such file or directory"
    hub = "" if key in LOCAL_PATHS else " (and this is not a hub id such as bigscience/bloom-560m)"
    raise UsageError(f"{key.removesuffix('.path')}: {kind}: {text}{hub}")


def _looks_like_file(text: str) -> bool:
    """Whether ``org/name`` is rather a path: its folder is here, or it ends as a data file does."""
    parent, _, _ = text.rpartition("/")
    return bool(parent and Path(parent).is_dir()) or text.lower().endswith(FILE_ENDINGS)


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


def one_line(error: BaseException) -> str:
    """The message of another library's error, without its line breaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))


def to_plain(value: Any) -> Any:
    """A config as plain dictionaries, lists and scalars, ready for YAML, JSON and checkpoints."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(config: Any) -> str:
    """A config as YAML, without what says nothing about a run: keys of servers that it does not start."""
    from omegaconf import OmegaConf

    plain = to_plain(config)
    if isinstance(config, Config) and config.swarm.kind is SwarmKind.JOIN:
        plain["swarm"] = {key: value for key, value in plain["swarm"].items() if key not in (*LOCAL_ONLY, "spans")}
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def save_yaml(config: Any, path: Path) -> None:
    """Write a config as YAML, whole or not at all."""
    write_text(path, to_yaml(config))
