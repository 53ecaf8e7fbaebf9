"""Models that many tests read and none writes."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tests-of-swarmtune-")  # what tests prepare is not left in the user's cache
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; the children of tests must hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from tests.harness import save_tiny


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in ("bloom", "llama", "gpt2")}


@pytest.fixture(scope="session")
def bloom(models: dict[str, Path]) -> Path:
    return models["bloom"]
