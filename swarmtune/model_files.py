"""What a model's files say of it without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from swarmtune.errors import UsageError

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Where a config.json says how many blocks the model has."""


def why_unreadable(error: Exception) -> str:
    """What the library says of files of a model that it cannot read, in one line; of code that comes with them, that it never runs here."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return "it needs code that comes with the model, which swarmtune never runs: use a model that transformers itself knows"
    return said[:300] or type(error).__name__


def count_blocks(path: str) -> int:
    """How many blocks a model has, from its config.json; imports nothing heavy for a local directory.

    Raises:
        UsageError: there is no config.json, or it names no number of layers.
    """
    found = Path(path) / "config.json"
    if not Path(path).is_dir():
        import huggingface_hub

        try:
            found = Path(huggingface_hub.hf_hub_download(path, "config.json"))
        except (OSError, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            raise UsageError(f"model {path}: no such directory here, and the hub did not give its config.json: {detail}") from error
    if not found.is_file():
        raise UsageError(f"model {path}: there is no config.json in this directory")
    try:
        values = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"model {path}: its config.json cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"model {path}: its config.json must hold an object, got {type(values).__name__}")
    for key in LAYER_COUNT_KEYS:
        if type(values.get(key)) is int and values[key] > 0:
            return int(values[key])
    raise UsageError(f"model {path}: its config.json gives a number of layers in none of {', '.join(LAYER_COUNT_KEYS)}")


def count_parameters(path: str) -> int:
    """Parameters of the whole model, tied ones once; counted on the meta device, nothing is loaded."""
    from swarmtune.skeleton import build_skeleton, load_config

    return sum(parameter.numel() for parameter in build_skeleton(load_config(path)).parameters())
