"""Network namespaces of a lab: named after the process that owns them, entered by a thread, removed with all that runs in them.

Standard library only: the router is a process of its own and starts in a moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

NAMESPACES = Path("/run/netns")
OWNED = re.compile(r"swarmtune-(\d+)-\w+")
INIT = 1
SETTLE_S = 0.5
"""How long processes may take to end by themselves, as daemons do whose parent is gone."""
TERMINATE_S = 5.0
"""How long they may take after SIGTERM, before SIGKILL."""

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class NetLabError(Exception):
    """The lab cannot be made, or cannot do what was asked; one sentence that says what to do."""


def name_of(host: str) -> str:
    """The namespace of a host of a lab that this process owns."""
    return f"swarmtune-{os.getpid()}-{host}"


def run(*words: str, text: str | None = None) -> str:
    """Run ``ip`` or ``tc``.

    Raises:
        NetLabError: it is not installed, or it failed; with its own words.
    """
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        raise NetLabError(f"{words[0]} is not installed (on Debian: apt install iproute2)") from None
    if done.returncode:
        raise NetLabError(f"{' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread in another namespace; sockets and devices that it makes there stay there. ``os.setns`` is Python 3.12's."""
    with open("/proc/thread-self/ns/net") as home, open(NAMESPACES / name) as there:
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def processes_in(names: Sequence[str]) -> dict[int, int]:
    """Processes that run in these namespaces, each with its parent."""
    wanted = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            wanted.add(_key((NAMESPACES / name).stat()))
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is a zombie
            if _key((process / "ns/net").stat()) in wanted:
                found[int(process.name)] = int(_stat(process)[1])
    return found


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _stat(process: Path) -> list[str]:
    """State, parent, ... of a process."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def remove(names: Sequence[str], owner: int | None = None) -> None:
    """End what runs in these namespaces, then remove them; those that are gone already are no error."""
    names = [name for name in names if (NAMESPACES / name).exists()]
    end_all_in(names, owner)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)  # another one may have been faster


def end_all_in(names: Sequence[str], owner: int | None) -> None:
    """SIGTERM to what does not end by itself, then SIGKILL.

    While the owner of the lab lives, an orphan inside is what a program has left to clean up after it (the keeper of a daemon), so it is let finish.
    Neither the owner nor this process is ever signalled.
    """
    spared = {os.getpid(), owner}
    if _gone(names, spared, SETTLE_S):
        running = processes_in(names)
        orphans_too = owner is None or not _alive(owner)  # so its own children are orphans, too
        for pid, parent in running.items():
            if pid not in spared and parent not in running and (parent != INIT or orphans_too):  # a tree's root ends its own children
                _signal(pid, signal.SIGTERM)
    for pid in _gone(names, spared, TERMINATE_S):
        _signal(pid, signal.SIGKILL)
    _gone(names, spared, TERMINATE_S)


def _gone(names: Sequence[str], spared: Collection[int | None], limit_s: float) -> list[int]:
    """Wait until nothing runs there any more; returns what does nevertheless."""
    ends_at = time.monotonic() + limit_s
    while (left := [pid for pid in processes_in(names) if pid not in spared]) and time.monotonic() < ends_at:
        time.sleep(0.02)
    return left


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def stale() -> list[str]:
    """Namespaces of labs whose owner is dead."""
    try:
        names = sorted(os.listdir(NAMESPACES))
    except FileNotFoundError:
        return []
    return [name for name in names if (found := OWNED.fullmatch(name)) and not _alive(int(found[1]))]


def _alive(pid: int) -> bool:
    try:
        return _stat(Path(f"/proc/{pid}"))[0] != "Z"
    except OSError:
        return False


def cpu_s(pid: int) -> float:
    """Seconds of a core that a process has used."""
    user, system = _stat(Path(f"/proc/{pid}"))[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
