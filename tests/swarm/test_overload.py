"""More calls at once than a real server queues: it says busy, the clients ask again when it said, and no bit changes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import swarmtune
from servers.executor import MAX_QUEUED
from swarmtune.remote.events import EventKind
from tests.harness import batch, lora, remote, same_bits, set_values, step

pytestmark = pytest.mark.swarm

ROWS = 40
CLIENTS = 4
"""Each has 32 calls open at most, which is half of what one server queues."""


@pytest.fixture(scope="module")
def local(bloom: Path) -> Iterator[swarmtune.LocalSwarm]:
    with swarmtune.LocalSwarm(bloom, ["0:4"], threads=1) as found:
        yield found


def test_a_server_with_a_full_queue_says_busy_and_every_step_is_bitwise_quiet(bloom: Path, local: swarmtune.LocalSwarm) -> None:
    assert CLIENTS * 32 > MAX_QUEUED
    swarms = [swarmtune.connect(local.initial_peers, micro_batch_tokens=10, max_in_flight=ROWS) for _ in range(CLIENTS)]
    try:
        models = [remote(bloom, swarm, lora("bloom")) for swarm in swarms]
        for model in models:
            set_values([dict(model.adapter.named_parameters())])
        inputs = batch(rows=ROWS)
        quiet = step(models[0], inputs)[2]
        found: list[Any] = [None] * CLIENTS

        def work(index: int) -> None:
            for _ in range(3):
                found[index] = step(models[index], inputs)[2]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert all(grads is not None and same_bits(quiet, grads) for grads in found)
        events = [swarm.traffic().events for swarm in swarms]
        assert sum(each[EventKind.BUSY].count for each in events) > 0
        assert sum(each[EventKind.FAILED].count for each in events) == 0, "a busy server is not blamed"
        assert all(torch.isfinite(grad).all() for grad in quiet.values())
    finally:
        for swarm in swarms:
            swarm.close()


def test_a_server_ten_times_slower_than_its_replica_is_left(bloom: Path) -> None:
    """It is stopped for nine tenths of the time."""
    with swarmtune.LocalSwarm(bloom, ["0:4", "0:4"], threads=1) as local, swarmtune.connect(local.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        quiet = step(model, batch(rows=16))[2]
        (opened,) = swarm._models.values()
        (used,) = {hop.peer for hop in opened.chain.caller.running.values()}
        (slow,) = [server for server in local.servers if server.peer_id == used]
        stopping, over = threading.Event(), threading.Event()

        def slow_down() -> None:
            while not over.is_set():
                os.kill(slow.pid, signal.SIGSTOP)
                time.sleep(0.09)
                os.kill(slow.pid, signal.SIGCONT)
                stopping.set()
                time.sleep(0.01)

        thread = threading.Thread(target=slow_down)
        thread.start()
        try:
            assert stopping.wait(10)
            assert all(same_bits(quiet, step(model, batch(rows=16))[2]) for _ in range(6))
            before = opened.chain.counters.servers[used].calls
            assert all(same_bits(quiet, step(model, batch(rows=16))[2]) for _ in range(6))
            # It may be tried again, because it may have become faster, once or on a busy machine twice: of twelve calls.
            assert opened.chain.counters.servers[used].calls <= before + 4
        finally:
            over.set()
            thread.join(10)
