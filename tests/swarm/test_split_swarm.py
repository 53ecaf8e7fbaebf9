"""What holds a swarm together when the server through which the others joined is gone, or comes back: real daemons, real DHT."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import swarmtune
from servers.announce import announce_forever
from servers.handler import CallHandler
from swarmtune.discovery.dht import DirectoryNode
from swarmtune.discovery.identity import Identity
from swarmtune.transport.hivemind import HivemindNode
from swarmtune.transport.loop import LoopThread
from tests.harness import batch, make_handler, remote

pytestmark = pytest.mark.swarm
WAIT_S = 60.0


@dataclass
class Member:
    """A server of this process."""

    node: HivemindNode
    directory: DirectoryNode
    announcing: asyncio.Task[None]

    @property
    def address(self) -> str:
        return self.node.addresses[0]

    @classmethod
    async def start(cls, handler: CallHandler, *initial: str, identity: Identity | None = None, port: str = "0") -> Member:
        node, directory = HivemindNode(identity), DirectoryNode()
        await node.start([f"/ip4/127.0.0.1/tcp/{port}"])
        for address in initial:
            await node.connect(address)
        await directory.start(node.p2p, list(initial), client=False)
        await node.serve(handler)
        return cls(node, directory, asyncio.create_task(announce_forever(node, directory, initial, lambda: handler.info)))

    async def stop(self) -> None:
        self.announcing.cancel()
        await asyncio.gather(self.announcing, return_exceptions=True)
        await self.directory.close()
        await self.node.close()


class Members:
    """Starts servers on a loop of their own, and ends them."""

    def __init__(self) -> None:
        self.loop, self.running = LoopThread().start(), list[Member]()

    def start(self, *args: object, **kwargs: object) -> Member:
        self.running.append(self.loop.run(Member.start(*args, **kwargs)))  # type: ignore[arg-type]
        return self.running[-1]

    def stop(self, member: Member) -> None:
        self.running.remove(member)
        self.loop.run(member.stop())

    def connected(self, one: Member, other: Member) -> bool:
        return other.node.peer_id in (self.loop.run(one.node.connected()) or ())


@pytest.fixture
def members() -> Iterator[Members]:
    members = Members()
    yield members
    for member in list(members.running):
        members.stop(member)
    members.loop.close()


def wait_until(condition: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.2)


def test_servers_that_joined_through_the_first_one_stay_together_without_it(bloom: Path, members: Members) -> None:
    first = members.start(make_handler(bloom, "0:2"))
    upper = members.start(make_handler(bloom, "2:4"), first.address)
    lower = members.start(make_handler(bloom, "0:2"), first.address)
    wait_until(lambda: members.connected(upper, lower))
    members.stop(first)
    with swarmtune.connect([upper.address]) as swarm:
        assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)


def test_a_first_server_that_comes_back_is_found_again(bloom: Path, members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.announce.EAGER_S", 0.0)
    monkeypatch.setattr("servers.announce.RENEW_EVERY_S", 1.0)
    handler, identity = make_handler(bloom, "0:2"), Identity.generate()
    first = members.start(handler, identity=identity)
    port = first.address.split("/")[4]
    upper = members.start(make_handler(bloom, "2:4"), first.address)
    wait_until(lambda: members.connected(upper, first))
    members.stop(first)
    wait_until(lambda: not members.connected(upper, first))
    time.sleep(2)  # a round without it
    again = members.start(handler, identity=identity, port=port)
    wait_until(lambda: members.connected(upper, again))
    with swarmtune.connect([again.address]) as swarm:
        assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)


def test_a_server_that_lost_all_others_says_so_once(
    bloom: Path, members: Members, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("servers.announce.ALONE_S", 0.5)
    monkeypatch.setattr("servers.announce.RENEW_EVERY_S", 0.5)
    first = members.start(make_handler(bloom, "0:2"))
    upper = members.start(make_handler(bloom, "2:4"), first.address)
    wait_until(lambda: members.connected(upper, first))
    time.sleep(2)
    with caplog.at_level(logging.WARNING, "servers.announce"):
        members.stop(first)
        wait_until(lambda: any("lost all other servers" in record.getMessage() for record in caplog.records))
        time.sleep(3)
    assert len([record for record in caplog.records if "lost all other servers" in record.getMessage()]) == 1


def test_a_client_joins_through_any_server(bloom: Path, members: Members) -> None:
    """The look-up leads to the first server, which the client's daemon has never heard of."""
    first = members.start(make_handler(bloom, "0:2"))
    upper = members.start(make_handler(bloom, "2:4"), first.address)
    extra = members.start(make_handler(bloom, "0:2", torch.bfloat16), upper.address)
    for member in (upper, extra):
        with swarmtune.connect([member.address]) as swarm:
            assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)
            assert swarm.fingerprint()["mode"] == ["float32"]
