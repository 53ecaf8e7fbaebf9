"""The start of a process, most of which is imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Inside, nobody looks for cyclic garbage: libraries make a million objects that stay, and to look through them takes a quarter of their import.

    The first time in a process, the objects that there are then are left out of later collections, too (``gc.freeze``).
    """
    if not gc.isenabled():
        yield  # whoever switched it off
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()
