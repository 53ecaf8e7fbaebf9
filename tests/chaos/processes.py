"""Processes as /proc shows them: who belongs to whom, and which daemon is whose."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

KEEPER = "swarmtune-keeper"


def command(pid: int) -> list[str]:
    """The words of a process; none where it is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1]
    except OSError:
        return []


def state(pid: int) -> tuple[str, int, int] | None:
    """State letter, parent, session; ``None`` where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[3])


def everybody() -> Iterator[int]:
    """Ids of all processes."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            yield int(entry)


def children(pid: int) -> list[int]:
    """Of one process, whatever thread of it made them."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """Children, and theirs."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def daemon_of(pid: int) -> int | None:
    """The p2p daemon that a process has started, under its keeper."""
    for keeper in children(pid):
        if KEEPER in command(keeper):
            for child in children(keeper):
                if command(child)[:1] and command(child)[0].endswith("/p2pd"):
                    return child
    return None


def runs(pid: int) -> bool:
    """Whether it is there and no zombie."""
    found = state(pid)
    return found is not None and found[0] not in "ZX"


def stopped(pid: int) -> bool:
    """Whether it is frozen."""
    found = state(pid)
    return found is not None and found[0] in "tT"


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
