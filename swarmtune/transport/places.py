"""Where peers were reached, so that they can be found again after a daemon has ended: ours or theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from swarmtune.transport.connection import close_writer

MAX_PEERS, MAX_PLACES_OF_PEER = 256, 8
KNOCK_TIMEOUT_S = 1.0


class Places:
    """The latest addresses, without peer ids, at which peers were reached; the peers reached last are kept."""

    def __init__(self) -> None:
        self._places: dict[str, dict[str, None]] = {}

    def add(self, peer: str, place: str) -> None:
        """``peer`` was reached at ``place``."""
        places = self._places.pop(peer, {})
        places.pop(place, None)
        places[place] = None
        self._places[peer] = dict.fromkeys([*places][-MAX_PLACES_OF_PEER:])
        while len(self._places) > MAX_PEERS:
            del self._places[next(iter(self._places))]

    def __iter__(self) -> Iterator[str]:
        """The peers."""
        return iter(list(self._places))

    def of(self, peer: str) -> list[str]:
        """The addresses of a peer; none for one that was never reached."""
        return list(self._places.get(peer, ()))


async def knock(places: Sequence[str]) -> None:
    """Find out whether a peer is certainly away, without asking the daemon: after a dial that failed, libp2p refuses to dial again for 5 s.

    Raises:
        ConnectionRefusedError: nobody listens at any of ``places``. Where that cannot be told, nothing is raised.
    """
    refusals = [refusal for refusal in await asyncio.gather(*map(_refusal, places)) if refusal is not None]
    if places and len(refusals) == len(places):
        raise refusals[-1]


async def _refusal(place: str) -> ConnectionRefusedError | None:
    words = place.split("/")
    if not _is_tcp(words):
        return None
    try:
        async with asyncio.timeout(KNOCK_TIMEOUT_S):
            _, writer = await asyncio.open_connection(words[2], int(words[4]))
            await close_writer(writer)
    except ConnectionRefusedError:
        return ConnectionRefusedError(f"nothing listens at {place}: connection refused")
    except (TimeoutError, OSError):
        return None
    return None


def _is_tcp(words: Sequence[str]) -> bool:
    """Whether a split address is an IP address and a TCP port, and nothing more."""
    return len(words) == 5 and words[1] in ("ip4", "ip6") and words[3] == "tcp"
