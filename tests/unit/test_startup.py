"""Imports without looks for garbage, which begin again whatever happens."""

from __future__ import annotations

import subprocess
import sys

import pytest

AGAIN = """
import gc
from swarmtune.startup import without_collecting
assert gc.isenabled()
with without_collecting():
    assert not gc.isenabled()
    with without_collecting():
        assert not gc.isenabled()
    assert not gc.isenabled(), "the outer one is not over"
assert gc.isenabled()
try:
    with without_collecting():
        import this_is_not_there
except ImportError:
    assert gc.isenabled()
else:
    raise AssertionError
"""
FROZEN = """
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


@pytest.mark.parametrize("script", [AGAIN, FROZEN], ids=["garbage is looked for again", "only the first objects stay out"])
def test_garbage_is_left_alone_for_a_while(script: str) -> None:
    """In processes of their own: what is frozen stays so."""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
