"""A real swarm whose client and servers are hosts of a network with 32 ms between them: TCP, QUIC, and a server that is cut off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from swarmtune.discovery.identity_file import ensure_identity
from tests.harness import batch, local_peft, lora, same_bits, set_values, step, trainable
from tests.netlab import Link, NetLab, NetLabError, mechanism

pytestmark = pytest.mark.swarm

ROOT = Path(__file__).resolve().parents[2]
SERVERS = {"one": ("0:2", "tcp"), "two": ("2:4", "quic"), "spare": ("2:4", "tcp")}
CLIENT = """
import sys
import torch, swarmtune
from tests.harness import batch, lora, remote, set_values, step
path, *peers = sys.argv[1:]
with swarmtune.connect(peers) as swarm:
    model = remote(path, swarm, lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    (opened,) = swarm._models.values()

    async def route():
        return [hop.peer for hop in opened.directory.route(0, 4, 40)]

    print("ready", flush=True)
    for line in sys.stdin:
        hops = swarm.loop.run(route())
        torch.save(step(model, batch(padding="left")), line.strip())
        print(swarm.traffic().retries, *hops, flush=True)
"""


class Client:
    """A program that takes a training step when it is told to."""

    def __init__(self, process: subprocess.Popen[str], directory: Path, hosts: dict[str, str]) -> None:
        self.process, self._directory, self._hosts = process, directory, hosts

    def step(self) -> tuple[tuple, int, list[str]]:
        """Logits, loss and gradients; retries so far; the hosts of the route before the step."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        file = self._directory / "step.pt"
        self.process.stdin.write(f"{file}\n")
        self.process.stdin.flush()
        retries, *peers = self.process.stdout.readline().split()
        return torch.load(file), int(retries), [self._hosts[peer] for peer in peers]


@pytest.fixture(scope="module")
def lab() -> Iterator[NetLab]:
    try:
        mechanism()
    except NetLabError as error:
        pytest.skip(str(error))
    link = Link(delay_ms=8, rate_mbit=100)
    with NetLab(dict.fromkeys(("client", *SERVERS), link)) as lab:
        yield lab


@pytest.fixture(scope="module")
def client(lab: NetLab, bloom: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Three servers on three hosts, the last two replicas, and a client on a fourth."""
    directory = tmp_path_factory.mktemp("netlab")
    ids = {host: ensure_identity(directory / host).peer_id for host in SERVERS}
    protocols = {"tcp": "tcp/31337", "quic": "udp/31337/quic-v1"}
    peers = [f"/ip4/{lab.address(host)}/{protocols[transport]}/p2p/{ids[host]}" for host, (_, transport) in SERVERS.items()]
    with ExitStack() as stack:
        servers = []
        for host, (blocks, transport) in SERVERS.items():
            words = [f"model={bloom}", f"blocks={blocks}", "dtype=float32", f"listen={lab.address(host)}", "port=31337", f"transport={transport}"]
            words += [f"identity={directory / host}", f"initial_peers=[{','.join(peers)}]", "threads=1"]
            log = stack.enter_context((directory / f"{host}.log").open("wb"))
            servers.append(lab.popen(host, [sys.executable, "-P", "-m", "servers", *words], stdout=subprocess.PIPE, stderr=log, text=True))
            stack.callback(servers[-1].stdout.close)
            stack.callback(servers[-1].kill)
        for host, server in zip(SERVERS, servers, strict=True):
            assert "serving blocks" in server.stdout.readline(), (directory / f"{host}.log").read_text()
        log = stack.enter_context((directory / "client.log").open("wb"))
        command = [sys.executable, "-c", CLIENT, str(bloom), *peers]
        process = lab.popen("client", command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        stack.callback(process.wait, 20)
        stack.callback(process.stdout.close)
        stack.callback(process.stdin.close)
        assert process.stdout.readline() == "ready\n", (directory / "client.log").read_text()
        yield Client(process, directory, {peer: host for host, peer in ids.items()})


@pytest.fixture(scope="module")
def expected(bloom: Path) -> tuple:
    """The same step of the whole model here."""
    model = local_peft(bloom, lora("bloom"))
    set_values([trainable(model)])
    return step(model, batch(padding="left"))


def same(a: tuple, b: tuple) -> bool:
    """Logits and gradients, to the bit."""
    return torch.equal(a[0], b[0]) and same_bits(a[2], b[2])


def test_step_over_a_wide_area_network_equals_local_to_the_bit(lab: NetLab, client: Client, expected: tuple) -> None:
    before = lab.counters("client")
    found, retries, route = client.step()
    assert same(found, expected)
    assert retries == 0
    assert route[0] == "one"
    assert lab.counters("client").received_packets > before.received_packets


def test_step_is_bitwise_quiet_when_the_link_of_a_replica_is_cut(lab: NetLab, client: Client, expected: tuple) -> None:
    _, retries, route = client.step()
    for _ in range(4):  # calls may leave a replica for the other one at any time, for being faster
        lab.cut(route[1])
        try:
            found, retries_after, route = client.step()
        finally:
            lab.heal()
        assert same(found, expected)
        if retries_after > retries:
            return
    pytest.fail("no cut met a call")
