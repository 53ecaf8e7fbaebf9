"""Where a server listens, and where it tells others to find it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from servers.config import Transport
from swarmtune.errors import UsageError, WireError

PORT_TRIES = 16


def listen_addresses(ip: str, port: int, transport: Transport) -> list[str]:
    """The multiaddresses of one IP address and port, TCP first."""
    host = f"/{'ip6' if ':' in ip else 'ip4'}/{ip}"
    tcp, quic = f"{host}/tcp/{port}", f"{host}/udp/{port}/quic-v1"
    return {Transport.TCP: [tcp], Transport.QUIC: [quic], Transport.BOTH: [tcp, quic]}[transport]


def check_port(ip: str, port: int, transport: Transport) -> int:
    """Refuse an address that another program uses: libp2p would share its port, and callers would reach either.

    Returns:
        The port; where ``port`` is 0, one that is free now for every transport.

    Raises:
        UsageError: the port is in use, or the address is not of this machine.
    """
    for attempt in range(PORT_TRIES):
        found = port
        try:
            for kind in {Transport.TCP: ["tcp"], Transport.QUIC: ["udp"], Transport.BOTH: ["tcp", "udp"]}[transport]:
                found = _bind(ip, found, kind)
            return found
        except OSError as error:
            if port or attempt == PORT_TRIES - 1 or not found:
                raise UsageError(f"{ip} port {port} cannot be listened on ({error.strerror}): choose another listen= or port=") from error
    raise AssertionError("the last attempt returns or raises")


def _bind(ip: str, port: int, kind: str) -> int:
    """Bind and let go again; returns the port."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as probe:
        if kind == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server that has just ended is free
        if ":" in ip:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as the daemon does: IPv4's port is another one
        probe.bind((ip, port))
        return int(probe.getsockname()[1])


def announced_addresses(announce: Sequence[str], port: int, transport: Transport, peer_id: str) -> tuple[str, ...]:
    """``announce=`` as multiaddresses without the peer id; an IP address alone stands for this server's port and transports.

    Raises:
        UsageError: an item is neither, can be dialled by nobody, or names another peer.
    """
    from swarmtune.discovery.records import check_address, peer_of

    found: list[str] = []
    for item in announce:
        try:
            addresses = listen_addresses(str(ipaddress.ip_address(item)), port, transport)
        except ValueError:
            addresses = [item]
        for address in addresses:
            full = address if "/p2p/" in address else f"{address}/p2p/{peer_id}"
            try:
                check_address(full)
            except WireError as error:
                raise UsageError(f"announce must hold IP addresses or multiaddresses such as /ip4/ADDRESS/tcp/PORT, got {item!r:.120}") from error
            if peer_of(full) != peer_id:
                raise UsageError(f"announce names the peer {peer_of(full)}, this server is {peer_id}: leave /p2p/... out")
            host = full.split("/")[2]
            if host in ("0.0.0.0", "::"):
                raise UsageError(f"announce={item} can be dialled by nobody: give the address by which others reach this machine")
            found.append(full.removesuffix(f"/p2p/{peer_id}"))
    return tuple(dict.fromkeys(found))
