"""The signed, expiring record by which a server announces itself."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from swarmtune.discovery.identity import Identity, verify
from swarmtune.errors import WireError
from swarmtune.wire.frames import dump_json, parse_json
from swarmtune.wire.messages import ServerInfo

SIGNATURE_BYTES = 64
MAX_RECORD_BYTES = 1 << 16
LIFETIME_S = 30.0
RENEW_EVERY_S = 10.0
MAX_LIFETIME_S = 300.0
MAX_ADDRESSES = 16
CLOCK_SKEW_S = 30.0
_ADDRESS = re.compile(r"/(ip4|ip6|dns4|dns6|dns)/[A-Za-z0-9.:_-]{1,253}/(tcp|udp)/\d{1,5}(/quic-v1)?/p2p/[A-Za-z0-9]{20,64}", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def check_address(address: object) -> str:
    """A multiaddress that names a peer, such as ``/ip4/127.0.0.1/tcp/31337/p2p/12D3Koo...``.

    Raises:
        WireError: anything else.
    """
    if not isinstance(address, str) or not _is_address(address):
        raise WireError(f"a peer's address must look like /ip4/ADDRESS/tcp/PORT/p2p/PEER_ID, got {str(address)[:120]!r}")
    return address


def _is_address(text: str) -> bool:
    """Whether the whole is of the right form, and its host and port can exist."""
    if _ADDRESS.fullmatch(text) is None:
        return False
    kind, host, _, port = text.split("/")[1:5]
    try:
        if kind == "ip4":
            ipaddress.IPv4Address(host)
        elif kind == "ip6":
            ipaddress.IPv6Address(host)
        elif not all(map(_LABEL.fullmatch, host.removesuffix(".").split("."))):
            return False
    except ValueError:
        return False
    return 0 < int(port) < 1 << 16


def joinable(addresses: Sequence[str]) -> tuple[str, ...]:
    """Those of a node's own addresses that others can use: no loopback beside others, nothing that a record cannot hold, TCP first."""
    usable = sorted((address for address in addresses if _is_address(address)), key=lambda address: "/udp/" in address)
    beyond = [address for address in usable if not address.startswith(("/ip4/127.", "/ip6/::1/", "/ip6/fe80:"))]
    return tuple((beyond or usable)[:MAX_ADDRESSES])


def peer_of(address: str) -> str:
    """The peer id at the end of a multiaddress."""
    return address.rpartition("/p2p/")[2]


@dataclass(frozen=True, slots=True)
class Announcement:
    """Who serves what, where, until when.

    Attributes:
        addresses: where to dial; each ends with the peer id.
        expires_at: seconds since the epoch.
    """

    peer: str
    info: ServerInfo
    addresses: tuple[str, ...]
    expires_at: float

    def seal(self, identity: Identity) -> bytes:
        """The record as it is stored: signature, then canonical JSON."""
        payload = dump_json({"peer": self.peer, "info": self.info.to_json(), "addresses": list(self.addresses), "expires_at": self.expires_at})
        return identity.sign(payload) + payload

    @classmethod
    def open(cls, data: bytes, now: float | None = None) -> Announcement:
        """Check a stranger's record: size, signature by the peer that it names, lifetime, addresses of that peer.

        Raises:
            WireError: any of these fails.
        """
        if not SIGNATURE_BYTES < len(data) <= MAX_RECORD_BYTES:
            raise WireError("a record has the wrong size")
        signature, payload = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
        fields = parse_json(payload)
        peer, expires_at, addresses, info = (fields.get(key) for key in ("peer", "expires_at", "addresses", "info"))
        if not isinstance(peer, str) or not verify(peer, payload, signature):
            raise WireError("a record is not signed by the peer that it names")
        now = time.time() if now is None else now
        if not isinstance(expires_at, int | float) or not now - CLOCK_SKEW_S <= expires_at <= now + MAX_LIFETIME_S + CLOCK_SKEW_S:
            raise WireError("a record has expired, or would live too long")
        if not isinstance(addresses, list) or not 0 < len(addresses) <= MAX_ADDRESSES or not isinstance(info, dict):
            raise WireError("a record must hold addresses and a description")
        checked = tuple(check_address(address) for address in addresses)
        if any(peer_of(address) != peer for address in checked):
            raise WireError("a record gives addresses of another peer")
        return cls(peer, ServerInfo.from_json(info), checked, float(expires_at))
