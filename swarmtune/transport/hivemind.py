"""hivemind's libp2p daemon as a transport: its rebuilding when it dies, dialling, and our frames on its binary streams.

hivemind's exceptions are translated here. Its client library attaches to a daemon that we start ourselves (``daemon.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
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
from swarmtune.transport.base import Handler, NodeLost, Traffic, TransportError
from swarmtune.transport.clock import now
from swarmtune.transport.connection import Connection, close_writer
from swarmtune.transport.daemon import Daemon
from swarmtune.transport.places import Places, knock
from swarmtune.wire.frames import Budget, Encoded, Incoming, Share, WireLimits

logger = logging.getLogger(__name__)

STREAM_NAME = "/swarmtune/1"
START_TIMEOUT_S = 20.0
DIAL_TIMEOUT_S = 8.0
CLOSE_TIMEOUT_S = 5.0
DAEMON_TIMEOUT_S = 2.0
MAX_CONNECTIONS = 256
PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 1.5
PROBE_MISSES = 2
"""A daemon that does not answer so many probes in a row, and through which nothing comes meanwhile, is taken for hung."""
REBUILD_PATIENCE_S = 60.0
NEWS_S = 0.02

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
        daemon_ended: set once the daemon is gone and could not be started again.
        rebuilds: how often it was started again.
        rebuilt: called after each time, in order, with this node working again.
        told: called with a sentence and the seconds that it took, after each time.
    """

    def __init__(self, identity: Identity | None = None, limits: WireLimits | None = None) -> None:
        self.identity = identity or Identity.generate()
        self.peer_id = self.identity.peer_id
        self.addresses: tuple[str, ...] = ()
        self.traffic = Traffic()
        self._limits = limits or WireLimits()
        self._budget = Budget(self._limits.open_bytes)
        self._p2p: P2P | None = None
        self._daemon: Daemon | None = None
        self._directory: Path | None = None
        self._listen: tuple[str, ...] = ()
        self._reach = Reach()
        self._handler: Handler | None = None
        self._gone: Callable[[str], None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._redials: dict[str, asyncio.Task[None]] = {}
        self._ready = asyncio.Event()
        self._failure, self._starts = "", 0
        self._places = Places()
        self._connections: dict[str, Connection] = {}
        self._dialling: dict[str, asyncio.Lock] = {}
        self._opened: dict[str, int] = {}
        self._served: set[Connection] = set()
        self.daemon_ended = asyncio.Event()
        self.rebuilds = 0
        self.rebuilt: list[Callable[[], Awaitable[None]]] = []
        self.told: Callable[[str, float], None] = lambda sentence, seconds: logger.warning("%s", sentence)

    @property
    def repairing(self) -> bool:
        """See ``Transport.repairing``."""
        return not self._ready.is_set()

    def generation(self, peer: str) -> int:
        """See ``Transport.generation``."""
        connection = self._connections.get(peer)
        return self._opened[peer] if connection is not None and not connection.closed.is_set() else 0

    def silent_s(self, peer: str) -> float:
        """See ``Transport.silent_s``."""
        connection = self._connections.get(peer)
        return connection.silent_s if connection is not None and not connection.closed.is_set() else 0.0

    @property
    def daemon_pid(self) -> int | None:
        """Process id of the daemon; ``None`` while there is none."""
        return self._daemon.pid if self._daemon is not None else None

    @property
    def directory(self) -> Path:
        """A private directory that goes away with this node, however it ends."""
        assert self._directory is not None, "the node has been started"
        return self._directory

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
        self._directory = Path(tempfile.mkdtemp(prefix="swarmtune-", dir="/tmp" if os.path.isdir("/tmp") else None))
        key = self._directory / "identity"
        key.touch(mode=0o600)
        key.write_bytes(self.identity.to_bytes())
        self._listen, self._reach = tuple(listen), reach or Reach()
        try:
            await self._start_daemon()
        except ServerStartFailed:
            await self.close()
            raise
        self._listen = tuple(_with_port(address, self.addresses) for address in listen)
        self._ready.set()
        self._keeping = asyncio.create_task(self._keep())
        return self

    async def _start_daemon(self) -> None:
        """A daemon in the runtime directory, and hivemind attached to it.

        Raises:
            ServerStartFailed: it did not start, for instance because a port is in use.
        """
        assert self._directory is not None
        self._starts += 1
        self._daemon = daemon = Daemon(self._directory, self._starts)
        flags = ["-tls=1", "-relayDiscovery=0", "-autonat=0", "-dhtClient", "-idleTimeout=30s", *self._reach.flags()]
        flags += [f"-hostAddrs={','.join(self._listen)}"] if self._listen else ["-noListenAddrs"]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await daemon.start(Path(hivemind.hivemind_cli.__path__[0]) / "p2pd", self._directory / "identity", flags)
                self._p2p = await self._attached(self._directory).replicate(Multiaddr(f"/unix{daemon.socket}"))
                if self._listen:
                    await self.look_at_addresses()
        except (TimeoutError, TransportError, ServerStartFailed, *_FOREIGN) as error:
            await daemon.close(replace=True)
            raise ServerStartFailed(f"the p2p daemon did not start: {error or 'no answer'}") from error

    async def _keep(self) -> None:
        """As long as this node lives: when the daemon dies or hangs, start another one that cannot be told from it."""
        while True:
            why = await self._until_lost()
            began = now()
            self._ready.clear()
            rebuilt = False
            try:
                rebuilt = await self._rebuild(began)
            finally:
                if not rebuilt:
                    self.daemon_ended.set()
                self._ready.set()
            if not rebuilt:
                return
            self._redials = {peer: asyncio.create_task(self._redial(peer)) for peer in self._places}
            self.rebuilds += 1
            seconds = now() - began
            self.told(f"the p2p daemon of this process {why}: another one took its place after {seconds:.1f} s (number {self.rebuilds})", seconds)
            if self._following is not None:
                self._following.cancel()
            self._following = asyncio.create_task(self._follow())  # beside the watch: another daemon may die meanwhile

    async def _follow(self) -> None:
        """What hangs on the daemon begins anew, each as often as it takes; the next daemon that dies ends this."""
        for hook in self.rebuilt:
            pause_s = 0.5
            while True:
                try:
                    await hook()
                    break
                except (TransportError, *_FOREIGN) as error:
                    logger.warning("after the p2p daemon was started again: %s; trying again", error)
                await asyncio.sleep(pause_s)
                pause_s = min(10.0, 2 * pause_s)

    async def _until_lost(self) -> str:
        """Wait until the daemon is gone, or answers nothing although it is asked; says which."""
        assert self._daemon is not None
        misses, heard = 0, self.traffic.bytes_down
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_EVERY_S):  # wait_for can swallow a cancellation that comes with the end of the daemon
                    await self._daemon.ended.wait()
            if self._daemon.gone:
                return "ended"
            answered = await self.connected(PROBE_TIMEOUT_S) is not None
            misses = 0 if answered or self.traffic.bytes_down != heard else misses + 1
            heard = self.traffic.bytes_down
            if misses >= PROBE_MISSES:
                return "hung"

    async def _rebuild(self, began: float) -> bool:
        """The same identity, ports and handlers over a new daemon; whether that worked within the patience."""
        for connection in (*self._connections.values(), *self._served):
            connection.abort("the p2p daemon of this process ended")
        self._connections.clear()
        if self._p2p is not None:
            p2p, self._p2p = self._p2p, None
            await _let_go(p2p)
        if self._daemon is not None:
            await self._daemon.close(replace=True)
        pause_s = 0.1
        while True:
            try:
                await self._start_daemon()
                if self._handler is not None:
                    async with asyncio.timeout(DAEMON_TIMEOUT_S):
                        await self.serve(self._handler, self._gone)
                break
            except (TimeoutError, ServerStartFailed, *_FOREIGN) as error:
                self._failure = str(error) or "it does not answer"
                logger.warning("%s; trying again", self._failure)
                if self._daemon is not None:
                    await self._daemon.close(replace=True)
            if now() + pause_s > began + REBUILD_PATIENCE_S:
                return False
            await asyncio.sleep(pause_s)
            pause_s = min(2.0, 2 * pause_s)
        self._failure = ""
        return True

    async def _redial(self, peer: str) -> None:
        """A new daemon knows nobody."""
        places = self._places.of(peer)
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await knock(places)
                await self._dial(peer, places)
        except (TimeoutError, TransportError, *_FOREIGN) as error:
            logger.debug("peer %s is not reached again yet: %s", peer, _brief(error))

    async def _dial(self, peer: str, places: Sequence[str]) -> None:
        request = p2pd_pb2.ConnectRequest(peer=PeerID.from_base58(peer).to_bytes(), addrs=[Multiaddr(place).to_bytes() for place in places])
        _, writer, _ = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=request))
        await close_writer(writer)

    async def _make_sure(self, peer: str) -> None:
        """Raise ``ConnectionRefusedError`` rather than have the daemon dial a peer that is certainly away."""
        if (places := self._places.of(peer)) and peer not in (await self.connected() or ()):
            await knock(places)

    def _attached(self, directory: Path) -> Any:
        """The library's class for this daemon; through it the DHT neither dials peers that are away, nor waits for a daemon that is gone."""

        async def call_unary(p2p: P2P, peer: PeerID, *rest: Any) -> Any:
            await self._make_sure(peer.to_base58())
            if p2p is not self._p2p:
                raise P2PDaemonError("the p2p daemon ended")
            return await P2P._call_unary_protobuf_handler(p2p, peer, *rest)

        return type("AttachedP2P", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{directory}/", "_call_unary_protobuf_handler": call_unary})

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

    async def connected(self, timeout_s: float = DAEMON_TIMEOUT_S) -> set[str] | None:
        """The peers that the daemon is connected to; ``None`` where it does not answer."""
        try:
            async with asyncio.timeout(timeout_s):
                _, writer, response = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
                await close_writer(writer)
            return {PeerID(peer.id).to_base58() for peer in response.peers}
        except (TimeoutError, TransportError, *_FOREIGN):
            return None

    async def serve(self, handler: Handler, gone: Callable[[str], None] | None = None) -> None:
        """Answer calls from other peers with ``handler``; ``gone`` hears of each peer whose last connection has ended."""
        self._handler, self._gone = handler, gone

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
                if gone is not None and all(other.peer != peer for other in self._served):
                    gone(peer)

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
                await self._ready.wait()
                if place in self._places.of(peer):
                    await knock([place])
                await self._dial(peer, [place])
        except (TimeoutError, TransportError, *_FOREIGN) as error:
            raise TransportError(f"peer {peer} cannot be reached at {address}: {_brief(error, place)}") from error
        self._places.add(peer, place)
        return peer

    async def call(self, peer: str, request: Encoded, timeout_s: float) -> Incoming:
        """See ``Transport.call``."""
        deadline, daemon = now() + timeout_s, self._daemon
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    connection = await self._connection(peer)
            except TimeoutError as error:
                raise TransportError(f"no stream to peer {peer} within {timeout_s:.1f} s") from error
            return await connection.request(request, max(0.001, deadline - now()))
        except TransportError as error:
            if now() < deadline and not self.daemon_ended.is_set() and await self._lost(daemon):
                raise NodeLost(f"the p2p daemon of this process ended during the call: {error}") from error
            raise

    async def _lost(self, daemon: Daemon | None) -> bool:
        """Whether ``daemon`` is gone or replaced; its end is heard of a moment after that of its streams."""
        with contextlib.suppress(TimeoutError):
            if daemon is not None and daemon is self._daemon:
                async with asyncio.timeout(NEWS_S):
                    await daemon.ended.wait()
        return daemon is not self._daemon or not self._ready.is_set() or (daemon is not None and daemon.ended.is_set())

    async def close(self) -> None:
        """Close all streams, end the daemon, remove its directory. Safe to repeat."""
        tasks = [task for task in (self._keeping, self._following, *self._redials.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in (*self._connections.values(), *self._served):
            await connection.close()
        self._connections.clear()
        if self._p2p is not None:
            p2p, self._p2p = self._p2p, None
            await _let_go(p2p)
        if self._daemon is not None:
            daemon, self._daemon = self._daemon, None
            await daemon.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def _ask(self, request: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Any]:
        """One request to the daemon over a socket of its own, which is closed when that fails or is cancelled, as hivemind's client would not."""
        reader, writer = await self.p2p._client.control.daemon_connector.open_connection()
        try:
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            raise_if_failed(response)
        except BaseException:
            await close_writer(writer)
            raise
        return reader, writer, response

    async def _open_stream(self, peer: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """What ``P2P.call_binary_stream_handler`` does."""
        request = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer).to_bytes(), proto=[STREAM_NAME])
        reader, writer, _ = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request))
        return reader, writer

    async def _connection(self, peer: str) -> Connection:
        async with self._dialling.setdefault(peer, asyncio.Lock()):
            connection = self._connections.get(peer)
            if connection is not None and not connection.closed.is_set():
                return connection
            await self._ready.wait()  # while the daemon is being replaced; the caller's deadline bounds it
            if (redial := self._redials.get(peer)) is not None:
                await asyncio.wait([redial])
            if self.daemon_ended.is_set():
                raise TransportError(f"the p2p daemon of this process ended and could not be started again ({self._failure}): connect again")
            try:
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    await self._make_sure(peer)
                    reader, writer = await self._open_stream(peer)
            except TimeoutError as error:
                raise TransportError(f"peer {peer} did not answer within {DIAL_TIMEOUT_S:.0f} s") from error
            except _FOREIGN as error:
                raise TransportError(f"no stream to peer {peer}: {_brief(error)}") from error
            connection = Connection(reader, writer, peer=peer, limits=self._limits, traffic=self.traffic)
            self._connections[peer] = await connection.open()
            self._opened[peer] = self._opened.get(peer, 0) + 1
            return connection


async def _let_go(p2p: P2P) -> None:
    """Leave a daemon for good: hivemind would leave those waiting who wait for its answers, and nobody hears what its own tasks end with."""
    control = p2p._client.control
    for call in control._pending_calls.values():
        if not call.done():
            call.set_exception(P2PDaemonError("the p2p daemon ended"))
    tasks = [task for task in (p2p._listen_task, control._read_task, control._write_task) if task is not None]
    with contextlib.suppress(TimeoutError, *_FOREIGN):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await p2p.shutdown()
            await asyncio.gather(*tasks, return_exceptions=True)


def _with_port(address: str, bound: Sequence[str]) -> str:
    """An address to listen on, with the port that was bound where it left the choice open."""
    protocol = re.search(r"/(tcp|udp)/0(/|$)", address)
    if protocol is None:
        return address
    ports = [found[1] for each in bound if (found := re.search(rf"/{protocol[1]}/(\d+)", each))]
    return address.replace(f"/{protocol[1]}/0", f"/{protocol[1]}/{ports[0]}", 1) if ports else address


def _brief(error: BaseException, place: str = "") -> str:
    """The most telling clause of a daemon's error, on one line: what it says of ``place`` where it lists several addresses, else the last one."""
    of_place = str(error).partition(f"[{place}] ")[2].partition("\n")[0] if place else ""
    text = " ".join(of_place.split() or str(error).split())
    if text.endswith("dial backoff"):  # the daemon does not even try
        return "it could not be reached a moment ago"
    return (text if of_place else (text.rpartition("] ")[2] or text)[-160:])[:200] or "no answer in time"
