"""A network on one machine: hosts in network namespaces, joined by links with delay, jitter, loss and rate, cut and healed on command.

    with NetLab({"client": PRESETS["wan"], "server": PRESETS["wan"]}) as lab:
        server = lab.popen("server", ["python", "-m", "servers", f"listen={lab.address('server')}", ...])
        lab.cut("client", "server")

TCP, UDP and everything over them pass through it, because it moves IP packets. It needs root. Nothing outlives the lab, nor the process that owns it:
not the namespaces, not what runs inside, not the router. docs/netlab.md has more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.netlab_namespaces import NetLabError, cpu_s, inside, name_of, remove, run, stale
from tests.netlab_netem import HUB, Netem, works
from tests.netlab_router import DEVICE

ROOT = Path(__file__).resolve().parents[1]
HOST_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
MAX_HOSTS = 200
CLOSE_S = 15.0
"""More than the router may take to end what runs inside; then this process does it."""

__all__ = ["PRESETS", "Counters", "Link", "NetLab", "NetLabError", "mechanism"]


@dataclass(frozen=True, slots=True)
class Link:
    """What joins one host to the others. Every value holds for each direction, out of the host and into it.

    A packet crosses two links, that of its sender and that of its receiver. So the one-way time between two hosts is the sum of both delays, and
    the round trip twice that sum: four delays where the links are alike.
    """

    delay_ms: float = 0.0
    """One way, over this link alone."""
    jitter_ms: float = 0.0
    """The delay varies evenly by up to this much, up and down. Packets of one direction never overtake each other."""
    loss: float = 0.0
    """The probability that a packet is dropped, from 0 to 1. The seed decides it for the n-th packet of a direction, whenever that comes."""
    rate_mbit: float | None = None
    """Megabits a second, IP headers included; ``None`` is without a limit."""
    queue_ms: float = 200.0
    """What waits for the rate is at most this long; more is dropped, the newest first."""

    def __post_init__(self) -> None:
        for name in ("delay_ms", "jitter_ms", "queue_ms"):
            if not 0 <= getattr(self, name) <= 60_000:
                raise ValueError(f"{name} must be from 0 to 60000, got {getattr(self, name)}")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss is a probability from 0 to 1, got {self.loss}")
        if self.rate_mbit is not None and not 0.001 <= self.rate_mbit <= 100_000:
            raise ValueError(f"rate_mbit must be from 0.001 to 100000, or None for no limit, got {self.rate_mbit}")


PRESETS = {"lan": Link(), "wan": Link(delay_ms=12.5, rate_mbit=100), "wan4": Link(delay_ms=25, rate_mbit=100)}
"""``wan``: 50 ms round trip between two hosts and 100 Mbit/s per host; ``wan4``: 100 ms and 100 Mbit/s; ``lan``: neither."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Packets of one host since the lab began; one that is dropped counts at the host of the link that did it, or at its sender if that was a cut."""

    sent_packets: int
    sent_bytes: int
    received_packets: int
    received_bytes: int
    dropped_packets: int


@functools.cache
def mechanism() -> str:
    """``netem`` where the kernel has it, otherwise ``tun``: a router in user space.

    Raises:
        NetLabError: neither can be had here; the sentence says why.
    """
    if os.geteuid():
        raise NetLabError("a lab needs root, to make network namespaces: run this as root")
    if works():
        return "netem"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        raise NetLabError(f"this kernel has no netem, and /dev/net/tun cannot be opened ({error.strerror}): run modprobe tun") from None
    return "tun"


class NetLab:
    """Hosts and the network between them, from ``with`` to its end.

    Args:
        hosts: a link for each host, by name (lower case, digits, 16 characters).
        seed: decides which packets are lost and how delays vary (netem has seeds of its own).
        mtu: the largest IP packet; that of the internet unless something else is asked. Larger ones make the router cheaper and loss coarser.
        using: ``netem`` or ``tun``; what :func:`mechanism` finds unless given.

    Raises:
        NetLabError: on entry, if the lab cannot be made here. What was made by then is removed.
    """

    def __init__(self, hosts: Mapping[str, Link], *, seed: int = 0, mtu: int = 1500, using: str | None = None) -> None:
        if not 1 <= len(hosts) <= MAX_HOSTS or not all(HOST_NAME.fullmatch(host) for host in hosts):
            raise ValueError(f"hosts must be 1 to {MAX_HOSTS} names of lower-case letters and digits, got {', '.join(hosts) or 'none'}")
        if not 576 <= mtu <= 65535:
            raise ValueError(f"mtu must be from 576 to 65535, got {mtu}")
        self.links = dict(hosts)
        self._addresses = {host: f"10.77.0.{number + 2}" for number, host in enumerate(hosts)}
        self._seed, self._mtu, self._using = seed, mtu, using
        self._cuts: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._router: subprocess.Popen[bytes] | None = None
        self._netem: Netem | None = None
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> NetLab:
        self.using = self._using or mechanism()
        remove(stale())
        extra = [HUB] if self.using == "netem" else []
        names = [name_of(host) for host in [*self.links, *extra]]
        for name in names:
            if Path("/run/netns", name).exists():
                raise NetLabError(f"this process has a lab with a host {name.rpartition('-')[2]} already: choose other names")
        self._router = self._keeper(names)
        try:
            for name in names:
                run("ip", "netns", "add", name)
            hosts = [(host, name_of(host), [int(part) for part in address.split(".")]) for host, address in self._addresses.items()]
            self._ask(seed=self._seed, mtu=self._mtu, hosts=[] if extra else hosts)
            for host, address in self._addresses.items():
                own = "" if extra else f"addr add {address}/24 dev {DEVICE}\nlink set {DEVICE} mtu {self._mtu} txqueuelen 1000 up\n"
                run("ip", "-n", name_of(host), "-batch", "-", text=f"link set lo up\n{own}")
            self._netem = Netem(self._addresses, self._mtu) if extra else None
            for host in self.links:
                self.set(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _keeper(self, names: Sequence[str]) -> subprocess.Popen[bytes]:
        """The router's process, which removes these namespaces when this process ends; in a session of its own, so Ctrl-C is ours."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-S", "-m", "tests.netlab_router", *names]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def _ask(self, **question: Any) -> dict[str, int]:
        """Tell the router something and wait for its answer."""
        router = self._router
        if router is None:
            raise NetLabError("the lab is not open: use it inside of its with statement")
        assert router.stdin is not None
        assert router.stdout is not None
        with self._lock:
            try:
                router.stdin.write(json.dumps(question).encode() + b"\n")
                router.stdin.flush()
                line = router.stdout.readline()
            except BrokenPipeError:
                line = b""
        if not line:
            raise NetLabError("the router of the lab has ended: its hosts cannot reach each other any more")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NetLabError(answer["error"])
        return answer

    def close(self) -> None:
        """End what runs inside (SIGTERM, five seconds later SIGKILL) and remove everything."""
        router, self._router = self._router, None
        if router is None:
            return
        assert router.stdin is not None
        assert router.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            router.stdin.close()
        try:
            ends_at = time.monotonic() + CLOSE_S
            while router.poll() is None:
                self._reap()
                if time.monotonic() > ends_at:
                    router.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    router.wait(0.02)
        finally:
            router.stdout.close()
            self._reap()
            remove([name_of(host) for host in [*self.links, HUB]], os.getpid())  # where the router was killed

    def _reap(self) -> None:
        for process in self._started:
            process.poll()

    def address(self, host: str) -> str:
        """The IP address of a host."""
        return self._addresses[self._known(host)]

    def namespace(self, host: str) -> str:
        """The name of a host's namespace, for ``ip netns exec``."""
        return name_of(self._known(host))

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command that runs on a host, for whatever starts programs by itself; its process is that of ``argv``, so signals reach it."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(host)}", *argv]

    def popen(self, host: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on a host, where it is from its first instruction; ``options`` are those of ``subprocess.Popen``."""
        with self.inside(host):
            process = subprocess.Popen(argv, **options)
        self._started.append(process)
        return process

    def inside(self, host: str) -> contextlib.AbstractContextManager[None]:
        """This thread on a host; sockets that it makes there stay there, and so do threads that it starts."""
        return inside(self.namespace(host))

    def set(self, host: str, **changes: Any) -> None:
        """Change a link while it is in use: any of the fields of :class:`Link`; packets under way keep their times."""
        self.links[host] = link = dataclasses.replace(self.links[self._known(host)], **changes)
        if self._netem is not None:
            self._netem.set(host, link)
        else:
            rate = None if link.rate_mbit is None else link.rate_mbit * 125_000
            line = [link.delay_ms / 1000, link.jitter_ms / 1000, link.loss, rate, link.queue_ms / 1000]
            self._ask(verb="set", host=list(self.links).index(host), line=line)

    def cut(self, host: str, other: str | None = None) -> None:
        """Drop every packet between two hosts, both ways, those under way too; between a host and all others, unless one is named."""
        self._apply(self._cuts | self._pairs(host, other))

    def heal(self, host: str | None = None, other: str | None = None) -> None:
        """Take back the cut between two hosts, all cuts of one, or all."""
        self._apply(self._cuts - self._pairs(host, other) if host is not None else set())

    def _pairs(self, host: str, other: str | None) -> frozenset[tuple[str, str]]:
        others = [other] if other is not None else [name for name in self.links if name != host]
        return frozenset((min(host, name), max(host, name)) for name in map(self._known, others) if self._known(host) != name)

    def _apply(self, cuts: Iterable[tuple[str, str]]) -> None:
        self._cuts = set(cuts)
        if self._netem is not None:
            self._netem.cut(self._cuts)
        else:
            numbers = {host: number for number, host in enumerate(self.links)}
            self._ask(verb="cuts", pairs=[(numbers[a], numbers[b]) for a, b in self._cuts])

    def counters(self, host: str) -> Counters:
        """What a host has sent, received and lost. netem does not count what a cut has dropped."""
        if self._netem is not None:
            return Counters(**self._netem.counters(self._known(host)))
        return Counters(**self._ask(verb="counters", host=list(self.links).index(self._known(host))))

    def router_cpu_s(self) -> float:
        """Seconds of a core that the router has used so far; none where netem does the work in the kernel."""
        if self._router is None:
            raise NetLabError("the lab is not open: use it inside of its with statement")
        return 0.0 if self._netem is not None else cpu_s(self._router.pid)

    def _known(self, host: str) -> str:
        if host not in self.links:
            raise NetLabError(f"the lab has no host {host!r}: its hosts are {', '.join(self.links)}")
        return host
