"""The network on one machine: what a link does to packets, cuts, what is left behind; what a lab refuses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import netlab_netem
from tests.netlab import Link, NetLab, NetLabError, mechanism
from tests.netlab_measure import passes, round_trips_ms, tcp_mbit, tcp_pair, udp_arrivals, udp_pair
from tests.netlab_namespaces import NAMESPACES, processes_in, run

pytestmark = pytest.mark.swarm

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import sys, time
from tests.netlab import Link, NetLab
with NetLab({"x": Link(), "y": Link()}) as lab:
    child = lab.popen("x", ["sleep", "300"])
    print(lab._router.pid, child.pid, flush=True)
    ending = sys.stdin.readline().strip()
    if ending == "exception":
        raise ValueError("on purpose")
    if ending != "normal":
        time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    try:
        mechanism()
    except NetLabError as error:
        pytest.skip(str(error))


@pytest.fixture
def by_tun() -> None:
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("the router in user space needs /dev/net/tun, which this kernel does not have")


@pytest.fixture(scope="module")
def pair() -> Iterator[NetLab]:
    with NetLab({"a": Link(), "b": Link(), "c": Link()}) as lab:
        yield lab


@pytest.fixture
def lab(pair: NetLab) -> Iterator[NetLab]:
    """Three hosts without delay, loss or cuts, whatever the last test did to them."""
    yield pair
    pair.heal()
    for host in pair.links:
        pair.set(host, delay_ms=0, jitter_ms=0, loss=0, rate_mbit=None, queue_ms=200)


def namespaces() -> set[str]:
    return {path.name for path in NAMESPACES.glob("swarmtune-*")}


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(holds: Callable[[], bool], limit_s: float = 8.0) -> bool:
    ends_at = time.monotonic() + limit_s
    while not holds() and time.monotonic() < ends_at:
        time.sleep(0.05)
    return holds()


@pytest.mark.parametrize(("a_ms", "b_ms"), [(12.5, 12.5), (5.0, 20.0), (0.0, 0.0)])
def test_round_trip_is_twice_the_sum_of_both_delays(lab: NetLab, a_ms: float, b_ms: float) -> None:
    lab.set("a", delay_ms=a_ms)
    lab.set("b", delay_ms=b_ms)
    asked, found = 2 * (a_ms + b_ms), round_trips_ms(lab, "a", "b", 10)
    assert asked - 1.5 < min(found) < asked + 4  # the least of them: the machine may be busy


def test_jitter_spreads_round_trips_within_its_bounds_and_keeps_the_order(lab: NetLab) -> None:
    lab.set("a", delay_ms=10, jitter_ms=8, rate_mbit=1000)
    found = round_trips_ms(lab, "a", "b", 30)
    assert min(found) > 20 - 16 - 1.5
    assert max(found) - min(found) > 8
    arrived = udp_arrivals(lab, "a", "b", 500)
    assert arrived == list(range(500))


@pytest.mark.parametrize("host", ["a", "b"])
def test_tcp_gets_the_rate_of_the_slower_link(lab: NetLab, host: str) -> None:
    for name in ("a", "b"):
        lab.set(name, delay_ms=2, rate_mbit=100)
    lab.set(host, rate_mbit=20)
    assert 17 < tcp_mbit(lab, "a", "b", 2.0) < 20.5


def test_a_queue_holds_what_it_may_and_drops_the_rest(lab: NetLab) -> None:
    """Of 400 packets at once, of 32 bytes with headers, 80 can wait for 32 ms at 80 kB/s; a busy machine is slower to send them."""
    lab.set("c", rate_mbit=0.64, queue_ms=32)
    before = lab.counters("c").dropped_packets
    with ExitStack() as stack:
        near, far = udp_pair(lab, "c", "b", stack)
        for _ in range(400):
            near.send(b"0123")
        far.settimeout(0.3)
        count = 0
        with contextlib.suppress(TimeoutError):
            while far.recv(16):
                count += 1
    assert 60 < count < 300
    assert lab.counters("c").dropped_packets - before == 400 - count


def test_the_seed_decides_which_packets_are_lost(by_tun: None) -> None:
    def arrivals(seed: int) -> list[int]:
        with NetLab({"p": Link(loss=0.1), "q": Link(loss=0.1)}, seed=seed, using="tun") as lab:
            found = udp_arrivals(lab, "p", "q")
            assert lab.counters("p").sent_packets == 2000
            assert lab.counters("p").dropped_packets + lab.counters("q").dropped_packets == 2000 - len(found)
            assert lab.counters("q").received_packets == len(found)
            return found

    first = arrivals(1)
    assert first == arrivals(1)
    assert first != arrivals(2)
    assert abs(len(first) / 2000 - 0.9 * 0.9) < 0.04  # 4.5 standard deviations


@pytest.mark.parametrize("kind", [udp_pair, tcp_pair])
def test_a_cut_drops_both_ways_until_it_is_healed_and_spares_others(lab: NetLab, kind: Callable) -> None:
    with ExitStack() as stack:
        there = kind(lab, "a", "b", stack)
        back = there[::-1]
        assert passes(there, 2)
        assert passes(back, 2)
        lab.cut("b", "a")
        assert not passes(there, 0.3)
        assert not passes(back, 0.3)
        assert min(round_trips_ms(lab, "a", "c", 2)) < 50
        lab.heal("a")
        assert passes(there, 5)
        assert passes(back, 5)
        lab.cut("b")
        assert not passes(there, 0.3)
        lab.heal()
        assert passes(there, 5)


def test_what_is_under_way_when_a_cut_comes_is_lost(lab: NetLab, by_tun: None) -> None:
    lab.set("a", delay_ms=400)
    with ExitStack() as stack:
        near, far = udp_pair(lab, "a", "b", stack)
        near.send(b"lost")
        time.sleep(0.05)
        lab.cut("a", "b")
        time.sleep(0.5)
        lab.heal("a", "b")
        near.send(b"kept")
        assert far.recv(16) == b"kept"


@pytest.mark.parametrize("ending", ["normal", "exception", "ctrl-c", "sigterm", "sigkill", "sigkill of the router too"])
def test_nothing_is_left_however_the_owner_ends(ending: str) -> None:
    before = namespaces()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    with ExitStack() as stack:
        for what in (owner.stdin, owner.stdout):
            stack.enter_context(what)
        stack.callback(owner.wait, 20)
        stack.callback(owner.kill)
        router, child = map(int, owner.stdout.readline().split())
        names = {f"swarmtune-{owner.pid}-{host}" for host in "xy"}
        assert names <= namespaces()
        assert set(processes_in(sorted(names))) == {child}
        if ending in ("normal", "exception"):
            owner.stdin.write(f"{ending}\n")
            owner.stdin.flush()
        elif ending == "sigkill of the router too":
            os.kill(router, signal.SIGKILL)
            owner.kill()
        else:
            owner.send_signal({"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}[ending])
        owner.wait(20)
    if ending == "sigkill of the router too":
        assert names <= namespaces(), "nobody is there to remove them"
        with NetLab({"z": Link()}):
            assert names.isdisjoint(namespaces())
    assert soon(lambda: names.isdisjoint(namespaces()))
    assert soon(lambda: not runs(router) and not runs(child))
    assert namespaces() <= before
    assert (owner.returncode == 0) is (ending == "normal")


def test_what_a_program_leaves_to_clean_up_after_it_may_finish(tmp_path: Path) -> None:
    """As the keeper of a daemon does; a program that does not end by itself gets a SIGTERM meanwhile."""
    with NetLab({"z": Link()}) as lab:
        cleaner = lab.popen("z", ["sh", "-c", f"(sleep 1.5; touch {tmp_path}/clean) & exit"])
        cleaner.wait(5)
        stays = lab.popen("z", ["sleep", "300"])
    assert (tmp_path / "clean").exists()
    assert stays.wait(1) == -signal.SIGTERM


def test_programs_have_their_network_until_they_have_ended() -> None:
    leaving = """
import signal, socket, sys, time
wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
wire.connect((sys.argv[1], int(sys.argv[2])))
signal.signal(signal.SIGTERM, lambda *_: (wire.send(b"goodbye"), time.sleep(0.5), sys.exit()))  # it takes a while to get there
print("ready", flush=True)
signal.pause()
"""
    with NetLab({"y": Link(delay_ms=10), "z": Link()}) as lab:
        with lab.inside("y"):
            heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with heard:
            heard.bind((lab.address("y"), 0))
            words = [sys.executable, "-S", "-c", leaving, *map(str, heard.getsockname())]
            with lab.popen("z", words, stdout=subprocess.PIPE) as program:
                assert program.stdout is not None
                assert program.stdout.readline() == b"ready\n"
                lab.close()
            assert program.returncode == 0
            heard.settimeout(5)
            assert heard.recv(16) == b"goodbye"


def test_stale_labs_are_removed_and_nothing_else_is() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale, others = f"swarmtune-{ended.pid}-old", [f"swarmtune-{os.getppid()}-alive", f"other-{ended.pid}-old"]
    try:
        for name in (stale, *others):
            run("ip", "netns", "add", name)
        with NetLab({"z": Link()}):
            assert not (NAMESPACES / stale).exists()
            assert all((NAMESPACES / name).exists() for name in others)
    finally:
        for name in (stale, *others):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def test_a_lab_that_cannot_be_made_says_why_and_leaves_nothing(pair: NetLab) -> None:
    before = namespaces()
    with pytest.raises(NetLabError, match="has a lab with a host a already"):
        NetLab({"fresh": Link(), "a": Link()}).__enter__()
    if mechanism() != "netem":
        with pytest.raises(NetLabError, match="netem"):
            NetLab({"fresh": Link()}, using="netem").__enter__()
    assert namespaces() == before
    assert round_trips_ms(pair, "a", "b", 1)


@pytest.mark.parametrize("wrong", [{"delay_ms": -1}, {"loss": 1.5}, {"loss": float("nan")}, {"rate_mbit": 0}, {"queue_ms": 1e9}])
def test_impossible_links_are_refused(lab: NetLab, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lab.set("a", **wrong)
    with pytest.raises(NetLabError, match="no host 'nobody': its hosts are a, b, c"):
        lab.cut("a", "nobody")


def test_the_routed_hub_of_netem_cuts_and_heals(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the queueing discipline, where the kernel lacks that."""
    said = netlab_netem.netem(Link(delay_ms=10, jitter_ms=2, loss=0.05, rate_mbit=8, queue_ms=90), 1000)
    assert " ".join(said) == "netem delay 10ms 2ms loss 5.0% rate 8mbit limit 100"
    if mechanism() != "netem":
        monkeypatch.setattr(netlab_netem.Netem, "set", lambda *_: None)
    with NetLab({"k": Link(), "l": Link(), "m": Link()}, using="netem") as lab, ExitStack() as stack:
        pair = tcp_pair(lab, "k", "l", stack)
        assert passes(pair, 2)
        lab.cut("k", "l")
        assert not passes(pair, 0.3)
        assert round_trips_ms(lab, "k", "m", 2)
        lab.heal()
        assert passes(pair, 5)
        assert lab.counters("k").sent_packets > 5
        assert lab.counters("l").received_bytes > 100


def test_commands_on_standard_input() -> None:
    words = "cut a b\nset b delay_ms=3\nset b lag=3\nexec a sh -c 'echo on a; exit 3'\nstart b sleep 300\nshow\nquit\n"
    command = [sys.executable, str(ROOT / "scripts" / "netlab"), "run", "--preset", "wan4"]
    done = subprocess.run(command, input=words, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    assert re.search(r"b: 10\.77\.0\.3, namespace swarmtune-\d+-b, Link\(delay_ms=3\.0, .*rate_mbit=100", done.stdout)
    assert "on a\nexit code 3\n" in done.stdout
    assert "a link has no lag: it has delay_ms" in done.stdout
    assert not any((NAMESPACES / name).exists() for name in re.findall(r"swarmtune-\d+-\w", done.stdout))
    asleep = re.search(r"pid (\d+)", done.stdout)
    assert asleep is not None
    assert not runs(int(asleep[1]))
