"""A server that is told to stop: it says so, refuses new work, finishes what is in flight. Real processes, real hivemind."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import swarmtune
from swarmtune.discovery.dht import DirectoryNode
from swarmtune.discovery.records import Announcement, peer_of
from swarmtune.skeleton import config_digest, load_config
from swarmtune.swarm import Swarm
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.messages import Fault, FaultCode, ServerInfo, SpanCall, SpanResult
from tests.swarm.test_serving import Leftovers, Served, serve

pytestmark = pytest.mark.swarm

IN_FLIGHT = 6
TOKENS = 2048
"""One call takes a good part of a second: attention grows with its square."""


class Caller:
    """Sends calls to the one server, beneath everything that would try again."""

    def __init__(self, swarm: Swarm, peer: str, model: str) -> None:
        self._swarm, self._peer, self._model = swarm, peer, model

    def info(self) -> ServerInfo:
        return ServerInfo.from_json(self._swarm.loop.run(self._ask(Message("info"))).fields)

    def forward(self) -> Message:
        return self._swarm.loop.run(self._ask(self._call(1).to_message()))

    def announced(self) -> list[Announcement]:
        directory: DirectoryNode = self._swarm._discovery._directory  # type: ignore[attr-defined]
        return self._swarm.loop.run(directory.find(self._model))

    @contextmanager
    def busy(self) -> Iterator[list[asyncio.Task[Message]]]:
        """Calls that the server has, of which the first has just been answered."""
        tasks = self._swarm.loop.run(self._begin())
        yield tasks
        self._swarm.loop.run(_settle(tasks))

    async def _begin(self) -> list[asyncio.Task[Message]]:
        call = self._call(TOKENS).to_message()
        tasks = [asyncio.create_task(self._ask(call)) for _ in range(IN_FLIGHT)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks

    async def _ask(self, message: Message) -> Message:
        return decode(await self._swarm._transport.call(self._peer, encode(message), 60.0))

    def _call(self, tokens: int) -> SpanCall:
        return SpanCall(BlockSpan(0, 4), self._model, torch.zeros(2, tokens, 48))


async def _settle(tasks: list[asyncio.Task[Message]]) -> None:
    await asyncio.wait(tasks, timeout=60)


@contextmanager
def called(bloom: Path, log: Path) -> Iterator[tuple[Served, Caller]]:
    with serve(log, f"model={bloom}", "blocks=0:4", "dtype=float32", "threads=1") as server:
        address = server.ready()[5].split()[0]
        with swarmtune.connect([address]) as swarm:
            caller = Caller(swarm, peer_of(address), config_digest(load_config(str(bloom))))
            assert not caller.info().draining
            yield server, caller


def test_a_draining_server_says_so_refuses_new_work_and_finishes_what_is_in_flight(bloom: Path, tmp_path: Path) -> None:
    with called(bloom, tmp_path / "log") as (server, caller):
        left = Leftovers(server.process.pid)
        with caller.busy() as tasks:
            server.process.send_signal(signal.SIGTERM)
            found = server.wait_for(r"stopping: finishing (\d+) calls in flight")
            assert caller.info().draining
            assert Fault.from_message(caller.forward()).code is FaultCode.DRAINING
            assert [each.info.draining for each in caller.announced()] == [True]
            assert not all(task.done() for task in tasks), "nothing was in flight any more: make the calls longer"
        assert int(found[1]) >= 1
        call = caller._call(TOKENS)
        assert all(torch.isfinite(SpanResult.from_message(task.result(), call).hidden_BTH).all() for task in tasks)  # type: ignore[arg-type]
        assert server.process.wait(10) == 0
        left.wait()
    assert f"stopped after {IN_FLIGHT} requests (1 refused)" in server.said()


def test_a_second_sigterm_ends_a_server_with_work_in_flight_within_a_second(bloom: Path, tmp_path: Path) -> None:
    with called(bloom, tmp_path / "log") as (server, caller):
        left = Leftovers(server.process.pid)
        with caller.busy() as tasks:
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("stopping: finishing")
            began = time.monotonic()
            assert server.end(signal.SIGTERM) == 0
            left.wait()
            assert time.monotonic() - began < 1.5
        assert any(task.exception() for task in tasks), "the calls in flight were finished"
    assert "stopped at once" in server.said()
