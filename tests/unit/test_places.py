"""Where peers were reached, and who is certainly away."""

from __future__ import annotations

import asyncio
import socket

import pytest

from swarmtune.transport.places import MAX_PEERS, MAX_PLACES_OF_PEER, Places, knock


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_peer_of_which_every_address_refuses_is_away() -> None:
    place = f"/ip4/127.0.0.1/tcp/{free_port()}"
    with pytest.raises(ConnectionRefusedError, match=f"nothing listens at {place}: connection refused"):
        asyncio.run(knock([place, place]))


@pytest.mark.parametrize("other", ["/ip4/127.0.0.1/udp/1/quic-v1", "/dns4/localhost/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/Qm/p2p-circuit"])
def test_where_it_cannot_be_told_nobody_is_away(other: str) -> None:
    asyncio.run(knock([f"/ip4/127.0.0.1/tcp/{free_port()}", other]))
    asyncio.run(knock([]))


def test_one_address_that_answers_is_enough() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(knock([f"/ip4/127.0.0.1/tcp/{free_port()}", f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"]))


def test_the_latest_places_and_peers_are_kept() -> None:
    places = Places()
    for number in range(MAX_PLACES_OF_PEER + 1):
        places.add("busy", f"/ip4/10.0.0.1/tcp/{number}")
    assert places.of("busy") == [f"/ip4/10.0.0.1/tcp/{number}" for number in range(1, MAX_PLACES_OF_PEER + 1)]
    for number in range(MAX_PEERS):
        places.add(str(number), "/ip4/10.0.0.2/tcp/1")
        places.add("busy", "/ip4/10.0.0.1/tcp/5")
    assert len([*places]) == MAX_PEERS
    assert "0" not in [*places]
    assert places.of("busy")[-1] == "/ip4/10.0.0.1/tcp/5"
    assert places.of("0") == []
