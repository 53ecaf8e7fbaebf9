"""The p2p daemon as a process: started under a keeper, noticed when it ends, ended with everything that belongs to it.

The keeper is a shell that waits for the end of its standard input, which this process holds open. However this process goes away, the keeper ends
the daemon and removes the runtime directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from swarmtune.errors import ServerStartFailed

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
LAST_WORDS_S = 1.0
MAX_SAID = 1 << 16
KEEPER = (
    'dir=$1; shift; "$@" </dev/null & child=$!; echo "daemon $child"; exec >&- 2>&-; read -r word; '
    'if [ "$word" = replace ]; then kill -9 "$child"; wait "$child"; exit; fi; '
    'kill "$child"; kill -CONT "$child"; wait "$child"; rm -rf -- "$dir"'
)
"""Ends the daemon when its standard input ends, and removes the directory; told to ``replace``, it kills the daemon and leaves the directory."""


class Daemon:
    """One daemon process and its keeper.

    Attributes:
        pid: of the daemon.
        socket: path of the socket on which it takes commands.
        ended: set once the daemon is gone, whoever ended it.
    """

    def __init__(self, directory: Path, number: int) -> None:
        """``number`` tells the daemons of one runtime directory apart, because a killed one leaves its socket behind."""
        self._directory = directory
        self.socket = directory / f"daemon-{number}.sock"
        self.pid = 0
        self.ended = asyncio.Event()
        self._spawning: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._keeper: asyncio.subprocess.Process | None = None
        self._draining: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self, binary: Path, key: Path, flags: Sequence[str]) -> None:
        """Start it and wait until it says who it is.

        Raises:
            ServerStartFailed: it ended; with its last words.
        """
        command = [str(binary), f"-id={key}", f"-listen=/unix{self.socket}", *flags]
        self._spawning = asyncio.create_task(asyncio.create_subprocess_exec(
            "/bin/sh", "-c", KEEPER, "swarmtune-keeper", str(self._directory), *command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, close_fds=True,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self._directory), "GOLOG_LOG_LEVEL": "error"},
        ))  # fmt: skip
        # Cancelled by itself, it would kill the keeper, leave the daemon that this has started, and wait for the end of it.
        self._keeper = keeper = await asyncio.shield(self._spawning)
        assert keeper.stdout is not None
        last = "it ended at once"
        async for raw in keeper.stdout:
            line = raw.decode("utf-8", "replace").strip()
            if line.startswith("daemon "):
                self.pid = int(line.removeprefix("daemon "))
                continue
            if line.startswith("Peer ID:"):
                break
            last = line or last
        else:
            raise ServerStartFailed(f"the p2p daemon ended: {last[:300]}")
        self._draining = asyncio.create_task(self._drain(keeper.stdout))

    async def _drain(self, output: asyncio.StreamReader) -> None:
        """Keep the daemon's pipe empty; its end means that the daemon is gone."""
        while said := await output.read(MAX_SAID):  # in pieces: a line could be longer than a reader of lines takes
            if not self.pid and (found := re.search(rb"^daemon (\d+)$", said, re.MULTILINE)):
                self.pid = int(found[1])  # of a start that was cancelled before
            logger.debug("p2pd: %s", said.decode("utf-8", "replace").rstrip())
        self.ended.set()

    @property
    def gone(self) -> bool:
        """Whether the daemon has ended, or has lost its keeper, so that it would outlive this process."""
        return self.ended.is_set() or (self._keeper is not None and self._keeper.returncode is not None)

    async def close(self, *, replace: bool = False) -> None:
        """End daemon and keeper; with ``replace`` at once, and the directory stays for the next one. Safe to repeat; cancelled, it goes on."""
        if self._spawning is None:
            return
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(self._spawning, replace))
        await asyncio.shield(self._closing)

    async def _close(self, spawning: asyncio.Task[asyncio.subprocess.Process], replace: bool) -> None:
        try:
            keeper = await spawning
        except OSError:
            return  # nothing was started, which start has said
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        # To its end, which comes with the daemon's: else the pipe would outlive a loop that is closed after this.
        draining = self._draining or asyncio.create_task(self._drain(keeper.stdout))
        try:
            with contextlib.suppress(OSError):
                if replace:
                    keeper.stdin.write(b"replace\n")
                    await keeper.stdin.drain()
                keeper.stdin.close()
            if not await _ended(keeper, CLOSE_TIMEOUT_S):
                with contextlib.suppress(ProcessLookupError):
                    keeper.kill()
                await _ended(keeper, LAST_WORDS_S)
            self._end_orphan()
            await asyncio.wait([draining], timeout=LAST_WORDS_S)
        finally:
            if keeper.returncode is None:  # this is cancelled with its loop, or the keeper hangs: it would be killed at its work
                self._end_orphan()
                if not replace:
                    shutil.rmtree(self._directory, ignore_errors=True)
            draining.cancel()
            keeper._transport.close()  # type: ignore[attr-defined]  # its pipes, where somebody else holds their other ends
        if replace:
            self.socket.unlink(missing_ok=True)

    def _end_orphan(self) -> None:
        """A daemon whose keeper was killed is still there; it is ours if it was started in our directory."""
        with contextlib.suppress(OSError):
            if self.pid and str(self._directory).encode() in Path(f"/proc/{self.pid}/cmdline").read_bytes():
                os.kill(self.pid, signal.SIGKILL)


async def _ended(process: asyncio.subprocess.Process, limit_s: float) -> bool:
    """Wait until a process has ended; ``Process.wait`` also waits until nobody holds its pipes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while process.returncode is None:
                await asyncio.sleep(0.005)
    return process.returncode is not None
