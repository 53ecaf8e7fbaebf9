"""The process behind a lab: passes packets between TUN devices, late or not at all; and removes the lab when its owner ends.

``tests/netlab.py`` starts it and talks to it in lines of JSON over its standard input and output. The end of the input is the end of the owner,
however that came, so namespaces, devices and all that runs inside go even after SIGKILL. Where the kernel's netem does the work, it holds no
devices and is the keeper only.

A packet crosses the uplink of its sender, then the downlink of its receiver. Each is a ``Line``: loss, then a drop-tail queue before a byte rate,
then a delay. All packets under way are in one heap, by the time of their next event.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import heapq
import json
import os
import random
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.netlab_namespaces import end_all_in, inside, remove

SLACK_S = 0.00025
"""Packets leave up to this much early, so that one wake-up serves several."""
BURST = 64
MAX_HELD = 20_000
"""Packets on one line at most, whatever its rate: the bound of memory."""
DEVICE = "net0"

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


class Line:
    """One direction of a host's link."""

    __slots__ = ("_choice", "_free_at", "_last_at", "_spread", "bytes_s", "delay_s", "held", "jitter_s", "loss", "queue_s")

    def __init__(self, seed: str) -> None:
        self._choice, self._spread = random.Random(f"{seed}:loss"), random.Random(f"{seed}:jitter")
        self._free_at = self._last_at = 0.0
        self.held = 0
        self.set(0.0, 0.0, 0.0, None, 0.0)

    def set(self, delay_s: float, jitter_s: float, loss: float, bytes_s: float | None, queue_s: float) -> None:
        """From now on; packets that are under way keep their times."""
        self.delay_s, self.jitter_s, self.loss, self.bytes_s, self.queue_s = delay_s, jitter_s, loss, bytes_s, queue_s

    def through(self, now: float, size: int) -> float | None:
        """When a packet that enters now comes out; ``None`` for one that is dropped. Packets never overtake each other."""
        if (self.loss and self._choice.random() < self.loss) or self.held >= MAX_HELD:
            return None
        at = now
        if self.bytes_s is not None:
            at = max(now, self._free_at)
            if at - now > self.queue_s:
                return None
            self._free_at = at = at + size / self.bytes_s
        at += self.delay_s
        if self.jitter_s:
            at = max(now, at + self._spread.uniform(-self.jitter_s, self.jitter_s))
        self._last_at = at = max(at, self._last_at)
        self.held += 1
        return at


@dataclass(slots=True)
class Host:
    """A TUN device with both lines of its link and what has been counted."""

    tun: int
    up: Line
    down: Line
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("sent_packets", "sent_bytes", "received_packets", "received_bytes", "dropped_packets"), 0)
    )


class Router:
    """All hosts of a lab and the packets between them."""

    def __init__(self, hosts: dict[bytes, Host], mtu: int) -> None:
        self._hosts, self._mtu = list(hosts.values()), mtu
        self._cuts: set[tuple[int, int]] = set()
        self._heap: list[tuple[float, int, bool, int, int, bytes]] = []  # due, number, on the uplink, sender, receiver, packet
        self._number = 0
        self._index = {address: number for number, address in enumerate(hosts)}

    def run(self, end: Callable[[], None]) -> None:
        """Until standard input ends, and then as long as ``end`` takes: what runs inside needs its network to say goodbye."""
        heap, control = self._heap, Control(self)
        ending: threading.Thread | None = None
        tuns = {host.tun: number for number, host in enumerate(self._hosts)}
        watched = [0, *tuns]
        while ending is None or ending.is_alive():
            wait_s = max(0.0, heap[0][0] - time.monotonic()) if heap else None
            if ending is not None:
                wait_s = 0.02 if wait_s is None else min(wait_s, 0.02)
            ready = select.select(watched, [], [], wait_s)[0]
            for descriptor in ready:
                if descriptor:
                    self._take(tuns[descriptor])
                elif not control.read():
                    watched.remove(0)
                    ending = threading.Thread(target=end)
                    ending.start()
            self._pass(time.monotonic() + SLACK_S)

    def _take(self, sender: int) -> None:
        """Read what a host has sent."""
        host, now = self._hosts[sender], time.monotonic()
        counts, line = host.counts, host.up
        for _ in range(BURST):
            try:
                packet = os.read(host.tun, self._mtu)
            except BlockingIOError:
                return
            receiver = self._index.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if receiver is None:
                continue  # neighbour discovery of IPv6, or an address that nobody has
            counts["sent_packets"] += 1
            counts["sent_bytes"] += len(packet)
            due = None if (sender, receiver) in self._cuts else line.through(now, len(packet))
            if due is None:
                counts["dropped_packets"] += 1
            else:
                self._number += 1
                heapq.heappush(self._heap, (due, self._number, True, sender, receiver, packet))

    def _pass(self, until: float) -> None:
        """Move every packet whose time has come."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            at, _, uplink, sender, receiver, packet = heapq.heappop(heap)
            source, target = self._hosts[sender], self._hosts[receiver]
            (source.up if uplink else target.down).held -= 1
            if (sender, receiver) in self._cuts:
                source.counts["dropped_packets"] += 1
            elif uplink:
                due = target.down.through(at, len(packet))
                if due is None:
                    target.counts["dropped_packets"] += 1
                else:
                    self._number += 1
                    heapq.heappush(heap, (due, self._number, False, sender, receiver, packet))
            else:
                try:
                    os.write(target.tun, packet)
                except OSError:  # its device is full or down
                    target.counts["dropped_packets"] += 1
                else:
                    target.counts["received_packets"] += 1
                    target.counts["received_bytes"] += len(packet)

    def answer(self, asked: dict[str, Any]) -> dict[str, int]:
        """Do what the owner asks."""
        if asked["verb"] == "set":
            host = self._hosts[asked["host"]]
            host.up.set(*asked["line"])
            host.down.set(*asked["line"])
        elif asked["verb"] == "cuts":
            self._cuts = {(a, b) for a, b in asked["pairs"]} | {(b, a) for a, b in asked["pairs"]}
        elif asked["verb"] == "counters":
            return self._hosts[asked["host"]].counts
        return {}


class Control:
    """Lines of JSON from the owner."""

    def __init__(self, router: Router | None) -> None:
        self._router, self._rest = router, b""

    def read(self) -> bool:
        """Answer what has come; false at the end."""
        data = os.read(0, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            answer = self._router.answer(json.loads(line)) if self._router else {}
            os.write(1, json.dumps(answer).encode() + b"\n")
        return bool(data)


def open_tun(namespace: str) -> int:
    """A TUN device in a namespace; it goes with its descriptor."""
    with inside(namespace):
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def serve(names: list[str], owner: int) -> None:
    """Wait for the word that the namespaces are there, with the addresses of their hosts; then route, or just wait."""
    with open(0, "rb", buffering=0, closefd=False) as control:  # nothing may stay in a buffer: select looks at the descriptor
        line = control.readline()
    if not line:
        return
    asked = json.loads(line)
    try:
        hosts = {
            bytes(address): Host(open_tun(name), Line(f"{asked['seed']}:{host}:up"), Line(f"{asked['seed']}:{host}:down"))
            for host, name, address in asked["hosts"]
        }
    except OSError as error:
        os.write(1, json.dumps({"error": f"no TUN device can be made: {error}"}).encode() + b"\n")
        return
    os.write(1, b"{}\n")
    if hosts:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)  # a network does not wait for the programs that use it
        gc.disable()  # there are no cycles here, and a collector would go through every packet under way
        Router(hosts, asked["mtu"]).run(lambda: end_all_in(names, owner))
    else:
        idle = Control(None)
        while idle.read():
            pass


def main() -> None:
    """Route until the owner ends, then leave nothing."""
    names, owner = sys.argv[1:], os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        serve(names, owner)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        remove(names, owner)


if __name__ == "__main__":
    main()
