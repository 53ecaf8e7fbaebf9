"""Imports without looks for garbage, which begin again whatever happens."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from swarmtune.startup import without_collecting

SCRIPT = """
import gc
from swarmtune.startup import without_collecting
assert gc.get_freeze_count() == 0
with without_collecting():
    first = [[] for _ in range(100_000)]
frozen = gc.get_freeze_count()
assert frozen >= 100_000
with without_collecting():
    second = [[] for _ in range(100_000)]
assert gc.get_freeze_count() <= frozen, "what comes later may become garbage"
"""


def test_garbage_is_looked_for_again_whatever_happens() -> None:
    assert gc.isenabled()
    with without_collecting():
        assert not gc.isenabled()
        with without_collecting():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer one is not over"
    assert gc.isenabled()
    with pytest.raises(ImportError), without_collecting():
        raise ImportError
    assert gc.isenabled()


def test_only_the_first_objects_of_a_process_stay_out_of_collections() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
