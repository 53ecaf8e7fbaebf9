"""The directory of a run: made, locked, found again.

``config.yaml`` and ``run.json`` are there from the start, ``metrics.csv`` grows, ``checkpoints/step=N`` appear, and ``summary.json`` says that
the run is finished.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swarmtune.errors import UsageError

CONFIG, FACTS, SUMMARY, LOCK, CHECKPOINTS, ADAPTER = "config.yaml", "run.json", "summary.json", "run.lock", "checkpoints", "adapter"
EVENTS, HISTORY = "events.jsonl", "history.jsonl"
CHAT_TEMPLATE, LABELS = "chat_template.jinja", "labels.json"
"""Files that stand beside an adapter: what rendered its conversations; the names of its classes, in the order of the model's outputs."""
ROOT = Path("runs")


def new_run_dir(run_dir: str | None, recipe: str) -> Path:
    """A directory for a new run, made: ``run_dir`` or ``runs/<recipe>/<time>``.

    Raises:
        UsageError: it holds another run already, or cannot be made.
    """
    if run_dir is None:
        base = ROOT / recipe / time.strftime("%Y-%m-%d_%H-%M-%S")
        found = next(path for path in _numbered(base) if not path.exists())
    else:
        found = Path(run_dir)
    found = found.absolute()
    if any((found / name).exists() for name in (CONFIG, SUMMARY, CHECKPOINTS, ADAPTER)):
        raise UsageError(f"run_dir: {found} already holds a run; give another directory or none, or go on with it: swarmtune resume={found}")
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"run_dir: {found} cannot be made: {error.strerror}") from error
    return found


def _numbered(base: Path) -> Iterator[Path]:
    yield base
    yield from (base.with_name(f"{base.name}_{again}") for again in range(2, sys.maxsize))


def check_unfinished(path: str) -> Path:
    """The directory of an interrupted run.

    Raises:
        UsageError: there is no run there, or it is finished.
    """
    found = Path(path).expanduser().absolute()
    if not (found / CONFIG).is_file():
        raise UsageError(f"resume: {path} is no run directory: it holds no {CONFIG}")
    if (found / SUMMARY).exists():
        raise UsageError(f"resume: the run {path} is finished; to train its adapter further, start a run with adapter={found / ADAPTER}")
    return found


def unfinished_runs(recipe: str) -> list[Path]:
    """Interrupted runs of a recipe under ``runs/``: those with a checkpoint first, then the latest; one that another process works on is none."""
    folders = [folder for folder in (ROOT / recipe).glob("*") if (folder / CONFIG).is_file() and not (folder / SUMMARY).exists()]
    return [folder.absolute() for folder in sorted(folders, key=_progress, reverse=True) if not _is_locked(folder)]


def _progress(folder: Path) -> tuple[bool, float]:
    return any((folder / CHECKPOINTS).glob("step=*")), folder.stat().st_mtime


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run directory; the lock ends with the process, however that ends.

    Raises:
        UsageError: another process works on this run.
    """
    with writing(run_dir):
        file = open(run_dir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UsageError(
                f"run_dir: process {file.read(32).strip() or 'unknown'} is working on {run_dir}: wait for it, or end it first"
            ) from error
        with writing(run_dir):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def _is_locked(run_dir: Path) -> bool:
    try:
        with open(run_dir / LOCK, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_facts(run_dir: Path) -> dict[str, Any]:
    """What ``run.json`` holds: facts that a later process needs to go on with the run. Empty where there is none."""
    try:
        facts = json.loads((run_dir / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"resume: {run_dir / FACTS} cannot be read: {error}") from error
    return facts if isinstance(facts, dict) else {}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a full or read-only disk into a sentence.

    Raises:
        UsageError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
