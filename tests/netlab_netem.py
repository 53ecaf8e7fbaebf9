"""A lab on the kernel's netem: a router namespace with a veth pair to each host, shaped at both ends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from tests.netlab_namespaces import NAMESPACES, NetLabError, inside, name_of, remove, run

if TYPE_CHECKING:
    from tests.netlab import Link

DEVICE = "net0"
HUB = "_hub"
GATEWAY = "10.77.0.1"
ETHERNET_BYTES = 14
"""What a device counts beyond each IP packet."""
UNLIMITED_PACKETS = 20_000
_probes = count()


def works() -> bool:
    """Whether the kernel has netem, found by trying."""
    name = name_of(f"_probe{next(_probes)}")
    try:
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "add", "a", "type", "veth", "peer", "name", "b")
        run("tc", "-n", name, "qdisc", "add", "dev", "a", "root", *words_of([("delay", "1ms")]))
    except NetLabError:
        return False
    finally:
        with contextlib.suppress(NetLabError):
            if (NAMESPACES / name).exists():
                remove([name])
    return True


def words_of(settings: Iterable[tuple[str, ...]]) -> list[str]:
    """A netem queueing discipline as ``tc`` takes it."""
    return ["netem", *(word for setting in settings for word in setting)]


def netem(link: Link, mtu: int) -> list[str]:
    """One direction of a link as ``tc`` takes it.

    netem holds what waits for the rate and what is being delayed in one queue, so its limit covers both.
    """
    limit = UNLIMITED_PACKETS
    settings = [("delay", f"{link.delay_ms}ms", f"{link.jitter_ms}ms"), ("loss", f"{link.loss * 100}%")]
    if link.rate_mbit is not None:
        settings.append(("rate", f"{link.rate_mbit}mbit"))
        limit = max(1, round((link.queue_ms + link.delay_ms) * link.rate_mbit * 125 / mtu))
    return words_of([*settings, ("limit", str(limit))])


class Netem:
    """Hosts and the router between them; the lab owns the namespaces and removes them.

    Packets are routed, not bridged, so a rule that drops silently cuts two hosts. Segments are kept apart (no offload), so that loss is of packets.
    """

    def __init__(self, addresses: Mapping[str, str], mtu: int) -> None:
        self._addresses, self._mtu, self._hub = dict(addresses), mtu, name_of(HUB)
        self._numbers = {host: number for number, host in enumerate(addresses)}
        self._rules: set[tuple[str, str]] = set()
        run("ip", "-n", self._hub, "link", "set", "lo", "up")
        with inside(self._hub):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for host, address in self._addresses.items():
            self._join(host, address)

    def _join(self, host: str, address: str) -> None:
        """A veth pair between a host and the router, with neighbours that need no asking: a lossy link loses questions, too."""
        number = self._numbers[host]
        ours, theirs = f"02:00:00:00:00:{number:02x}", f"02:00:00:00:01:{number:02x}"
        options = f"mtu {self._mtu} gso_max_segs 1 up"
        run("ip", "-n", self._hub, "link", "add", f"h{number}", "address", ours, "type", "veth",
            "peer", "name", DEVICE, "netns", name_of(host), "address", theirs)  # fmt: skip
        run("ip", "-n", self._hub, "-batch", "-", text=f"""link set h{number} {options}
            addr add {GATEWAY}/32 dev h{number}
            route add {address}/32 dev h{number}
            neigh add {address} lladdr {theirs} dev h{number}
        """)  # fmt: skip
        run("ip", "-n", name_of(host), "-batch", "-", text=f"""link set {DEVICE} {options}
            addr add {address}/32 dev {DEVICE}
            route add {GATEWAY}/32 dev {DEVICE}
            neigh add {GATEWAY} lladdr {ours} dev {DEVICE}
            route add 10.77.0.0/24 via {GATEWAY}
        """)  # fmt: skip

    def set(self, host: str, link: Link) -> None:
        """Shape both directions."""
        for name, device in self._ends(host):
            run("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *netem(link, self._mtu))

    def cut(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop what these pairs of hosts send each other, and nothing else."""
        wanted = {pair for a, b in pairs for pair in ((a, b), (b, a))}
        for verb, changed in (("add", wanted - self._rules), ("del", self._rules - wanted)):
            for a, b in sorted(changed):
                run("ip", "-n", self._hub, "rule", verb, "from", self._addresses[a], "to", self._addresses[b], "priority", "100", "blackhole")
        self._rules = wanted

    def counters(self, host: str) -> dict[str, int]:
        """As the devices count; what a cut has dropped is not among ``dropped_packets``."""
        (out, into) = (json.loads(run("ip", "-n", name, "-s", "-j", "link", "show", device))[0]["stats64"] for name, device in self._ends(host))
        queues = [json.loads(run("tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", device)) for name, device in self._ends(host)]
        return {
            "sent_packets": out["tx"]["packets"],
            "sent_bytes": out["tx"]["bytes"] - ETHERNET_BYTES * out["tx"]["packets"],
            "received_packets": into["tx"]["packets"],
            "received_bytes": into["tx"]["bytes"] - ETHERNET_BYTES * into["tx"]["packets"],
            "dropped_packets": sum(queue.get("drops", 0) for found in queues for queue in found),
        }

    def _ends(self, host: str) -> tuple[tuple[str, str], tuple[str, str]]:
        """Namespace and device of the host's end, then of the router's."""
        return (name_of(host), DEVICE), (self._hub, f"h{self._numbers[host]}")
