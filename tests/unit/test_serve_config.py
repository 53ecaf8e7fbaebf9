"""What a person types after ``swarmtune serve``: read as meant, or refused in one sentence."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import swarmtune
from servers import numeric
from servers.__main__ import _load
from servers.addresses import announced_addresses, check_port, listen_addresses
from servers.config import ServeConfig, Transport, read_words
from servers.progress import loading
from swarmtune.discovery.identity import Identity
from swarmtune.discovery.records import joinable
from swarmtune.errors import UsageError

ROOT = Path(__file__).parents[2]
PEER = Identity.generate().peer_id
ADDRESS = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"


def typed(*words: str) -> ServeConfig:
    return read_words(["model=x", "blocks=0:4", *words])


@pytest.mark.parametrize("word", ["blocks=4:8", "blocks='4:8'", 'blocks="4:8"', "blocks=04:08"])
def test_blocks_need_no_quotes_in_a_shell(word: str) -> None:
    assert typed(word).blocks.replace("0", "") == "4:8"


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("model=/models/a b (v1), it's {new}", "model", "/models/a b (v1), it's {new}"),
        ("model=/models/${HOME}", "model", "/models/${HOME}"),
        ("identity=/keys/my key", "identity", "/keys/my key"),
        ("identity=null", "identity", None),
        ("name=12", "name", "12"),
        ("name=", "name", ""),
        (r"name=back\slash", "name", r"back\slash"),
        ("name='quoted name'", "name", "quoted name"),
        ("family=lab, room 3", "family", "lab, room 3"),
        (f"initial_peers={ADDRESS}", "initial_peers", (ADDRESS,)),
        (f"initial_peers=[{ADDRESS},{ADDRESS}]", "initial_peers", (ADDRESS, ADDRESS)),
        ("announce=1.2.3.4", "announce", ("1.2.3.4",)),
        ("transport=both", "transport", Transport.BOTH),
        ("listen=::1", "listen", "::1"),
        ("log_every_s=5", "log_every_s", 5.0),
    ],
)
def test_values_are_read_as_typed(word: str, key: str, value: object) -> None:
    assert getattr(typed(word), key) == value


SENTENCES = {
    "blocks=248": 'blocks must look like "4:8"',
    "blocks=0-4": 'blocks must look like "4:8"',
    "blocks=4:4": "a block span must satisfy 0 <= start < stop, got 4:4",
    "transport=udp": "transport must be one of tcp, quic, both, got 'udp'",
    "port=70000": "port must be from 0 to 65535, got 70000",
    "listen=localhost": "listen must be an IP address, got 'localhost'",
    "listen=fe80::1%eth0": "listen must be an IP address without a zone",
    "listen=224.0.0.1": "not a multicast one",
    "log_every_s=0": "log_every_s must be above 0",
    "auto_relay=true": "auto_relay needs initial_peers",
    "relay=yes please": "relay must be true or false, got 'yes please'",
    "identity=' '": "identity must name a file",
    "name=" + "x" * 129: "name must be at most 128 printable characters",
    "family='a\tb'": "family must be at most 128 printable characters",
    "idnetity=x": "there is no key idnetity; did you mean identity?",
}


@pytest.mark.parametrize("word", SENTENCES)
def test_anything_else_is_one_sentence(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        typed(word)
    assert SENTENCES[word] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_port_serves_tcp_and_udp() -> None:
    assert listen_addresses("10.0.0.1", 7, Transport.BOTH) == ["/ip4/10.0.0.1/tcp/7", "/ip4/10.0.0.1/udp/7/quic-v1"]
    assert listen_addresses("::1", 7, Transport.QUIC) == ["/ip6/::1/udp/7/quic-v1"]
    port = check_port("127.0.0.1", 0, Transport.BOTH)
    assert port
    assert check_port("127.0.0.1", port, Transport.BOTH) == port


@pytest.fixture(params=["tcp", "udp"])
def taken(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    with socket.socket(type=socket.SOCK_STREAM if request.param == "tcp" else socket.SOCK_DGRAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        if request.param == "tcp":
            holder.listen()
        yield request.param, holder.getsockname()[1]


def test_a_port_in_use_is_refused_for_the_transports_that_need_it(taken: tuple[str, int]) -> None:
    kind, port = taken
    for transport in Transport:
        if transport.value in ("both", {"tcp": "tcp", "udp": "quic"}[kind]):
            with pytest.raises(UsageError, match=f"port {port} cannot be listened on"):
                check_port("127.0.0.1", port, transport)
        else:
            assert check_port("127.0.0.1", port, transport) == port


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(UsageError, match=r"198\.51\.100\.1 port 0 cannot be listened on"):
        check_port("198.51.100.1", 0, Transport.BOTH)


def test_announced_addresses_are_completed() -> None:
    found = announced_addresses(["1.2.3.4", "/dns/gpu.example.org/tcp/9", f"/ip6/2001:db8::1/tcp/9/p2p/{PEER}"], 7, Transport.BOTH, PEER)
    assert found == ("/ip4/1.2.3.4/tcp/7", "/ip4/1.2.3.4/udp/7/quic-v1", "/dns/gpu.example.org/tcp/9", "/ip6/2001:db8::1/tcp/9")


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ("gpu.example.org", "announce must hold IP addresses or multiaddresses"),
        ("/ip4/1.2.3.4", "announce must hold IP addresses or multiaddresses"),
        ("/ip4/999.1.1.1/tcp/1", "announce must hold IP addresses or multiaddresses"),
        ("/ip4/1.2.3.4/tcp/99999", "announce must hold IP addresses or multiaddresses"),
        ("/dns/a..b/tcp/7", "announce must hold IP addresses or multiaddresses"),
        ("/dns/a.b/tcp/0", "announce must hold IP addresses or multiaddresses"),
        ("0.0.0.0", "can be dialled by nobody"),
        ("/ip6/::/tcp/4", "can be dialled by nobody"),
        (f"/ip4/1.2.3.4/tcp/7/p2p/{Identity.generate().peer_id}", "announce names the peer"),
    ],
)
def test_announced_addresses_that_lead_nowhere_are_refused(item: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        announced_addresses([item], 7, Transport.TCP, PEER)


def test_a_node_tells_others_no_loopback_beside_real_addresses_and_no_more_than_a_record_holds() -> None:
    loopback, real, quic = (f"/ip4/{ip}/p2p/{PEER}" for ip in ("127.0.0.1/tcp/1", "10.0.0.1/tcp/1", "10.0.0.1/udp/1/quic-v1"))
    assert joinable([loopback, quic, real]) == (real, quic)
    assert joinable([loopback]) == (loopback,)
    assert joinable([f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{PEER}", real]) == (real,)
    assert len(joinable([f"/ip4/10.0.0.{number}/tcp/1/p2p/{PEER}" for number in range(99)])) == 16


def test_loading_says_how_fast_and_how_far(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), loading("blocks 0:3") as progress:
        for done in (1, 2, 3):
            progress(done, 3)
    (line, end) = [record.getMessage() for record in caplog.records]
    assert line.startswith("loaded block 3 of 3, ")
    assert line.endswith("blocks/s, 0 s left")
    assert end.startswith("blocks 0:3 loaded in ")


def test_closed_output_is_no_error_of_its_own() -> None:
    command = f"exec {sys.executable} -P -m servers model=/no/such blocks=0:4 >&-"
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("swarmtune serve: model: no such directory: /no/such")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("stored", "device", "native", "expected"),
    [
        ("float32", "cpu", True, "float32"),
        ("float32", "cuda", True, "float32"),
        ("bfloat16", "cpu", True, "bfloat16"),
        ("bfloat16", "cpu", False, "float32"),
        ("bfloat16", "cuda", False, "float32"),
        ("float16", "cpu", True, "bfloat16"),
        ("float16", "cpu", False, "float32"),
        ("float16", "cuda", False, "float16"),
    ],
)
def test_auto_is_the_stored_type_where_the_hardware_computes_in_it(
    stored: str, device: str, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numeric, "computes_bfloat16", lambda device: native)
    assert numeric.pick_dtype(getattr(torch, stored), torch.device(device)) is getattr(torch, expected)


def test_what_this_machine_computes_in_can_be_told() -> None:
    assert numeric.computes_bfloat16(torch.device("cpu")) in (True, False)


def test_servers_that_share_a_machine_share_what_is_free_for_activations(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.memory.activation_budget", lambda device: 1200)
    monkeypatch.setattr("servers.memory.keep_what_is_freed", lambda: None)  # it would be for all tests of this process
    for words, room in (((), 1200), (("sharing=3",), 400), (("sharing=3", "activation_gib=0"), 0)):
        span, _ = _load(read_words([f"model={bloom}", "blocks=0:1", "device=cpu", *words]))
        assert span.graphs.budget_bytes == room
    with pytest.raises(UsageError, match="sharing must be at least 1, got 0"):
        typed("sharing=0")
    assert "sharing=2" in swarmtune.LocalSwarm(bloom, ["0:2", "2:4"]).words
