"""Which way through a swarm is the cheapest: what the servers take, what the network takes, and who is near whom."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from swarmtune.errors import WireError
from swarmtune.remote.route import Directory, Hop, Peer, _cheapest
from swarmtune.transport.clock import now
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import MAX_ROUND_TRIPS, ServerInfo
from swarmtune.wire.relay import PASSES_ON


def peer(
    name: str, blocks: str, rtt_s: float = 0.05, family: str = "", round_trips: Mapping[str, int] | None = None, token_block_s: float = 0.0
) -> Peer:
    span = BlockSpan.parse(blocks)
    digests = tuple(str(block) for block in range(span.start, span.stop))
    info = ServerInfo("m", 8, span, digests, "float32", "class", {}, "1", family=family, round_trips=round_trips or {})
    return Peer(name, info, rtt_s, token_block_s)


def route(peers: list[Peer], chained: bool, tokens: int = 0) -> str:
    async def search() -> list[Hop] | None:
        for each in peers:
            each.measured_at = now()
        return _cheapest(peers, 0, 8, tokens, chained)

    hops = asyncio.run(search())
    return "nobody" if hops is None else " ".join(f"{hop.peer}={hop.span}" for hop in hops)


FIRST = peer("a", "0:4")


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (peer("y", "4:8", round_trips={"a": 2_000}), peer("x", "4:8", round_trips={"a": 90_000})),
        (peer("y", "4:8", round_trips={"a": 2_000}), peer("x", "4:8")),
    ],
)
def test_a_chain_goes_to_the_server_that_is_near_the_one_before(near: Peer, far: Peer) -> None:
    assert route([FIRST, near, far], chained=True) == "a=0:4 y=4:8"
    assert route([FIRST, near, far], chained=False) == "a=0:4 x=4:8"  # both are as far from us, so the name decides


def test_what_either_of_two_servers_has_measured_counts() -> None:
    first = peer("a", "0:4", round_trips={"y": 2_000, "x": 90_000})
    assert route([first, peer("x", "4:8"), peer("y", "4:8")], chained=True) == "a=0:4 y=4:8"


def test_servers_of_one_family_are_near_each_other_unless_they_have_measured_otherwise() -> None:
    first, other = peer("a", "0:4", family="lab"), peer("x", "4:8")
    assert route([first, other, peer("y", "4:8", family="lab")], chained=True) == "a=0:4 y=4:8"
    assert route([first, other, peer("y", "4:8", family="lab", round_trips={"a": 200_000})], chained=True) == "a=0:4 x=4:8"


def test_the_way_back_from_the_last_server_counts() -> None:
    last_far, last_near = peer("x", "4:8", rtt_s=0.4, round_trips={"a": 50_000}), peer("y", "4:8", rtt_s=0.05, round_trips={"a": 60_000})
    assert route([FIRST, last_far, last_near], chained=True) == "a=0:4 y=4:8"


def test_a_worse_beginning_may_have_the_better_end() -> None:
    """The best way to a boundary is not always part of the best way, because it matters who stands there."""
    quick, neighbour = peer("a", "0:4", rtt_s=0.05), peer("b", "0:4", rtt_s=0.06)
    last = peer("z", "4:8", round_trips={"a": 300_000, "b": 1_000})
    assert route([quick, neighbour, last], chained=True) == "b=0:4 z=4:8"


def test_what_servers_take_outweighs_the_way_where_there_is_much_to_do() -> None:
    near, quick = peer("x", "4:8", round_trips={"a": 1_000}, token_block_s=1e-3), peer("y", "4:8", token_block_s=1e-4)
    assert route([FIRST, near, quick], chained=True, tokens=1) == "a=0:4 x=4:8"
    assert route([FIRST, near, quick], chained=True, tokens=1000) == "a=0:4 y=4:8"


def test_a_little_faster_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtune.remote.route.now", lambda: 1.0)
    for times, expected in ((1.2, None), (1.3, pytest.approx(1.3, rel=0.01))):
        directory = Directory(None, None, "model", 8)  # type: ignore[arg-type]
        directory.known = {"slow": peer("slow", "0:8", token_block_s=times), "fast": peer("fast", "0:8", token_block_s=1.0)}
        for each in directory.known.values():
            each.measured_at = 1.0
        assert directory.times_slower("slow", "fast") == expected


def test_a_block_that_nobody_holds_ends_the_search() -> None:
    assert route([FIRST], chained=True) == route([], chained=False) == "nobody"


def test_round_trips_of_a_peer_are_bounded_and_travel() -> None:
    own = peer("a", "0:4", round_trips={"b": 1_500}).info
    assert ServerInfo.from_json(own.to_json()) == own
    assert "round_trips" not in peer("a", "0:4").info.to_json()
    for bad in ([], {"b": 0}, {"b": 1 << 40}, {"b": 1.5}, {str(number): 1 for number in range(MAX_ROUND_TRIPS + 1)}):
        with pytest.raises(WireError):
            ServerInfo.from_json({**own.to_json(), "round_trips": bad})


def test_servers_that_are_apart_are_tried_again_after_twice_as_long_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0.0
    monkeypatch.setattr("swarmtune.remote.route.now", lambda: at)
    directory = Directory(None, None, "m", 8)  # type: ignore[arg-type]
    directory.known = {name: peer(name, blocks) for name, blocks in (("a", "0:4"), ("b", "4:8"))}
    for each in directory.known.values():
        each.info = replace(each.info, features=(PASSES_ON,))
    hops = [Hop("a", BlockSpan(0, 4), "class"), Hop("b", BlockSpan(4, 8), "class")]
    waits = []
    for _ in range(7):
        assert directory.in_touch(hops)
        directory.apart("a", "b")
        directory.apart("a", "b")  # another call that finds it out at the same time
        began = at
        while not directory.in_touch(hops):
            at += 0.5
        waits.append(at - began)
    assert waits == [2, 4, 8, 16, 32, 60, 60]
    directory.together("a", "b")
    directory.apart("a", "b")
    at += 2
    assert directory.in_touch(hops)
