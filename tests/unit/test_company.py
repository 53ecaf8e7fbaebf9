"""How a server keeps company: who gives way when two dial each other, and how far the others are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from servers import announce
from servers.announce import Company
from swarmtune.transport.base import TransportError


class Node:
    """Dials fail until somebody lets them succeed; a peer may come by itself."""

    peer_id = "m"

    def __init__(self) -> None:
        self.here: set[str] = set()
        self.dials: list[str] = []
        self.comes: str | None = None
        self.seconds = {"quick": 0.01, "slow": 0.1}

    async def connected(self) -> set[str]:
        return set(self.here)

    async def connect(self, address: str) -> None:
        self.dials.append(address)
        raise TransportError("nobody there")

    async def call(self, peer: str, request: Any, timeout_s: float) -> None:
        if peer not in self.seconds:
            await asyncio.sleep(timeout_s)
            raise TransportError("frozen")
        await asyncio.sleep(self.seconds[peer])


class Dht:
    async def greet(self, peer: str) -> None:
        pass

    def knows(self, peer: str) -> bool:
        return True


def company(node: Node, round_trips: dict[str, int] | None = None) -> Company:
    return Company(node, Dht(), [], {} if round_trips is None else round_trips)  # type: ignore[arg-type]


@pytest.mark.parametrize(("peer", "waits"), [("a", True), ("z", False)], ids=["theirs is less", "theirs is greater"])
def test_after_a_dial_that_failed_the_one_with_the_greater_id_waits_and_the_other_comes(
    peer: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announce, "GIVE_WAY_S", 0.2)

    async def main() -> list[str]:
        node = Node()
        own = company(node)
        await own._meet({"/address": peer}, set())
        assert node.dials == ["/address"]
        second = asyncio.create_task(own._meet({"/address": peer}, set()))
        await asyncio.sleep(0.05)
        node.here.add(peer)  # it has dialled us meanwhile
        await second
        return node.dials

    assert len(asyncio.run(main())) == (1 if waits else 2)


def test_round_trips_are_measured_at_once_and_those_of_the_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "MEASURE_S", 0.3)

    async def main() -> tuple[dict[str, int], float]:
        found: dict[str, int] = {"gone": 5}
        own = company(Node(), found)
        began = asyncio.get_running_loop().time()
        await own._measure({"quick", "slow", "frozen", "dead"})
        return found, asyncio.get_running_loop().time() - began

    found, seconds = asyncio.run(main())
    assert set(found) == {"quick", "slow"}
    assert 10_000 <= found["quick"] < found["slow"]
    assert found["slow"] >= 100_000
    assert seconds < 0.55, "two that are frozen cost the time of one"


def test_a_round_trip_that_has_become_longer_is_believed_little_by_little() -> None:
    async def main() -> list[int]:
        node, found = Node(), {"quick": 100}
        own, seen = company(node, found), []
        for _ in range(3):
            await own._measure({"quick"})
            seen.append(found["quick"])
        return seen

    assert asyncio.run(main()) == [105, 110, 116]
