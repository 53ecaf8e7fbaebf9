"""The clock of everything that runs on a loop."""

from __future__ import annotations

import asyncio


def now() -> float:
    """The running loop's time in seconds: monotonic, and the one clock that a simulation has to replace."""
    return asyncio.get_running_loop().time()
