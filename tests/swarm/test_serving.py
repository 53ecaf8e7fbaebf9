"""``swarmtune serve`` as an operator meets it: the ready line, addresses, identity, the minute's line, signals. Real processes, real hivemind."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

import swarmtune
from servers.compiled import cannot_compile
from swarmtune.errors import SwarmError
from swarmtune.remote.events import EventKind
from tests.harness import batch, lora, remote, same_bits, set_values

pytestmark = pytest.mark.swarm

READY_S = 120.0
READY = re.compile(r"serving blocks (\d+:\d+) of 0:4 of (\S+) in (\w+)(.*) at ((?:/\S+ ?)+)\n")


class Served:
    """One ``python -m servers`` in the foreground of a session of its own."""

    def __init__(self, log: Path, *words: str) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "servers", *words], stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, text=True
            )

    def ready(self) -> re.Match[str]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(READY_S), self.said()
        line = self.process.stdout.readline()
        found = READY.fullmatch(line)
        assert found is not None, f"{line!r}; {self.said()}"
        return found

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str, limit_s: float = 60.0) -> re.Match[str]:
        ends_at = time.monotonic() + limit_s
        while (found := re.search(pattern, self.said())) is None:
            assert time.monotonic() < ends_at, f"no {pattern!r} in: {self.said()}"
            assert self.process.poll() is None, self.said()
            time.sleep(0.1)
        return found

    def end(self, *numbers: signal.Signals) -> int:
        """Signal, then the exit code; no process and no directory may be left."""
        left = Leftovers(self.process.pid)
        for number in numbers or (signal.SIGTERM,):
            self.process.send_signal(number)
        code = self.process.wait(60)
        left.wait()
        return code


class Leftovers:
    """The daemons and directories of running servers, which must go when these go."""

    def __init__(self, *pids: int) -> None:
        self.processes = [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        self.directories = {word for child in self.processes for word in child.cmdline() if re.fullmatch(r"/tmp/swarmtune-\w+", word)}

    def wait(self) -> None:
        ends_at = time.monotonic() + 10
        while (found := self._found()) and time.monotonic() < ends_at:
            time.sleep(0.1)
        assert found == []

    def _found(self) -> list[object]:
        running = [child for child in self.processes if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        return [*running, *(path for path in self.directories if Path(path).exists())]


@contextmanager
def serve(log: Path, *words: str) -> Iterator[Served]:
    server = Served(log, *words)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(10)
        assert server.process.stdout is not None
        server.process.stdout.close()


def refused(*words: str) -> str:
    """What a server says that does not start."""
    done = subprocess.run([sys.executable, "-P", "-m", "servers", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if not re.match(r"[\d:]+ INFO", line)] == done.stderr.splitlines()[-1:]
    return done.stderr.splitlines()[-1]


def forward(model: Path, address: str) -> None:
    with swarmtune.connect([address]) as swarm:
        assert torch.isfinite(remote(model, swarm)(**batch()).loss)


def test_the_printed_addresses_join_and_stay_the_same_with_an_identity(bloom: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    words = [f"model={bloom}", "blocks=0:4", "dtype=float32", f"identity={key}", "transport=both", "log_every_s=1", "name=first server", "family=lab"]
    with serve(tmp_path / "log", *words) as server:
        ready = server.ready()
        assert ready.groups()[:4] == ("0:4", str(bloom), "float32", ", name first server, family lab")
        tcp, quic = ready[5].split()
        port = tcp.split("/")[4]
        assert quic.split("/")[3:6] == ["udp", port, "quic-v1"]
        forward(bloom, tcp)
        forward(bloom, quic)
        server.wait_for(
            r"last \d s: [1-9]\d* requests \([1-9]\d* in all, 0 refused\), [1-9][\d,]* tokens/s, memory \d+\.\d\d GB, \d+ peers, 0 in the queue"
        )
        assert f"is in use by process {server.process.pid}: stop that server" in refused(*words)
        assert "cannot be listened on" in refused(f"model={bloom}", "blocks=0:4", "transport=quic", f"port={port}")
        assert server.end(signal.SIGINT) == 0
        assert re.search(r"stopped after 2 requests \(0 refused\) and \d+ tokens in ", server.said())
    with serve(tmp_path / "log", *words, f"port={port}") as server:
        assert server.ready()[5].split() == [tcp, quic]
        forward(bloom, tcp)
        assert server.end() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "log"]


@pytest.mark.parametrize(
    ("words", "again"),
    [(["activation_gib=0"], {EventKind.BUSY: 0}), (["activation_ttl_s=1"], {EventKind.RECOMPUTED: 1})],
    ids=["no room", "a short time"],
)
def test_graphs_are_kept_as_the_keys_say(bloom: Path, tmp_path: Path, words: list[str], again: dict[EventKind, int]) -> None:
    found = []
    for own, expected in (([], {EventKind.RECOMPUTED: 0}), (words, again)):
        with serve(tmp_path / "log", f"model={bloom}", "blocks=0:4", "dtype=float32", "listen=127.0.0.1", *own) as server:
            with swarmtune.connect([server.ready()[5].split()[0]]) as swarm:
                model = remote(bloom, swarm, lora("bloom"))
                set_values([dict(model.adapter.named_parameters())])
                loss = model(**batch()).loss
                time.sleep(2.5)
                loss.backward()
                found.append({name: parameter.grad.clone() for name, parameter in model.adapter.named_parameters()})
                traffic = swarm.traffic()
                assert {kind: traffic.events[kind].count for kind in expected} == expected
                assert sum(each.block_forwards for each in traffic.servers) == (8 if own else 4)
            assert server.end(signal.SIGINT) == 0
    assert same_bits(*found)


def test_a_server_of_float32_does_not_multiply_in_a_shorter_type(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    words = [sys.executable, "-P", "-m", "servers", f"model={bloom}", "blocks=0:4", "dtype=float32", "listen=127.0.0.1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert "ONEDNN_DEFAULT_FPMATH_MODE=BF16 has float32 multiplied in a shorter type, of which clients would not know: unset it" in said


@pytest.mark.timeout(400)
@pytest.mark.skipif(bool(cannot_compile(torch.device("cpu"), torch.float32, "none")), reason="no C++ compiler")
def test_what_a_server_compiles_lies_in_its_directory_and_goes_away_with_it(bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "gcc")  # as PEFT leaves it behind BOFT; torch would link without the library of C++
    with serve(tmp_path / "log", f"model={bloom}", "blocks=0:4", "dtype=float32", "threads=1", "listen=127.0.0.1") as server:
        with swarmtune.connect([server.ready()[5].split()[0]], compile="auto") as swarm:
            model = remote(bloom, swarm, lora("bloom"))
            for _ in range(2):
                model(**batch()).loss.backward()
            server.wait_for("compiled blocks 0:4", 240)  # at a low priority, beside other tests
        assert "bitsandbytes" not in Path(f"/proc/{server.process.pid}/maps").read_text(), "nothing is quantised"
        (directory,) = Leftovers(server.process.pid).directories
        made = {path.suffix for path in (Path(directory) / "compiled").rglob("*")}
        assert ".so" in made
        assert made & {".gch", ".pch"}, "with the precompiled header, which torch would keep for everybody"
        assert server.end(signal.SIGINT) == 0


def test_all_addresses_of_the_machine_are_announced_or_the_one_that_is_asked_for(bloom: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "all", f"model={bloom}", "blocks=0:4", "listen=0.0.0.0", "relay=true", "nat_mapping=true") as server:
        addresses = server.ready()[5].split()
        real = [found.address for card in psutil.net_if_addrs().values() for found in card if found.family == socket.AF_INET]
        beyond = [address for address in real if not address.startswith("127.")]
        assert {address.split("/")[2] for address in addresses} == set(beyond or ["127.0.0.1"])
        forward(bloom, addresses[0])
        peer = addresses[0].rpartition("/")[2]
        words = [f"model={bloom}", "blocks=0:4", "announce=192.0.2.99", f"initial_peers={addresses[0]}", "auto_relay=true"]
        with serve(tmp_path / "one", *words) as other:
            (address,) = other.ready()[5].split()
            assert address.startswith("/ip4/192.0.2.99/tcp/")
            assert peer not in address
            assert other.end() == 0
        assert server.end() == 0


def test_ipv6_is_listened_on_where_the_machine_has_it(bloom: Path, tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with serve(tmp_path / "log", f"model={bloom}", "blocks=0:4", "listen=::1", "transport=quic") as server:
        (address,) = server.ready()[5].split()
        assert address.startswith("/ip6/::1/udp/")
        forward(bloom, address)
        assert server.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_with_code_0_and_leaves_nothing(bloom: Path, tmp_path: Path, number: signal.Signals) -> None:
    with serve(tmp_path / "log", f"model={bloom}", "blocks=0:4", f"identity={tmp_path / 'key'}") as server:
        server.wait_for("loading blocks 0:4 of")
        began = time.monotonic()
        assert server.end(number) == 0
        assert time.monotonic() - began < 10
        assert "swarmtune serve: stopped while loading" in server.said()


def test_a_second_signal_ends_at_once(bloom: Path, tmp_path: Path) -> None:
    """The server is frozen before, so that both are there when it goes on: the second one must not wait for the drain."""
    with serve(tmp_path / "log", f"model={bloom}", "blocks=0:4") as server:
        server.ready()
        assert server.end(signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT) == 0
        assert "stopped at once" in server.said()


def test_a_server_of_a_closed_local_swarm_is_not_restarted(bloom: Path) -> None:
    local = swarmtune.LocalSwarm(bloom, ["0:4"])
    with pytest.raises(SwarmError, match="this swarm does not run"):
        local.servers[0].restart()
    with local:
        local.servers[0].restart()
        assert local.servers[0].alive
    with pytest.raises(SwarmError, match="this swarm does not run"):
        local.servers[0].restart()
    assert not local.servers[0].alive


def swarm(*words: object) -> subprocess.CompletedProcess[str]:
    script = Path(swarmtune.__file__).parents[1] / "scripts" / "swarm"
    return subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True, text=True, timeout=200, check=False)


def pids(lines: str) -> Sequence[int]:
    return [int(number) for number in re.findall(r"\(?process (\d+)", lines)]


def test_a_private_swarm_goes_up_answers_and_goes_down(bloom: Path, tmp_path: Path) -> None:
    plan = tmp_path / "swarm.yaml"
    plan.write_text(f'model: {bloom}\ndtype: float32\nservers: [{{blocks: "0:2"}}, {{blocks: "2:4", name: tail}}]\n')
    try:
        up = swarm("up", plan)
        assert up.returncode == 0, up.stderr
        assert len(pids(up.stdout)) == 2
        assert all("sharing=2" in psutil.Process(pid).cmdline() for pid in pids(up.stdout)), "of what is free for activations"
        addresses = re.search(r"'swarm.initial_peers=\[(.*)\]'", up.stdout)
        assert addresses is not None
        forward(bloom, addresses[1].split(",")[1])
        assert "runs already" in swarm("up", plan).stderr
        status = swarm("status", plan)
        assert status.returncode == 0, status.stdout + status.stderr
        assert len(re.findall(r"answers in \d+\.\d ms: blocks \d:\d in float32", status.stdout)) == 2
        os.kill(pids(up.stdout)[1], signal.SIGKILL)
        status = swarm("status", plan)
        assert status.returncode == 1
        assert re.search(r"tail .* no process .* does not run", status.stdout)
    finally:
        down = swarm("down", plan)
    assert down.stdout == "server-0 stopped\n"
    assert down.returncode == 0
    again = swarm("up", plan)
    left = Leftovers(*pids(again.stdout))
    try:
        assert re.search(r"'swarm.initial_peers=\[(.*)\]'", again.stdout)[1] == addresses[1], "identities and ports stay"  # type: ignore[index]
    finally:
        assert swarm("down", plan).stdout == "server-0 stopped\ntail stopped\n"
    assert len(left.directories) == 2
    left.wait()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids(again.stdout))


def test_one_server_that_fails_stops_all(bloom: Path, tmp_path: Path) -> None:
    plan = tmp_path / "swarm.yaml"
    plan.write_text(f'model: {bloom}\nservers: [{{blocks: "0:4"}}, {{blocks: "0:4", device: "cuda:77"}}]\n')
    up = swarm("up", plan)
    assert up.returncode == 1
    assert re.search(r"server-1 ended before it was ready, so all were stopped: device cuda:77 is not available here", up.stderr)
    status = swarm("status", plan)
    assert status.returncode == 1
    assert status.stdout.count("does not run") == 2
