"""Keys that other libraries define: flags of ``lightning.Trainer`` and fields of PEFT's configs.

Both are open groups in the schema, so that every flag works without being listed here; these checks give them the same sentences.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarmtune.config import existing_path, one_line
from swarmtune.conversion import nearest
from swarmtune.errors import UsageError


def trainer_flags() -> dict[str, ast.expr | None]:
    """Flags of ``lightning.Trainer`` with their annotations, read from its source: importing it would take seconds."""
    spec = importlib.util.find_spec("lightning")
    if spec is None or spec.origin is None:
        raise UsageError("lightning is not installed")
    source = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    trainer = next(item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == "Trainer")
    init = next(item for item in trainer.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    return {argument.arg: argument.annotation for argument in [*init.args.args, *init.args.kwonlyargs] if argument.arg != "self"}


def peft_fields(peft_type: str) -> dict[str, ast.expr | None]:
    """Fields of PEFT's config of a type with their annotations, read from its source; none for a type that is not known."""
    spec = importlib.util.find_spec("peft")
    if spec is None or spec.origin is None:
        raise UsageError("peft is not installed")
    package = Path(spec.origin).parent
    own = package / "tuners" / peft_type.lower() / "config.py"
    if not peft_type.isalnum() or not own.is_file():
        return {}
    found: dict[str, ast.expr | None] = {}
    for path, wanted in ((package / "config.py", ("PeftConfigMixin", "PeftConfig")), (own, (f"{peft_type}Config".lower(),))):
        for item in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(item, ast.ClassDef) and (item.name in wanted or item.name.lower() in wanted):
                fields = (field for field in item.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name))
                found |= {ast.unparse(field.target): field.annotation for field in fields if "init=False" not in ast.unparse(field)}
    return found


OURS = ("callbacks", "logger", "default_root_dir")
"""Trainer flags that have their own group here."""
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),)}


def check_trainer_flags(flags: Mapping[str, Any]) -> None:
    """Refuse a flag that ``lightning.Trainer`` does not have, or a value of another type than it takes.

    Raises:
        UsageError: with the nearest right flag.
    """
    known = trainer_flags()
    for name, value in flags.items():
        if name in OURS:
            raise UsageError(f"trainer.{name} is set by swarmtune: use logger=, callbacks.* and run_dir= instead")
        if name not in known:
            raise UsageError(f"there is no key trainer.{name}{nearest(f'trainer.{name}', [f'trainer.{flag}' for flag in known if flag not in OURS])}")
        names = annotation_names(known[name])
        if names <= _SCALARS.keys() and not any(type(value) in _SCALARS[word] for word in names):
            raise UsageError(f"trainer.{name} must be {' or '.join(sorted(names))}, got {value!r}")
        if name.startswith("max_") and isinstance(value, int) and value < -1:
            raise UsageError(f"trainer.{name} must be -1 (no limit) or at least 0, got {value}")
    for name in ("accumulate_grad_batches", "val_check_interval", "log_every_n_steps"):
        value = flags.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            raise UsageError(f"trainer.{name} must be above 0, got {value}")
    if str(flags.get("precision")).startswith(("64", "transformer-engine")):
        raise UsageError(f"trainer.precision={flags['precision']} is not supported: adapters are float32 (32-true) or lower")
    if str(flags.get("precision")) == "16-true":
        raise UsageError("trainer.precision=16-true is not supported: adapters do not learn in float16; use 16-mixed, bf16-mixed or bf16-true")
    for name in ("devices", "num_nodes"):
        if flags.get(name, 1) not in (1, "1"):
            raise UsageError(f"trainer.{name}={flags[name]} is not supported: training is one process on one device (the servers do the work); use 1")


def annotation_names(annotation: ast.expr | None) -> set[str]:
    """The names in ``Optional[Union[int, float]]``: int, float, None; ``Any`` where there is no annotation."""
    if annotation is None:
        return {"Any"}
    found = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if "Optional" in found:
        found.add("None")
    return found - {"Optional", "Union"}


def peft_config(adapter: Mapping[str, Any]) -> Any:
    """What the ``adapter`` group describes, as ``load_causal_lm`` takes it: a configuration, the directory of a saved one, or a list.

    ``also`` lists further parts beside the main one, each with a ``peft_type`` of its own.

    Raises:
        UsageError: an unknown type or field, or a value that is refused.
    """
    if "path" in adapter:
        others = sorted(adapter.keys() - {"path"})
        if others:
            raise UsageError(f"adapter.{others[0]} cannot be changed: the adapter is loaded from {adapter['path']}")
        return existing_path("adapter.path", str(adapter["path"]))
    also = adapter.get("also") or []
    if not isinstance(also, list) or not all(isinstance(part, Mapping) for part in also):
        raise UsageError(f"adapter.also must be a list of groups of keys, such as [{{peft_type: DEEP_PROMPTS, num_tokens: 8}}], got {also!r}")
    main = _part("adapter", {name: value for name, value in adapter.items() if name != "also"})
    return [main, *(_part(f"adapter.also[{index}]", part) for index, part in enumerate(also))] if also else main


OWN_TYPES = {"DEEP_PROMPTS": "DeepPromptConfig", "STAND_IN": "StandInConfig", "HEAD": "HeadConfig"}
"""Kinds of adapters that are ours and not PEFT's, and the names of their configurations."""


def _part(key: str, given: Mapping[str, Any]) -> Any:
    """One part of an adapter; ``key`` is where it stands."""
    import peft

    from swarmtune.adapters import parts
    from swarmtune.adapters.tuners import check_type

    mapping = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    names = [*(str(kind.value) for kind in mapping), *OWN_TYPES]
    wanted = str(given.get("peft_type", "")).upper()
    if wanted not in names:
        raise UsageError(f"there is no {key}.peft_type {given.get('peft_type')!r}{nearest(wanted, names)}")
    schema: Any
    if wanted in OWN_TYPES:
        schema = getattr(parts, OWN_TYPES[wanted])
    else:
        check_type(wanted)
        schema = mapping[peft.PeftType(wanted)]
    fields = {item.name for item in dataclasses.fields(schema) if item.init} - {"peft_type"}
    given = {name: value for name, value in given.items() if name != "peft_type"}
    for name in given:
        if name not in fields:
            raise UsageError(f"there is no key {key}.{name}{nearest(f'{key}.{name}', [f'{key}.{item}' for item in sorted(fields)])}")
        _check_peft_value(schema, key, name, given[name])
    try:
        return schema(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{key}: {one_line(error)}") from error


def _check_peft_value(schema: type, key: str, name: str, value: Any) -> None:
    """Refuse a scalar of the wrong type, and a rank below 1; PEFT itself checks neither before it builds layers."""
    hint = typing.get_type_hints(schema)[name]
    if hint in (int, float, bool) and type(value) not in _SCALARS[hint.__name__]:
        raise UsageError(f"{key}.{name} must be {hint.__name__}, got {value!r}")
    if name == "r" and isinstance(value, int) and value < 1:
        raise UsageError(f"{key}.r must be at least 1, got {value}")
