"""What the chain needs from a transport: one method."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from swarmtune.errors import SwarmtuneError
from swarmtune.wire.frames import Encoded, Incoming

Handler = Callable[[str, Incoming], Awaitable[Encoded]]
"""A server's side: the caller's peer id and its message in, the answer out."""


class TransportError(SwarmtuneError):
    """A call ended without a whole answer: the peer is gone, silent, too slow, or sent something else than our protocol."""


class NodeLost(TransportError):
    """A call ended because this side's own way into the network broke, which says nothing about the peer; it is being repaired."""


@dataclass(slots=True)
class Traffic:
    """Running totals of one transport, frames and headers included."""

    bytes_up: int = 0
    bytes_down: int = 0


class Transport(Protocol):
    """Carries one call to one peer. Runs on the loop thread."""

    traffic: Traffic

    @property
    def repairing(self) -> bool:
        """Whether this side's own way into the network is broken now, so that nothing can be learnt of peers."""
        ...

    def generation(self, peer: str) -> int:
        """A number of the connection to ``peer`` that is open, another one for each; 0 where none is open. A new one may lead to a new process."""
        ...

    def silent_s(self, peer: str) -> float:
        """Seconds since anything came from ``peer``; while a call to it is open, a live one is heard every second. 0 where no connection is open."""
        ...

    async def call(self, peer: str, request: Encoded, timeout_s: float) -> Incoming:
        """Send ``request`` and wait for its whole answer.

        Raises:
            TransportError: no whole answer within ``timeout_s`` seconds.
        """
        ...
