"""hivemind's libp2p daemon as a transport: the daemon's life, dialling, and our frames on its binary streams.

hivemind's exceptions are translated here. Its client library attaches to a daemon that we start ourselves, under a keeper shell that ends the
daemon and removes its directory whenever this process goes away, however it goes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hivemind.hivemind_cli
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from swarmtune.discovery.identity import Identity
from swarmtune.discovery.records import joinable, peer_of
from swarmtune.errors import ServerStartFailed
from swarmtune.transport.base import Handler, Traffic, TransportError
from swarmtune.transport.connection import Connection, close_writer
from swarmtune.wire.frames import Budget, Encoded, Incoming, Share, WireLimits

logger = logging.getLogger(__name__)

STREAM_NAME = "/swarmtune/1"
START_TIMEOUT_S = 20.0
DIAL_TIMEOUT_S = 8.0
CLOSE_TIMEOUT_S = 5.0
DAEMON_TIMEOUT_S = 2.0
MAX_CONNECTIONS = 256
KEEPER = 'dir=$1; shift; "$@" </dev/null & child=$!; echo "daemon $child"; exec >&- 2>&-; read -r _; kill "$child"; wait "$child"; rm -rf -- "$dir"'
"""Waits for the end of its standard input (ours to hold open), then ends the daemon and removes its directory."""

_FOREIGN = (P2PDaemonError, P2PHandlerError, OSError, EOFError, ValueError)


@dataclass(frozen=True, slots=True)
class Reach:
    """How others reach a listening node beyond its own ports; everything is off unless asked.

    Attributes:
        announce: multiaddresses without a peer id, told to others instead of the addresses that are listened on.
        relay: carry traffic between other peers.
        relays: addresses of peers that are asked to relay for this node.
        nat_mapping: ask the router to forward the port.
    """

    announce: tuple[str, ...] = ()
    relay: bool = False
    relays: tuple[str, ...] = ()
    nat_mapping: bool = False

    def flags(self) -> list[str]:
        """As the daemon takes them."""
        flags = [f"-relay={int(self.relay or bool(self.relays))}", f"-relayService={int(self.relay)}", f"-autoRelay={int(bool(self.relays))}"]
        flags += [f"-natPortMap={int(self.nat_mapping)}"]
        flags += [f"-trustedRelays={','.join(self.relays)}"] if self.relays else []
        return flags + ([f"-announceAddrs={','.join(self.announce)}"] if self.announce else [])


class HivemindNode:
    """One libp2p daemon: calls peers, and serves calls where a handler is given.

    Attributes:
        peer_id: ours, in base 58.
        addresses: where others can dial us; empty for a node that does not listen.
        daemon_ended: set once the daemon is gone, whoever ended it.
    """

    def __init__(self, identity: Identity | None = None, limits: WireLimits | None = None) -> None:
        self.identity = identity or Identity.generate()
        self.peer_id = self.identity.peer_id
        self.addresses: tuple[str, ...] = ()
        self.traffic = Traffic()
        self._limits = limits or WireLimits()
        self._budget = Budget(self._limits.open_bytes)
        self._p2p: P2P | None = None
        self._keeper: asyncio.subprocess.Process | None = None
        self._directory: Path | None = None
        self._output: asyncio.Task[None] | None = None
        self._connections: dict[str, Connection] = {}
        self._dialling: dict[str, asyncio.Lock] = {}
        self._served: set[Connection] = set()
        self.daemon_ended = asyncio.Event()

    @property
    def p2p(self) -> P2P:
        """The daemon, for the DHT beside us."""
        if self._p2p is None:
            raise TransportError("this node has not been started, or has been closed")
        return self._p2p

    async def start(self, listen: Sequence[str] = (), reach: Reach | None = None) -> HivemindNode:
        """Start the daemon; ``listen`` holds multiaddresses such as ``/ip4/127.0.0.1/tcp/0``, none for a pure client.

        Raises:
            ServerStartFailed: the daemon did not start, for instance because a port is in use.
        """
        # Short and in /tmp: the path of a unix socket has at most 108 bytes.
        directory = Path(tempfile.mkdtemp(prefix="swarmtune-", dir="/tmp" if os.path.isdir("/tmp") else None))
        self._directory = directory
        key = directory / "identity"
        key.touch(mode=0o600)
        key.write_bytes(self.identity.to_bytes())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._start_daemon(directory, key, listen, reach or Reach())
                attached: Any = type("AttachedP2P", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{directory}/"})
                self._p2p = await attached.replicate(Multiaddr(f"/unix{directory}/daemon.sock"))
                if listen:
                    await self.look_at_addresses()
        except (TimeoutError, TransportError, *_FOREIGN) as error:
            await self.close()
            raise ServerStartFailed(f"the p2p daemon did not start: {error or 'no answer'}") from error
        return self

    @property
    def answering(self) -> bool:
        """Whether an answer to any peer is being computed or is still on its way."""
        return any(connection.answering for connection in self._served)

    async def look_at_addresses(self) -> None:
        """Bring ``addresses`` up to date: a router's forwarding appears some time after the start.

        Raises:
            TransportError: the daemon does not answer.
        """
        try:
            async with asyncio.timeout(DAEMON_TIMEOUT_S):
                visible = await self.p2p.get_visible_maddrs(latest=True)
        except (TimeoutError, *_FOREIGN) as error:
            raise TransportError(f"the p2p daemon does not say where it listens: {_brief(error)}") from error
        self.addresses = joinable([str(address) for address in visible]) or self.addresses

    async def count_peers(self) -> int | None:
        """Peers that the daemon is connected to; ``None`` where it does not answer."""
        connected = await self.connected()
        return None if connected is None else len(connected)

    async def connected(self) -> set[str] | None:
        """The peers that the daemon is connected to; ``None`` where it does not answer."""
        try:
            async with asyncio.timeout(DAEMON_TIMEOUT_S):
                return {peer.peer_id.to_base58() for peer in await self.p2p.list_peers()}
        except (TimeoutError, TransportError, *_FOREIGN):
            return None

    async def serve(self, handler: Handler) -> None:
        """Answer calls from other peers with ``handler``."""

        async def on_stream(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(self._served) >= MAX_CONNECTIONS:  # the longest idle one makes room, so that idle strangers cannot shut others out
                idle = {served: since for served in self._served if (since := served.idle_since) is not None}
                if not idle:
                    writer.close()
                    return
                await min(idle, key=idle.__getitem__).close()
            peer = info.peer_id.to_base58()
            share = Share(self._budget, peer)
            connection = Connection(reader, writer, peer=peer, handler=handler, limits=self._limits, budget=share, traffic=self.traffic)
            self._served.add(connection)
            try:
                await connection.open()
                await connection.closed.wait()
            except TransportError as error:
                logger.info("%s", error)
            finally:
                self._served.discard(connection)

        await self.p2p.add_binary_stream_handler(STREAM_NAME, on_stream)

    async def connect(self, address: str) -> str:
        """Tell the daemon where a peer is, and dial it; returns the peer id.

        Raises:
            TransportError: it cannot be reached.
        """
        peer = peer_of(address)
        place = address.removesuffix(f"/p2p/{peer}")
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                # The client object is hivemind's own; it has no public way to dial an address after the start.
                await self.p2p._client.connect(PeerID.from_base58(peer), [Multiaddr(place)])
        except (TimeoutError, *_FOREIGN) as error:
            raise TransportError(f"peer {peer} cannot be reached at {address}: {_brief(error, place)}") from error
        return peer

    async def call(self, peer: str, request: Encoded, timeout_s: float) -> Incoming:
        """See ``Transport.call``."""
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connection(peer)
        except TimeoutError as error:
            raise TransportError(f"no stream to peer {peer} within {timeout_s:.1f} s") from error
        return await connection.request(request, max(0.001, deadline - time.monotonic()))

    async def close(self) -> None:
        """Close all streams, end the daemon, remove its directory. Safe to repeat."""
        for connection in (*self._connections.values(), *self._served):
            await connection.close()
        self._connections.clear()
        if self._p2p is not None:
            p2p, self._p2p = self._p2p, None
            await asyncio.wait_for(p2p.shutdown(), CLOSE_TIMEOUT_S)
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            assert keeper.stdin is not None
            keeper.stdin.close()
            try:
                await asyncio.wait_for(keeper.wait(), CLOSE_TIMEOUT_S)
            except TimeoutError:
                keeper.kill()
        if self._output is not None:
            self._output.cancel()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _start_daemon(self, directory: Path, key: Path, listen: Sequence[str], reach: Reach) -> None:
        binary = Path(hivemind.hivemind_cli.__path__[0]) / "p2pd"
        flags = [
            "-tls=1",
            "-relayDiscovery=0",
            "-autonat=0",
            "-dhtClient",
            "-idleTimeout=30s",
            *reach.flags(),
        ]
        flags += [f"-hostAddrs={','.join(listen)}"] if listen else ["-noListenAddrs"]
        self._keeper = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", KEEPER, "swarmtune-keeper", str(directory), str(binary), f"-id={key}", f"-listen=/unix{directory}/daemon.sock", *flags,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, close_fds=True,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(directory), "GOLOG_LOG_LEVEL": "error"},
        )  # fmt: skip
        assert self._keeper.stdout is not None
        last = "it ended at once"
        async for raw in self._keeper.stdout:
            line = raw.decode("utf-8", "replace").strip()
            if line.startswith("Peer ID:"):
                break
            last = line or last
        else:
            raise P2PDaemonError(last[:300])
        self._output = asyncio.create_task(self._drain(self._keeper.stdout))

    async def _drain(self, output: asyncio.StreamReader) -> None:
        """Keep the daemon's pipe empty; its end means that the daemon is gone."""
        async for raw in output:
            logger.debug("p2pd: %s", raw.decode("utf-8", "replace").rstrip())
        self.daemon_ended.set()

    async def _open_stream(self, peer: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """What ``P2P.call_binary_stream_handler`` does, but closing the socket to the daemon when it fails or is cancelled."""
        reader, writer = await self.p2p._client.control.daemon_connector.open_connection()
        try:
            request = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer).to_bytes(), proto=[STREAM_NAME])
            await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request))
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
        except BaseException:
            await close_writer(writer)
            raise
        return reader, writer

    async def _connection(self, peer: str) -> Connection:
        async with self._dialling.setdefault(peer, asyncio.Lock()):
            connection = self._connections.get(peer)
            if connection is not None and not connection.closed.is_set():
                return connection
            if self.daemon_ended.is_set():
                raise TransportError("the p2p daemon of this process has ended: connect again")
            try:
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    reader, writer = await self._open_stream(peer)
            except TimeoutError as error:
                raise TransportError(f"peer {peer} did not answer within {DIAL_TIMEOUT_S:.0f} s") from error
            except _FOREIGN as error:
                raise TransportError(f"no stream to peer {peer}: {_brief(error)}") from error
            connection = Connection(reader, writer, peer=peer, limits=self._limits, traffic=self.traffic)
            self._connections[peer] = await connection.open()
            return connection


def _brief(error: BaseException, place: str = "") -> str:
    """The most telling clause of a daemon's error, on one line: what it says of ``place`` where it lists several addresses, else the last one."""
    of_place = str(error).partition(f"[{place}] ")[2].partition("\n")[0] if place else ""
    text = " ".join(of_place.split() or str(error).split())
    return (text if of_place else (text.rpartition("] ")[2] or text)[-160:])[:200] or "no answer in time"
