"""Checks with daemons of our own: that one starts, what a server here would announce, and a round trip between two."""

from __future__ import annotations

import asyncio
import statistics
import time

from swarmtune.doctor.check import Check, Status
from swarmtune.doctor.machine import reach
from swarmtune.errors import ServerStartFailed
from swarmtune.transport.base import TransportError
from swarmtune.transport.hivemind import HivemindNode
from swarmtune.wire.codec import Message, encode
from swarmtune.wire.frames import Encoded, Incoming

ROUND_TRIPS = 5
CALL_TIMEOUT_S = 5.0


async def check_daemon(listen: str, port: int) -> list[Check]:
    """Start two nodes, one that listens and one that calls it, and end them again."""
    server, client = HivemindNode(), HivemindNode()
    family = "ip6" if ":" in listen else "ip4"
    began = time.monotonic()
    try:
        await server.start([f"/{family}/{listen}/tcp/{port}"])
        checks = [Check("daemon", Status.OK, f"the p2p daemon started in {time.monotonic() - began:.2f} s"), _announced(server.addresses)]
        await server.serve(_echo)
        await client.start()
        return [*checks, await _round_trip(client, server)]
    except ServerStartFailed as error:
        advice = "check that hivemind is installed whole (pip install --force-reinstall hivemind), that /tmp can be written, and the port"
        return [Check("daemon", Status.FAILED, str(error), advice)]
    finally:
        await asyncio.gather(client.close(), server.close())


async def _echo(peer: str, incoming: Incoming) -> Encoded:
    return encode(Message("echo"))


def _announced(addresses: tuple[str, ...]) -> Check:
    """What a server that listens here tells others, and who can use it."""
    found = "; ".join(f"{address.partition('/p2p/')[0]} ({reach(address.split('/')[2])})" for address in addresses)
    if not addresses:
        return Check("announced addresses", Status.FAILED, "a server here would announce no address", "give --listen an address of this machine")
    return Check("announced addresses", Status.OK, f"a server here would announce {found}")


async def _round_trip(client: HivemindNode, server: HivemindNode) -> Check:
    advice = "look for a firewall on this machine that cuts local connections"
    refusals = []
    for address in server.addresses:
        try:
            peer = await client.connect(address)
            times_s = []
            for _ in range(ROUND_TRIPS):
                began = time.monotonic()
                await client.call(peer, encode(Message("echo"), answer_bytes=0), CALL_TIMEOUT_S)
                times_s.append(time.monotonic() - began)
        except TransportError as error:
            refusals.append(str(error))
            continue
        return Check(
            "round trip", Status.OK, f"{statistics.median(times_s) * 1000:.1f} ms between two nodes of this machine (median of {ROUND_TRIPS})"
        )
    return Check("round trip", Status.FAILED, "; ".join(refusals) or "there is no address to call", advice)
