"""Keeping a server's record in the DHT alive, and the server itself connected to the others of its model."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from swarmtune.discovery.dht import DirectoryNode
from swarmtune.discovery.records import LIFETIME_S, RENEW_EVERY_S, Announcement, peer_of
from swarmtune.transport.base import TransportError
from swarmtune.transport.hivemind import HivemindNode
from swarmtune.wire.codec import Message, encode
from swarmtune.wire.messages import MAX_ROUND_TRIP_US, MAX_ROUND_TRIPS, CallKind, ServerInfo

logger = logging.getLogger(__name__)

GREET_EVERY_S = 1.0
EAGER_S = 60.0
GIVE_WAY_S = 1.0
"""More than the loops of two servers differ in time, and than a round trip."""
MEASURE_S, FADING = 2.0, 1.05
"""A round trip that was measured counts a little more each time, so that one which has become longer is seen in a few minutes."""
ALONE_S = 60.0
"""A server that has met others and has been without them for so long says so."""


async def announce_forever(
    node: HivemindNode,
    directory: DirectoryNode,
    initial_peers: Sequence[str],
    info: Callable[[], ServerInfo],
    *,
    addresses_change: bool = False,
    round_trips: dict[str, int] | None = None,
) -> None:
    """Publish a fresh record every ten seconds, and stay connected to the initial peers and to all servers of the model.

    Where ``addresses_change`` (a router may forward a port at any time), the daemon is asked for them before each record. Into ``round_trips`` go the
    microseconds to the other servers of the model, by peer id.
    """
    company = Company(node, directory, initial_peers, {} if round_trips is None else round_trips)
    node.rebuilt.append(company.forget)
    keeping = asyncio.create_task(company.keep_forever(lambda: info().model))
    try:
        while not keeping.done():
            company.grown.clear()
            if addresses_change:
                await _look(node)
            await publish(node, directory, info())
            growing = asyncio.create_task(company.grown.wait())  # a peer met now does not know of this server yet
            await asyncio.wait([growing, keeping], timeout=RENEW_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            growing.cancel()
        keeping.result()
    finally:
        keeping.cancel()


class Company:
    """The other servers that this one knows: without each of them in touch with the others, the loss of the first would split the swarm.

    Attributes:
        grown: set when a peer has been met.
    """

    def __init__(self, node: HivemindNode, directory: DirectoryNode, initial_peers: Sequence[str], round_trips: dict[str, int]) -> None:
        self._node, self._directory, self._round_trips = node, directory, round_trips
        self._initial = {address: peer for address in initial_peers if (peer := peer_of(address)) != node.peer_id}
        self._met: set[str] = set()
        self._missed: set[str] = set()
        self._together_at: float | None = None
        self.grown = asyncio.Event()

    async def forget(self) -> None:
        """This node has begun anew, so it has met nobody: its part of the DHT knows only whom it greets from now on."""
        self._met.clear()
        self.grown.set()

    async def keep_forever(self, model: Callable[[], str]) -> None:
        """Look for peers that are not connected every ten seconds; for initial ones eagerly in the first minute."""
        began = time.monotonic()
        while True:
            await self.look_around(model())
            eager = not self._met.issuperset(self._initial.values()) and time.monotonic() - began < EAGER_S
            await asyncio.sleep(GREET_EVERY_S if eager else RENEW_EVERY_S)

    async def look_around(self, model: str) -> None:
        """Dial and greet the initial peers, then the announced servers of ``model``, where they are not connected."""
        connected = await self._node.connected()
        if connected is None:
            return  # the daemon is busy or gone, which others watch
        self._met = {peer for peer in self._met & connected if self._directory.knows(peer)}
        await self._meet(self._initial, connected)
        try:
            announcements = await self._directory.find(model)
        except TransportError as error:
            logger.debug("%s", error)
            announcements = []
        others = [announcement for announcement in announcements if announcement.peer != self._node.peer_id]
        self._missed &= {*self._initial.values(), *(other.peer for other in others)}
        await self._meet({address: other.peer for other in others for address in other.addresses}, connected)
        await self._measure({other.peer for other in others} & (await self._node.connected() or set()))
        self._tell_if_alone()

    async def _measure(self, peers: set[str]) -> None:
        """How long a short question to each of these takes; the quickest of the latest few, because a busy moment says nothing of the way."""
        measured = sorted(peers)[:MAX_ROUND_TRIPS]
        for peer in set(self._round_trips) - set(measured):
            del self._round_trips[peer]

        async def measure(peer: str) -> None:
            began = time.monotonic()
            try:
                await self._node.call(peer, encode(Message(CallKind.INFO), answer_bytes=0), MEASURE_S)
            except TransportError as error:
                logger.debug("%s", error)
                return
            took_us = min(MAX_ROUND_TRIP_US, max(1, round((time.monotonic() - began) * 1e6)))
            self._round_trips[peer] = min(took_us, round(self._round_trips.get(peer, took_us) * FADING))

        await asyncio.gather(*map(measure, measured))  # all at once, so that frozen ones hold nothing up

    async def _meet(self, addresses: Mapping[str, str], connected: set[str]) -> None:
        """All at once: each dial and each greeting has its own deadline."""

        async def meet(address: str, peer: str) -> None:
            try:
                if peer not in connected and not await self._gave_way(peer):
                    await self._node.connect(address)
                if peer not in self._met:
                    await self._directory.greet(peer)
            except TransportError as error:
                logger.debug("%s", error)
                self._missed.add(peer)
                return
            self._missed.discard(peer)
            if peer not in self._met:
                self._met.add(peer)
                self.grown.set()

        await asyncio.gather(*(meet(address, peer) for address, peer in addresses.items() if peer not in self._met))

    async def _gave_way(self, peer: str) -> bool:
        """Whether a peer that could not be dialled has come by itself meanwhile.

        libp2p dials from the port at which it listens, so two servers that dial each other within a round trip open one connection from both ends,
        which fails; both may try again after 5 s, at the same time. So after a failure the one with the greater id waits a little.
        """
        if peer not in self._missed or self._node.peer_id < peer:
            return False
        await asyncio.sleep(GIVE_WAY_S * random.uniform(1.0, 2.0))
        return peer in (await self._node.connected() or set())

    def _tell_if_alone(self) -> None:
        now = time.monotonic()
        if self._met:
            self._together_at = now
        elif self._together_at is not None and now - self._together_at >= ALONE_S:
            self._together_at = None
            logger.warning(
                "this server has lost all other servers: clients that join through it find only its own blocks; looking for them every %.0f s",
                RENEW_EVERY_S,
            )


async def _look(node: HivemindNode) -> None:
    before = node.addresses
    try:
        await node.look_at_addresses()
    except TransportError as error:
        logger.debug("%s", error)
    if node.addresses != before:
        logger.info("now also reachable at %s", " ".join(sorted(set(node.addresses) - set(before))) or "fewer addresses")


async def publish(node: HivemindNode, directory: DirectoryNode, info: ServerInfo) -> None:
    """Store a fresh record, which takes the place of the one before; a warning where the DHT does not take it."""
    announcement = Announcement(node.peer_id, replace(info, round_trips={}), node.addresses, time.time() + LIFETIME_S)
    try:
        stored, why = await directory.publish(announcement, announcement.seal(node.identity)), "refused"
    except TransportError as error:
        stored, why = False, str(error)
    if not stored:
        logger.warning("the DHT did not take this server's record (%s); trying again in %.0f s", why, RENEW_EVERY_S)
