"""Where faults are made from: between the chain and its transport, each call is seen as it is asked and as it is answered."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from swarmtune.errors import BlocksUnserved
from swarmtune.remote.route import Directory
from swarmtune.swarm import Swarm
from swarmtune.wire.frames import Encoded, Incoming, parse_json

LOOK_S = 10.0


@dataclass
class Calls:
    """Watches the forwards and backwards of one connection.

    Attributes:
        asked: called on the loop thread with way and peer, before a request leaves.
        succeeded: called on the loop thread with the monotonic instants at which a call was asked and answered.
        seconds: what the latest calls took.
    """

    asked: Callable[[str, str], None] = lambda way, peer: None
    succeeded: Callable[[float, float], None] = lambda began, ended: None
    seconds: list[float] = field(default_factory=list)

    def usual_s(self) -> float:
        """Median of what calls take."""
        return sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else 0.01

    def attach(self, swarm: Swarm) -> Calls:
        """Begin to watch ``swarm``."""
        node: Any = swarm._transport
        call = node.call

        async def watched(peer: str, request: Encoded, timeout_s: float) -> Incoming:
            way = str(parse_json(request.header)["kind"]).removeprefix("kept_")
            if way not in ("forward", "backward"):
                return await call(peer, request, timeout_s)
            self.asked(way, peer)
            began = time.monotonic()
            answer = await call(peer, request, timeout_s)
            ended = time.monotonic()
            self.seconds = [*self.seconds[-63:], ended - began]
            self.succeeded(began, ended)
            return answer

        node.call = watched
        return self


def route_of(swarm: Swarm, tokens: int) -> list[str]:
    """The peers that the next call would go to, as far as there is a route now."""

    async def look() -> list[str]:
        directory = directory_of(swarm)
        return [hop.peer for hop in directory.route(0, directory.num_blocks, tokens)]

    try:
        return swarm.loop.run(look())
    except BlocksUnserved:
        return []


def directory_of(swarm: Swarm) -> Directory:
    """What the client knows of the servers of its one model."""
    (opened,) = swarm._models.values()
    return opened.directory


async def reachable(swarm: Swarm) -> set[str]:
    """The servers that the client knows, does not blame, and is connected to."""
    node: Any = swarm._transport
    connected = await node.connected() or set()
    return {name for name, peer in directory_of(swarm).known.items() if name in connected and not peer.faults}


async def look_again(swarm: Swarm) -> None:
    """Let the client look for servers now."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOOK_S):
            await directory_of(swarm).refresh()
