"""A transport inside one process: the same frames over socket pairs, no network. For tests and for servers beside their client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from functools import partial

from swarmtune.transport.base import Handler, Traffic, TransportError
from swarmtune.transport.connection import Connection
from swarmtune.wire.frames import Encoded, Incoming, WireLimits

CLIENT = "client"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class LoopbackTransport:
    """Calls handlers by peer name. A peer removed from ``handlers`` is dead: its connections are cut at once."""

    def __init__(self, handlers: Mapping[str, Handler], limits: WireLimits | None = None) -> None:
        self.handlers = dict(handlers)
        self.traffic = Traffic()
        self._limits = limits
        self._pairs: dict[tuple[str, str], tuple[Connection, Connection]] = {}
        self._opened: dict[str, int] = {}
        self.repairing = False
        self._dialling: dict[tuple[str, str], asyncio.Lock] = {}
        for name, handler in self.handlers.items():
            if hasattr(handler, "deliver"):
                handler.deliver = partial(self.call_from, name)

    def generation(self, peer: str) -> int:
        """See ``Transport.generation``."""
        pair = self._pairs.get((CLIENT, peer))
        return self._opened[peer] if pair is not None and not pair[0].closed.is_set() else 0

    def silent_s(self, peer: str) -> float:
        """See ``Transport.silent_s``."""
        pair = self._pairs.get((CLIENT, peer))
        return pair[0].silent_s if pair is not None and not pair[0].closed.is_set() else 0.0

    async def call(self, peer: str, request: Encoded, timeout_s: float) -> Incoming:
        """See ``Transport.call``."""
        return await (await self._connection(CLIENT, peer)).request(request, timeout_s)

    async def call_from(self, caller: str, peer: str, request: Encoded, timeout_s: float) -> Incoming:
        """The same from one server to another; a dead one calls nobody."""
        if caller not in self.handlers:
            raise TransportError(f"{caller} is not there any more")
        return await (await self._connection(caller, peer)).request(request, timeout_s)

    async def kill(self, peer: str) -> None:
        """Cut every connection to and from ``peer`` and forget it, as SIGKILL would."""
        self.handlers.pop(peer, None)
        for key in [key for key in self._pairs if peer in key]:
            for end in self._pairs.pop(key, ()):
                await end.close()

    async def close(self) -> None:
        """Close all connections."""
        for peer in {peer for _, peer in self._pairs}:
            await self.kill(peer)

    async def _connection(self, caller: str, peer: str) -> Connection:
        async with self._dialling.setdefault((caller, peer), asyncio.Lock()):
            pair = self._pairs.get((caller, peer))
            if pair is not None and not pair[0].closed.is_set():
                return pair[0]
            handler = self.handlers.get(peer)
            if handler is None:
                raise TransportError(f"peer {peer} is not there")
            ours, theirs = await self._streams(caller, peer)
            client = Connection(*ours, peer=peer, limits=self._limits, traffic=self.traffic if caller == CLIENT else None)
            gone: Callable[[str], None] | None = getattr(handler, "gone", None)
            server = Connection(*theirs, peer=caller, handler=handler, limits=self._limits, on_closed=gone and partial(gone, caller))
            self._pairs[caller, peer] = (client, server)
            self._opened[peer] = self._opened.get(peer, 0) + (caller == CLIENT)
            opened = await asyncio.gather(client.open(), server.open(), return_exceptions=True)
            for failure in opened:
                if isinstance(failure, BaseException):
                    raise failure
            return client

    async def _streams(self, caller: str, peer: str) -> tuple[Streams, Streams]:
        """Two ends of a new connection from ``caller`` to ``peer``: the caller's, and the peer's."""
        ends, made = socket.socketpair(), list[Streams]()
        try:
            for end in ends:
                made.append(await asyncio.open_connection(sock=end))
        except BaseException:  # a caller that goes away meanwhile leaves nothing open
            for _, writer in made:
                writer.close()
            for end in ends[len(made) :]:
                end.close()
            raise
        return made[0], made[1]
