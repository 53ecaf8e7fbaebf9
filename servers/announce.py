"""Keeping a server's record in the DHT alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from swarmtune.discovery.dht import DirectoryNode
from swarmtune.discovery.records import LIFETIME_S, RENEW_EVERY_S, Announcement, peer_of
from swarmtune.transport.base import TransportError
from swarmtune.transport.hivemind import HivemindNode
from swarmtune.wire.messages import ServerInfo

logger = logging.getLogger(__name__)

GREET_EVERY_S = 1.0
EAGER_S = 60.0


async def announce_forever(
    node: HivemindNode, directory: DirectoryNode, initial_peers: Sequence[str], info: Callable[[], ServerInfo], *, addresses_change: bool = False
) -> None:
    """Publish a fresh record every ten seconds; meet initial peers that come up later, eagerly in the first minute.

    Where ``addresses_change`` (a router may forward a port at any time), the daemon is asked for them before each record.
    """
    waiting = {address for address in initial_peers if peer_of(address) != node.peer_id}
    began, published_at = time.monotonic(), 0.0
    while True:
        met = await _greet(node, directory, sorted(waiting))
        waiting -= met
        if met or time.monotonic() - published_at >= RENEW_EVERY_S:
            if addresses_change:
                await _look(node)
            await _publish(node, directory, info())
            published_at = time.monotonic()
        eager = waiting and time.monotonic() - began < EAGER_S
        await asyncio.sleep(GREET_EVERY_S if eager else RENEW_EVERY_S)


async def _greet(node: HivemindNode, directory: DirectoryNode, addresses: Sequence[str]) -> set[str]:
    async def meet(address: str) -> str | None:
        try:
            await directory.greet(await node.connect(address))
        except TransportError as error:
            logger.debug("%s", error)
            return None
        return address

    return {address for address in await asyncio.gather(*map(meet, addresses)) if address}


async def _look(node: HivemindNode) -> None:
    before = node.addresses
    try:
        await node.look_at_addresses()
    except TransportError as error:
        logger.debug("%s", error)
    if node.addresses != before:
        logger.info("now also reachable at %s", " ".join(sorted(set(node.addresses) - set(before))) or "fewer addresses")


async def _publish(node: HivemindNode, directory: DirectoryNode, info: ServerInfo) -> None:
    announcement = Announcement(node.peer_id, info, node.addresses, time.time() + LIFETIME_S)
    try:
        stored, why = await directory.publish(announcement, announcement.seal(node.identity)), "refused"
    except TransportError as error:
        stored, why = False, str(error)
    if not stored:
        logger.warning("the DHT did not take this server's record (%s); trying again in %.0f s", why, RENEW_EVERY_S)
