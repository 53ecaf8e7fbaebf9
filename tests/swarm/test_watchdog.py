"""Our own p2p daemon dies or hangs, on either side: another one takes its place, with the same identity and port, and no step notices."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hivemind.hivemind_cli
import psutil
import pytest
import torch

import swarmtune
from swarmtune.discovery.dht import DirectoryNode
from swarmtune.discovery.identity import Identity
from swarmtune.discovery.records import Announcement
from swarmtune.errors import SwarmError
from swarmtune.remote.events import EventKind
from swarmtune.transport.base import TransportError
from swarmtune.transport.daemon import CLOSE_TIMEOUT_S, Daemon
from swarmtune.transport.hivemind import HivemindNode
from tests.chaos.processes import daemon_of
from tests.harness import batch, lora, make_handler, remote, same_bits, set_values, step
from tests.swarm.test_leftovers import runs
from tests.swarm.test_serving import serve

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def local(bloom: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[swarmtune.LocalSwarm]:
    with swarmtune.LocalSwarm(bloom, ["0:4"], dtype="float32", log_dir=tmp_path_factory.mktemp("logs")) as found:
        yield found


def grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.adapter.named_parameters()}  # type: ignore[union-attr]


def thread_states(pid: int) -> list[str]:
    return [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]


@pytest.mark.parametrize(("number", "phase"), [(signal.SIGKILL, "before"), (signal.SIGKILL, "between"), (signal.SIGSTOP, "between")])
def test_a_client_goes_on_over_another_daemon(bloom: Path, local: swarmtune.LocalSwarm, number: signal.Signals, phase: str) -> None:
    with swarmtune.connect(local.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        quiet = step(model, batch())[2]
        model.zero_grad()
        node = swarm._transport
        identity, first = node.peer_id, node.daemon_pid  # type: ignore[attr-defined]
        loss = model(**batch()).loss if phase == "between" else None
        os.kill(first, number)
        while number is signal.SIGSTOP and any(thread != "T" for thread in thread_states(first)):
            time.sleep(0.001)  # a whole backward can pass through it meanwhile
        began = time.monotonic()
        loss = model(**batch()).loss if loss is None else loss
        loss.backward()
        assert time.monotonic() - began < (10 if number is signal.SIGKILL else 20)
        assert same_bits(quiet, grads(model))
        assert swarm.traffic().events[EventKind.DAEMON].count >= 1
        assert node.daemon_pid not in (None, first)  # type: ignore[attr-defined]
        assert (node.peer_id, node.rebuilds) == (identity, 1)  # type: ignore[attr-defined]
        assert not psutil.pid_exists(first)


def test_a_client_survives_five_daemons_in_a_row_and_leaves_nothing(bloom: Path, local: swarmtune.LocalSwarm) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with swarmtune.connect(local.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        quiet = step(model, batch())[2]
        node = swarm._transport
        directory = node._directory  # type: ignore[attr-defined]
        for _ in range(5):
            os.kill(node.daemon_pid, signal.SIGKILL)  # type: ignore[attr-defined]
            assert same_bits(quiet, step(model, batch())[2])
        assert (directory / "identity").stat().st_mode & 0o777 == 0o600
        assert len(list(directory.glob("daemon-*.sock"))) == 1
    assert not directory.exists()
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before


def test_a_daemon_without_its_keeper_is_replaced(bloom: Path, local: swarmtune.LocalSwarm) -> None:
    """Nobody would end it when this process ends."""
    with swarmtune.connect(local.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        node = swarm._transport
        first = node.daemon_pid  # type: ignore[attr-defined]
        keeper = psutil.Process(first).ppid()
        os.kill(keeper, signal.SIGKILL)
        step(model, batch())
        ends_at = time.monotonic() + 10
        while node.daemon_pid == first and time.monotonic() < ends_at:  # type: ignore[attr-defined]
            time.sleep(0.05)
        assert node.daemon_pid != first  # type: ignore[attr-defined]
        assert not psutil.pid_exists(first) or psutil.Process(first).status() == psutil.STATUS_ZOMBIE  # it has another parent now
        step(model, batch())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_goes_on_under_the_same_address(
    bloom: Path, local: swarmtune.LocalSwarm, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    (server,) = local.servers
    with swarmtune.connect(local.initial_peers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        quiet = step(model, batch())[2]
        pid, daemon = server.pid, daemon_of(server.pid)
        assert daemon is not None
        os.kill(daemon, number)
        with caplog.at_level(logging.WARNING, "swarmtune"):
            assert same_bits(quiet, step(model, batch())[2])
        assert "could not be reached a moment ago" not in caplog.text, (
            "the client's daemon was made to dial a server that was away, so it refused to do so again for 5 s"
        )
        assert server.alive
        assert server.pid == pid
        assert daemon_of(pid) not in (None, daemon)
    with swarmtune.connect(local.initial_peers) as swarm:  # somebody who never knew the old one
        assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)


def test_a_client_whose_daemon_cannot_be_replaced_says_so(bloom: Path, local: swarmtune.LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtune.transport.hivemind.REBUILD_PATIENCE_S", 1.0)
    with swarmtune.connect(local.initial_peers, patience_s=5.0) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        node = swarm._transport
        (node._directory / "identity").write_bytes(b"no key")  # type: ignore[attr-defined]
        os.kill(node.daemon_pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(SwarmError, match=r"could not be started again \(the p2p daemon did not start: .*connect again"):
            step(model, batch())


def test_a_node_whose_port_is_taken_meanwhile_gives_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtune.transport.hivemind.REBUILD_PATIENCE_S", 1.0)

    async def run() -> str:
        node = await HivemindNode().start(["/ip4/127.0.0.1/tcp/0"])
        try:
            port = int(node.addresses[0].split("/")[4])
            real = node._start_daemon

            async def start_late() -> None:
                with socket.create_server(("127.0.0.1", port)):
                    await real()

            monkeypatch.setattr(node, "_start_daemon", start_late)
            assert node.daemon_pid is not None
            os.kill(node.daemon_pid, signal.SIGKILL)
            await asyncio.wait_for(node.daemon_ended.wait(), 20)
            return node._failure
        finally:
            await node.close()

    assert "the p2p daemon did not start" in asyncio.run(run())


def test_a_listening_node_keeps_the_port_that_it_was_given() -> None:
    async def run() -> tuple[tuple[str, ...], tuple[str, ...]]:
        node = await HivemindNode().start(["/ip4/127.0.0.1/tcp/0"])
        try:
            before = node.addresses
            assert node.daemon_pid is not None
            os.kill(node.daemon_pid, signal.SIGKILL)
            ends_at = time.monotonic() + 10
            while not node.rebuilds and time.monotonic() < ends_at:
                await asyncio.sleep(0.02)
            return before, node.addresses
        finally:
            await node.close()

    before, after = asyncio.run(run())
    assert before == after


@pytest.mark.parametrize("whose", ["keeper", "nobody's"])
def test_a_daemon_is_gone_with_its_pipe_once_its_node_is_closed(whose: str) -> None:
    """Also if its keeper was killed. A pipe that outlives its loop was a warning of Python's much later, in whatever ran then."""

    def pipes() -> set[str]:
        found = set()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry))
        return {name for name in found if name.startswith("pipe:")}

    async def run() -> None:
        gc.collect()
        before = pipes()
        node = await HivemindNode().start()
        own = pipes() - before
        assert own
        assert node.daemon_pid is not None
        daemon = psutil.Process(node.daemon_pid)
        keeper = daemon.parent()
        assert keeper is not None
        if whose == "keeper":
            keeper.kill()
        began = time.monotonic()
        await node.close()
        assert time.monotonic() - began < CLOSE_TIMEOUT_S, "it waited for what an orphan holds open"
        assert not own & pipes()
        for process in (keeper, daemon):
            await until(lambda process=process: not runs(process))  # type: ignore[misc]

    for _ in range(3):
        asyncio.run(run())


def test_a_daemon_that_says_much_without_an_end_of_line_is_heard_out(tmp_path: Path) -> None:
    async def run() -> bool:
        daemon, output = Daemon(tmp_path, 1), asyncio.StreamReader()
        output.feed_data(b"x" * 300_000)
        output.feed_eof()
        await daemon._drain(output)
        return daemon.ended.is_set()

    assert asyncio.run(run())


def test_closing_a_daemon_goes_on_when_it_is_cancelled() -> None:
    async def run() -> None:
        node = await HivemindNode().start()
        daemon = node._daemon
        assert daemon is not None
        process = psutil.Process(daemon.pid)
        os.kill(daemon.pid, signal.SIGSTOP)
        closing = asyncio.create_task(daemon.close(replace=True))
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await asyncio.gather(daemon.close(), daemon.close())
        assert not daemon.socket.exists()
        await until(lambda: not runs(process))
        began = time.monotonic()
        await node.close()  # it is about to start another daemon
        assert time.monotonic() - began < CLOSE_TIMEOUT_S

    asyncio.run(run())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_daemon_whose_keeper_was_killed_is_ended_by_closing_it(cancelled: bool, tmp_path: Path) -> None:
    """Also where the start was cancelled before the daemon's number was read."""
    (tmp_path / "identity").write_bytes(Identity.generate().to_bytes())

    async def run() -> None:
        daemon = Daemon(tmp_path, 1)
        starting = asyncio.create_task(daemon.start(Path(hivemind.hivemind_cli.__path__[0]) / "p2pd", tmp_path / "identity", ["-noListenAddrs"]))
        if cancelled:
            while daemon._spawning is None:
                await asyncio.sleep(0)
            starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        assert daemon._spawning is not None
        keeper = psutil.Process((await daemon._spawning).pid)
        await until(lambda: any(child.name() == "p2pd" for child in keeper.children()))
        (process,) = keeper.children()
        keeper.kill()
        await daemon.close(replace=True)
        await until(lambda: not runs(process))

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its keeper may outlive the loop for a moment
@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.002, 0.01, 0.05])
def test_a_loop_that_ends_while_a_daemon_closes_leaves_nothing(after_s: float, tmp_path: Path) -> None:
    """A second Ctrl-C, for instance."""
    directory = tmp_path / "node"
    directory.mkdir()
    (directory / "identity").write_bytes(Identity.generate().to_bytes())

    async def run() -> psutil.Process:
        daemon = Daemon(directory, 1)
        await daemon.start(Path(hivemind.hivemind_cli.__path__[0]) / "p2pd", directory / "identity", ["-noListenAddrs"])
        process = psutil.Process(daemon.pid)
        asyncio.create_task(daemon.close())  # noqa: RUF006  # cancelled with the loop
        await asyncio.sleep(after_s)
        return process

    process = asyncio.run(run())
    gc.collect()
    asyncio.run(until(lambda: not runs(process) and not directory.exists()))


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2])
def test_a_start_that_is_cancelled_leaves_nothing(after_s: float, tmp_path: Path) -> None:
    async def run() -> None:
        (tmp_path / "identity").write_bytes(Identity.generate().to_bytes())
        daemon = Daemon(tmp_path, 1)
        binary = Path(hivemind.hivemind_cli.__path__[0]) / "p2pd"
        starting = asyncio.create_task(daemon.start(binary, tmp_path / "identity", ["-noListenAddrs"]))
        await asyncio.sleep(after_s)
        starting.cancel()
        (ended,) = await asyncio.gather(starting, return_exceptions=True)
        assert ended is None or isinstance(ended, asyncio.CancelledError)
        began = time.monotonic()
        await daemon.close(replace=True)
        assert time.monotonic() - began < CLOSE_TIMEOUT_S
        await until(lambda: not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or ())])

    asyncio.run(run())
    gc.collect()


async def until(condition: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.02)


def test_a_server_keeps_the_records_of_others_over_another_daemon(bloom: Path) -> None:
    """Whoever joins through it finds the others at once, not when these announce themselves the next time."""
    info = make_handler(bloom, "0:4").info

    async def run() -> None:
        nodes, directories = [HivemindNode(), HivemindNode(), HivemindNode()], [DirectoryNode(), DirectoryNode(), DirectoryNode()]
        (first, second, client), (keeper, owner, asker) = nodes, directories
        try:
            await first.start(["/ip4/127.0.0.1/tcp/0"])
            await keeper.start(first.p2p, [], client=False)
            first.rebuilt.append(lambda: keeper.rebind(first.p2p))
            followed = asyncio.Event()

            async def last() -> None:
                followed.set()

            first.rebuilt.append(last)
            await second.start(["/ip4/127.0.0.1/tcp/0"])
            await second.connect(first.addresses[0])
            await owner.start(second.p2p, [first.addresses[0]], client=False)
            announcement = Announcement(second.peer_id, info, second.addresses, time.time() + 60)
            assert await owner.publish(announcement, announcement.seal(second.identity))
            await owner.close()
            await second.close()
            assert first.daemon_pid is not None
            os.kill(first.daemon_pid, signal.SIGKILL)
            await until(followed.is_set)
            await client.start()
            await client.connect(first.addresses[0])
            await asker.start(client.p2p, [first.addresses[0]], client=True)
            assert [found.peer for found in await asker.find(info.model)] == [second.peer_id]
        finally:
            for directory, node in zip(directories, nodes, strict=True):
                await directory.close()
                await node.close()

    asyncio.run(run())


@pytest.mark.parametrize("frozen", ["ours", "theirs"])
def test_a_question_to_the_dht_ends_with_our_daemon(frozen: str) -> None:
    """Hivemind alone would wait for the answer of a daemon that is gone; a frozen one keeps the question open until then."""

    async def run() -> float:
        node, directory, other = HivemindNode(), DirectoryNode(), HivemindNode()
        try:
            await other.start(["/ip4/127.0.0.1/tcp/0"])
            await node.start()
            peer = await node.connect(other.addresses[0])
            await directory.start(node.p2p, [], client=True)
            assert node.daemon_pid is not None
            assert other.daemon_pid is not None
            os.kill(node.daemon_pid if frozen == "ours" else other.daemon_pid, signal.SIGSTOP)
            asking = asyncio.create_task(directory.clock_ahead(peer))
            await asyncio.sleep(0.5)
            os.kill(node.daemon_pid, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(TransportError):
                await asking
            return time.monotonic() - began
        finally:
            await directory.close()
            await node.close()
            await other.close()

    assert asyncio.run(run()) < 2


def test_a_swarm_whose_daemons_all_die_at_once_is_one_swarm_again(bloom: Path, tmp_path: Path) -> None:
    """Each begins with an empty part of the DHT, and the first server knows nobody by its configuration."""
    with serve(tmp_path / "first.log", f"model={bloom}", "blocks=0:2", "dtype=float32", "threads=1") as first:
        address = first.ready()[5].split()[0]
        with serve(tmp_path / "second.log", f"model={bloom}", "blocks=2:4", "dtype=float32", "threads=1", f"initial_peers={address}") as second:
            second.ready()
            for server in (first, second):
                daemon = daemon_of(server.process.pid)
                assert daemon is not None
                os.kill(daemon, signal.SIGKILL)
            with swarmtune.connect([address], patience_s=60.0) as swarm:  # a newcomer, who learns of the second only through the first
                assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)
