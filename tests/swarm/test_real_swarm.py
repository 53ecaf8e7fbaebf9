"""Real servers as processes, real hivemind daemons and DHT on loopback."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import swarmtune
from servers.__main__ import pick_device
from swarmtune.errors import BlocksUnserved, PeersUnreachable, UsageError
from tests.harness import batch, local_peft, lora, on_device, remote, same_bits, set_values, step, trainable

pytestmark = pytest.mark.swarm
DEVICE = pick_device("auto")
"""Where the servers compute that are not told."""


@pytest.fixture(scope="module")
def swarm_of_four(bloom: Path) -> Iterator[swarmtune.LocalSwarm]:
    """Two replicas of each half."""
    with swarmtune.LocalSwarm(bloom, ["0:2", "2:4", "0:2", "2:4"], dtype="float32") as local:
        yield local


@pytest.fixture
def alive(swarm_of_four: swarmtune.LocalSwarm) -> Iterator[swarmtune.LocalSwarm]:
    """All four servers up, whatever the last test did to them."""
    yield swarm_of_four
    dead = [server for server in swarm_of_four.servers if not server.alive]
    for server in dead:
        server.start(swarm_of_four.initial_peers)
    for server in dead:
        server.wait_ready()


def test_training_step_equals_local_to_the_bit(bloom: Path, alive: swarmtune.LocalSwarm) -> None:
    local, padded = local_peft(bloom, lora("bloom")).to(DEVICE), on_device(DEVICE, batch(padding="left"))
    with swarmtune.connect(alive.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"), device=DEVICE)
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        expected, found = step(local, padded), step(model, padded)
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])


@pytest.mark.parametrize("phase", ["before", "between"])
def test_step_is_bitwise_quiet_after_sigkill(bloom: Path, alive: swarmtune.LocalSwarm, phase: str) -> None:
    """Whichever replicas the route uses, one of each half is killed: first one pair, then the step is compared."""
    with swarmtune.connect(alive.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        quiet = step(model, batch())[2]
        model.zero_grad()
        loss = model(**batch()).loss if phase == "between" else None
        hops = swarm.loop.run(_route(swarm) if phase == "before" else _used(swarm))
        for server in alive.servers:
            if server.peer_id in hops:
                server.kill()
        loss = model(**batch()).loss if loss is None else loss
        loss.backward()
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})
        # A death that is noticed before anything is asked of the dead costs a forward again, and no failed call.
        assert swarm.traffic().retries >= 1 or (phase == "between" and swarm.traffic().calls > 8)


def test_servers_say_how_far_they_are_from_each_other(bloom: Path, alive: swarmtune.LocalSwarm) -> None:
    peers = {server.peer_id for server in alive.servers}
    with swarmtune.connect(alive.initial_peers) as swarm:
        remote(bloom, swarm)
        (opened,) = swarm._models.values()
        ends_at = time.monotonic() + 60
        while any(set(info.round_trips) != peers - {peer} for peer, info in opened.directory.holders().items()):
            assert time.monotonic() < ends_at, opened.directory.holders()
            swarm.loop.run(opened.directory.refresh())
            time.sleep(0.5)
        assert all(0 < said < 1_000_000 for info in opened.directory.holders().values() for said in info.round_trips.values())


async def _used(swarm: swarmtune.Swarm) -> set[str]:
    """Where the graphs of the last forward are."""
    (opened,) = swarm._models.values()
    return {hop.peer for hop in opened.chain.caller.running.values()}


async def _route(swarm: swarmtune.Swarm) -> set[str]:
    (opened,) = swarm._models.values()
    return {hop.peer for hop in opened.directory.route(0, 4, 40)}


def test_frozen_server_is_left_within_its_silence(bloom: Path, alive: swarmtune.LocalSwarm) -> None:
    with swarmtune.connect(alive.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        quiet = step(model, batch())[2]
        frozen = [server for server in alive.servers if server.peer_id in swarm.loop.run(_route(swarm))][:1]
        try:
            for server in frozen:
                os.kill(server.pid, signal.SIGSTOP)
            began = time.monotonic()
            assert same_bits(quiet, step(model, batch())[2])
            assert time.monotonic() - began < 40
        finally:
            for server in frozen:
                os.kill(server.pid, signal.SIGCONT)


def test_client_of_one_server_finds_the_others_in_the_dht(bloom: Path, alive: swarmtune.LocalSwarm) -> None:
    with swarmtune.connect(alive.initial_peers[:1]) as swarm:
        assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)
        (opened,) = swarm._models.values()
        deadline = time.monotonic() + 20
        while len(opened.directory.known) < 4 and time.monotonic() < deadline:
            swarm.loop.run(opened.directory.refresh())
        assert len(opened.directory.known) == 4


def test_one_unreachable_initial_peer_among_reachable_ones_is_no_obstacle(bloom: Path, alive: swarmtune.LocalSwarm) -> None:
    gone = alive.initial_peers[0].replace(alive.servers[0].address.split("/")[4], "1").rpartition("/")[0]
    absent = f"{gone}/12D3KooWMEUhm3PfKTu7SMn27jjfqRMZDvWXWLvtJoGAokbb25mF"
    with swarmtune.connect([absent, *alive.initial_peers]) as swarm:
        assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)


def test_an_initial_peer_that_never_speaks_holds_nobody_up(bloom: Path, alive: swarmtune.LocalSwarm, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING, "swarmtune"):
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/12D3KooWMEUhm3PfKTu7SMn27jjfqRMZDvWXWLvtJoGAokbb25mF"
        with swarmtune.connect([address, *alive.initial_peers], patience_s=5.0) as swarm:
            assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)
            (opened,) = swarm._models.values()
            began = time.monotonic()
            swarm.loop.run(opened.directory.refresh())
            assert time.monotonic() - began < 3
            deadline = time.monotonic() + 20
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.1)
    assert [record.getMessage() for record in caplog.records if "an initial peer is left out" in record.getMessage()]


def test_unreachable_peers_are_named_within_the_patience() -> None:
    address = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWMEUhm3PfKTu7SMn27jjfqRMZDvWXWLvtJoGAokbb25mF"
    began = time.monotonic()
    with pytest.raises(PeersUnreachable, match="none of the initial peers answered"):
        swarmtune.connect([address], patience_s=1.0)
    assert time.monotonic() - began < 10


def test_drained_server_ends_with_exit_code_0_and_the_step_goes_on(bloom: Path, alive: swarmtune.LocalSwarm) -> None:
    with swarmtune.connect(alive.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        quiet = step(model, batch())[2]
        for server in alive.servers[:2]:
            process = server._process
            server.stop()
            assert process is not None
            assert process.returncode == 0
        assert same_bits(quiet, step(model, batch())[2])


def test_all_servers_gone_is_an_error_within_the_patience(bloom: Path, alive: swarmtune.LocalSwarm) -> None:
    with swarmtune.connect(alive.initial_peers, patience_s=2.0) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        for server in alive.servers:
            server.kill()
        began = time.monotonic()
        with pytest.raises(BlocksUnserved, match=r"nobody serves blocks 0:\d of 0:4.*last failure: peer 12D3"):
            model(**batch())
        assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("model", "spans", "sentence"),
    [
        ("bloom", ["0:9"], "blocks 0:9 reach outside the model, which has blocks 0:4"),
        ("/no/such/model", ["0:2"], "/no/such/model"),
    ],
)
def test_bundled_servers_refuse_what_cannot_be_served_in_one_sentence(bloom: Path, model: str, spans: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        with swarmtune.LocalSwarm(bloom if model == "bloom" else model, spans):
            pass


@pytest.mark.parametrize("spans", [[], "0:4", ["4:2"], ["0-4"], [248]])
def test_malformed_spans_are_refused_before_anything_starts(bloom: Path, spans: list[str]) -> None:
    with pytest.raises(UsageError):
        swarmtune.LocalSwarm(bloom, spans)
