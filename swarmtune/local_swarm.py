"""Bundled servers: a private swarm of child processes on this machine, for a first run, for tests, and for a machine of one's own."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from swarmtune.discovery.identity import Identity
from swarmtune.errors import ServerStartFailed, SwarmError, UsageError
from swarmtune.types import BlockSpan

if TYPE_CHECKING:
    from types import TracebackType

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 35.0
CLOSE_TIMEOUT_S = 5.0
HOST = "127.0.0.1"
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8", "nf4")


class LocalServer:
    """One server of a ``LocalSwarm``: a child process in a session of its own, which ends when this process does.

    Attributes:
        span: the blocks that it holds.
        address: where it listens; the same after a restart.
    """

    def __init__(self, words: Sequence[str], span: BlockSpan, port: int, log: Path | None) -> None:
        self.span = span
        self._identity = Identity.generate()
        self.address = f"/ip4/{HOST}/tcp/{port}/p2p/{self._identity.peer_id}"
        self._words = [*words, f"blocks='{span}'", f"listen={HOST}", f"port={port}"]
        self._log_path = log
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._ready = False

    @property
    def peer_id(self) -> str:
        """Its name in the swarm."""
        return self._identity.peer_id

    @property
    def pid(self) -> int:
        """Process id of the running child.

        Raises:
            SwarmError: it has not been started.
        """
        if self._process is None:
            raise SwarmError("this server has not been started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, initial_peers: Sequence[str]) -> None:
        """Start the child; returns at once."""
        ours, theirs = socket.socketpair()
        self._log = open(self._log_path, "ab") if self._log_path else tempfile.TemporaryFile()  # noqa: SIM115
        peers = ",".join(f"'{address}'" for address in initial_peers if address != self.address)
        words = [*self._words, f"initial_peers=[{peers}]", f"parent_fd={theirs.fileno()}"]
        self._ready = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "servers", *words],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._channel = ours
        greeting = json.dumps({"identity": self._identity.to_bytes().hex()}).encode() + b"\n"
        try:
            ours.sendall(greeting)
        except OSError as error:
            raise ServerStartFailed(f"the server of blocks {self.span} ended at once: {self._tail()}") from error

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until it serves.

        Raises:
            UsageError: it refused what it was asked to serve.
            ServerStartFailed: it ended, or did not become ready in time.
        """
        if self._ready:
            return
        if self._channel is None:
            raise SwarmError("this server has not been started")
        line, ends_at = b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            if not select.select([self._channel], [], [], max(0.0, ends_at - time.monotonic()))[0]:
                raise ServerStartFailed(f"the server of blocks {self.span} was not ready within {timeout_s:.0f} s: {self._tail()}")
            try:
                received = self._channel.recv(4096)
            except ConnectionError:
                received = b""
            if not received:
                raise ServerStartFailed(f"the server of blocks {self.span} ended before it was ready: {self._tail()}")
            line += received
        answer = json.loads(line)
        if "error" in answer:
            kind = UsageError if answer["code"] == 2 else ServerStartFailed
            raise kind(f"the server of blocks {self.span} did not start: {answer['error']}" if kind is ServerStartFailed else answer["error"])
        self._ready = True

    def kill(self) -> None:
        """SIGKILL: no goodbye to anyone."""
        self._signal(signal.SIGKILL)
        self._reap(CLOSE_TIMEOUT_S)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM: it finishes what is in flight, then ends; SIGKILL if that takes too long."""
        self._signal(signal.SIGTERM)
        if not self._reap(timeout_s):
            self.kill()

    def ask_to_stop(self) -> None:
        """SIGTERM, without waiting."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def _reap(self, timeout_s: float) -> bool:
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._log is not None:
            self._log.close()
            self._log = None
        return True

    def _tail(self) -> str:
        """The last line of its log, and where the log is."""
        if self._log_path is not None:
            data = self._log_path.read_bytes()[-4000:]
        elif self._log is not None:
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - 4000))
            data = self._log.read()
        else:
            data = b""
        lines = [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
        where = f" (log: {self._log_path})" if self._log_path else ""
        return (lines[-1][:500] if lines else "it said nothing") + where


class ManagedServer(LocalServer):
    """A server that knows its swarm, so that it can be restarted alone."""

    def __init__(self, swarm: LocalSwarm, span: BlockSpan, port: int, log: Path | None) -> None:
        super().__init__(swarm.words, span, port, log)
        self._swarm = swarm

    def restart(self) -> None:
        """Start it again with the same identity and port, and wait until it serves.

        Raises:
            SwarmError: the swarm has been closed, or has not been started, so nobody would stop this server.
        """
        if not self._swarm.started:
            raise SwarmError("this swarm does not run: start it before restarting one of its servers")
        if self.alive:
            self.kill()
        self.start(self._swarm.initial_peers)
        self.wait_ready()


class LocalSwarm:
    """A private swarm on loopback; a context manager.

    Attributes:
        servers: one per span, in the order given.
        initial_peers: the address of every server.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        spans: Sequence[str],
        *,
        dtype: str = "auto",
        quantize: str = "none",
        device: str = "auto",
        threads: int | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Describe the swarm; ``start`` or ``with`` starts it.

        Args:
            model: local directory or hub id.
            spans: blocks of each server, such as ``["0:4", "4:8"]``; a span given twice is a replica.
            dtype: ``auto`` (as stored, where this hardware computes in it), ``float32``, ``bfloat16`` or ``float16``.
            quantize: ``none``, ``int8`` or ``nf4``: what the linear layers of the blocks are held in.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            threads: of computation, per server; all cores if not given.
            log_dir: where each server's log goes; without it logs are kept only until the servers end.

        Raises:
            UsageError: no spans, or one that is malformed.
        """
        if isinstance(spans, str) or not spans:
            raise UsageError('spans must be a list of at least one span, such as ["0:4", "4:8"]')
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if quantize not in QUANTIZE:
            raise UsageError(f"quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r}")
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise UsageError(f"threads must be a positive integer or None, got {threads!r}")
        path = os.fspath(model)
        blocks = [BlockSpan.parse(span) for span in spans]
        self.words = [
            f"model={path}",
            f"dtype={dtype}",
            f"quantize={quantize}",
            f"device={_quoted(device)}",
            f"threads={threads if threads is not None else 'null'}",
            f"sharing={len(blocks)}",
        ]
        directory = Path(log_dir) if log_dir is not None else None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        logs = [directory / f"server-{number}.log" if directory else None for number in range(len(blocks))]
        self.servers = [ManagedServer(self, span, port, log) for span, port, log in zip(blocks, _free_ports(len(blocks)), logs, strict=True)]
        self._started = False

    @property
    def started(self) -> bool:
        """Whether it has been started and not been closed since."""
        return self._started

    @property
    def initial_peers(self) -> list[str]:
        """Addresses for ``connect``."""
        return [server.address for server in self.servers]

    def start(self) -> LocalSwarm:
        """Start all servers without waiting for them."""
        if not self._started:
            self._started = True
            try:
                for server in self.servers:
                    server.start(self.initial_peers)
            except BaseException:
                self.close()
                raise
        return self

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every server serves.

        Raises:
            UsageError: a server refused what it was asked to serve.
            ServerStartFailed: a server ended, or was not ready in time.
        """
        ends_at = time.monotonic() + timeout_s
        for server in self.servers:
            server.wait_ready(max(0.0, ends_at - time.monotonic()))

    def close(self) -> None:
        """Stop all servers. Safe to repeat."""
        for server in self.servers:
            server.ask_to_stop()
        for server in self.servers:
            server.stop(CLOSE_TIMEOUT_S)
        self._started = False

    def __enter__(self) -> LocalSwarm:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _quoted(text: str) -> str:
    """A string in Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
