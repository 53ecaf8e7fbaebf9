"""Checkpoints on disk: which there are, and which of them are whole. It loads nothing heavy, so that any command may ask."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from swarmtune.train.run_dir import ADAPTER

logger = logging.getLogger(__name__)

STATE, MANIFEST = "state.ckpt", "manifest.json"
ESSENTIAL = (STATE, f"{ADAPTER}/adapter_model.safetensors", f"{ADAPTER}/adapter_config.json")
"""Files that every checkpoint has, so that its manifest must list them."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A whole checkpoint on disk.

    Attributes:
        step: optimizer steps done.
    """

    folder: Path
    step: int

    @property
    def file(self) -> Path:
        """For ``Trainer.fit(ckpt_path=...)``."""
        return self.folder / STATE


def step_of(folder: Path) -> int | None:
    """The N of a directory ``step=N``; ``None`` for any other name."""
    name, equals, digits = folder.name.partition("=")
    return int(digits) if name + equals == "step=" and digits.isascii() and digits.isdecimal() else None


def step_folders(directory: Path) -> list[Path]:
    """The checkpoints in a directory, whole or not, by step."""
    return sorted((folder for folder in directory.glob("step=*") if step_of(folder) is not None), key=lambda folder: step_of(folder) or 0)


def newest_checkpoint(directory: Path) -> SavedState | None:
    """The newest whole checkpoint; damaged ones are passed over, with a warning each. ``None`` where there is none."""
    for folder in reversed(step_folders(directory)):
        damage = find_damage(folder)
        if damage is None:
            return SavedState(folder, step_of(folder) or 0)
        logger.warning("the checkpoint %s is damaged (%s): going back to the one before", folder, damage)
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or ``None``: its manifest must list what every checkpoint has, and every file have the digest listed there."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if unlisted := [name for name in ESSENTIAL if name not in files]:
            return f"its {MANIFEST} does not list {unlisted[0]}"
        for name, digest in files.items():
            if file_digest(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
