"""Frames: how messages travel on one multiplexed stream. ``docs/protocol.md`` gives them byte by byte.

A message is a head frame (a JSON header that declares every tensor), data frames (slices of the body), and an end frame (the trailer:
body size and checksum). Without its trailer a message is a failure, never a short success.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from swarmtune.errors import WireError
from swarmtune.wire.tensors import TensorSpec, allocate

MAGIC = b"sw"
VERSION = 1
PREFIX = struct.Struct("<2sBBIQ")
TRAILER = struct.Struct("<QI")
CHUNK_BYTES = 1 << 18
MAX_PAYLOAD = 1 << 20
HEADER_WEIGHT = 32
"""What a parsed header holds in memory, at worst, per byte of its JSON: an empty object is three bytes there and eighty here."""
_ZEROS = bytes(64)


class FrameKind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    CALL = 2
    REPLY = 3
    DATA = 4
    END = 5
    CANCEL = 6
    PING = 7
    PONG = 8
    GOODBYE = 9


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Bounds that hold before anything is allocated."""

    header_bytes: int = MAX_PAYLOAD
    tensors: int = 8192
    message_bytes: int = 1 << 30
    open_bytes: int = 2 << 30
    open_messages: int = 64


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first 16 bytes of each frame."""

    kind: FrameKind
    payload_bytes: int
    request_id: int

    def pack(self) -> bytes:
        """The bytes: magic, version, kind, payload size, request id; little-endian."""
        return PREFIX.pack(MAGIC, VERSION, self.kind, self.payload_bytes, self.request_id)

    @classmethod
    def unpack(cls, data: bytes) -> Prefix:
        """Check 16 bytes from a peer.

        Raises:
            WireError: another protocol, version or kind, or a payload over the limit.
        """
        magic, version, kind, payload_bytes, request_id = PREFIX.unpack(data)
        if magic != MAGIC:
            raise WireError("the peer does not speak the swarmtune protocol (wrong magic)")
        if version != VERSION:
            raise WireError(f"the peer speaks frame version {version}, this side speaks {VERSION}: update the older of the two")
        if kind not in FrameKind._value2member_map_:
            raise WireError(f"unknown frame kind {kind}")
        if payload_bytes > MAX_PAYLOAD:
            raise WireError(f"a frame of {payload_bytes} bytes is over the limit of {MAX_PAYLOAD}")
        return cls(FrameKind(kind), payload_bytes, request_id)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A message ready to be sent: its JSON header, and its body as views that are not copied.

    Attributes:
        answer_bytes: for a call, the largest body that its answer may declare.
        in_order: it must not overtake larger messages that were begun before it.
    """

    header: bytes
    parts: tuple[memoryview, ...] = ()
    answer_bytes: int | None = None
    in_order: bool = False

    @property
    def body_bytes(self) -> int:
        """Size of the body, padding included."""
        return sum(len(part) for part in self.parts)

    def frames(self, kind: FrameKind, request_id: int) -> Iterator[tuple[bytes, memoryview]]:
        """Prefix and payload of each frame in order. Nothing is joined or copied here."""
        yield Prefix(kind, len(self.header), request_id).pack(), memoryview(self.header)
        checksum = zlib.crc32(self.header)
        for part in self.parts:
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                checksum = zlib.crc32(chunk, checksum)
                yield Prefix(FrameKind.DATA, len(chunk), request_id).pack(), chunk
        yield Prefix(FrameKind.END, TRAILER.size, request_id).pack(), memoryview(TRAILER.pack(self.body_bytes, checksum))


def padding(payload_bytes: int, padded_bytes: int) -> memoryview:
    """The zeros that follow a tensor up to its alignment."""
    return memoryview(_ZEROS)[: padded_bytes - payload_bytes]


def parse_json(data: bytes) -> dict[str, Any]:
    """Read a bounded JSON object from a peer.

    Raises:
        WireError: it is not UTF-8, not an object, nested too deeply, repeats a key or holds NaN or an infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise WireError("a header repeats a key")
        return found

    def refuse(constant: str) -> float:
        raise WireError(f"a header holds {constant}")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse("a number too large for a float")

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a header is not JSON: {type(error).__name__}") from error
    if not isinstance(parsed, dict):
        raise WireError("a header must be a JSON object")
    return parsed


def dump_json(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class BudgetFull(WireError):
    """There is no room for a message now; later there may be."""


@dataclass(slots=True)
class Budget:
    """Bytes that unfinished messages of one process may hold together."""

    limit_bytes: int
    used_bytes: int = 0
    by_peer: dict[str, int] = field(default_factory=dict)

    def reserve(self, size: int) -> None:
        """Take ``size`` bytes.

        Raises:
            BudgetFull: that would exceed the limit.
        """
        if self.used_bytes + size > self.limit_bytes:
            raise BudgetFull(f"a message of {size} bytes does not fit now: {self.used_bytes} of {self.limit_bytes} bytes are in use")
        self.used_bytes += size

    def release(self, size: int) -> None:
        """Give back what ``reserve`` took."""
        self.used_bytes -= size


@dataclass(frozen=True, slots=True)
class Share:
    """What one peer may take of a budget, on all its streams together: half of it, or one message where that is more."""

    budget: Budget
    peer: str

    def reserve(self, size: int) -> None:
        """Take ``size`` bytes.

        Raises:
            BudgetFull: that would exceed the peer's share, or the limit of all.
        """
        held = self.budget.by_peer.get(self.peer, 0)
        if held and held + size > self.budget.limit_bytes // 2:
            raise BudgetFull(f"a message of {size} bytes does not fit now: this peer holds {held} of at most {self.budget.limit_bytes // 2} bytes")
        self.budget.reserve(size)
        self.budget.by_peer[self.peer] = held + size

    def release(self, size: int) -> None:
        """Give back what ``reserve`` took."""
        self.budget.release(size)
        left = self.budget.by_peer.pop(self.peer) - size
        if left:
            self.budget.by_peer[self.peer] = left


@dataclass(slots=True)
class Incoming:
    """A message being received: checked head, then data, then the trailer.

    Attributes:
        held_bytes: what it took from the budget, for whoever drops it to give back.
        moved_at: instant of its last byte, on the clock of whoever feeds it.
    """

    kind: FrameKind
    request_id: int
    header: dict[str, Any]
    specs: tuple[TensorSpec, ...]
    body: memoryview
    held_bytes: int
    checksum: int
    received: int = 0
    moved_at: float = 0.0

    @classmethod
    def begin(cls, prefix: Prefix, payload: bytes, limits: WireLimits, budget: Budget | Share, at: float = 0.0) -> Incoming:
        """Check a head frame; only then reserve and allocate the body that it declares.

        Raises:
            WireError: a malformed header, or sizes over the limits.
        """
        if len(payload) > limits.header_bytes:
            raise WireError(f"a header of {len(payload)} bytes is over the limit of {limits.header_bytes}")
        header = parse_json(payload)
        entries = header.pop("tensors", [])
        if not isinstance(entries, list) or len(entries) > limits.tensors:
            raise WireError(f"a header must list at most {limits.tensors} tensors")
        specs = tuple(TensorSpec.from_json(entry) for entry in entries)
        if len({spec.name for spec in specs}) != len(specs):
            raise WireError("a header names a tensor twice")
        size = sum(spec.padded_bytes for spec in specs)
        if size > limits.message_bytes:
            raise WireError(f"a message of {size} bytes is over the limit of {limits.message_bytes}")
        held_bytes = size + HEADER_WEIGHT * len(payload)
        budget.reserve(held_bytes)
        try:
            body = allocate(size)
        except WireError:
            budget.release(held_bytes)
            raise
        return cls(prefix.kind, prefix.request_id, header, specs, body, held_bytes, zlib.crc32(payload), moved_at=at)

    def data(self, payload: bytes, at: float = 0.0) -> None:
        """Append one data frame.

        Raises:
            WireError: more data than the header declared.
        """
        end = self.received + len(payload)
        if end > len(self.body):
            raise WireError(f"a message carries more than the {len(self.body)} bytes that it declared")
        if not payload:
            raise WireError("a data frame carries nothing")
        self.body[self.received : end] = payload
        self.received, self.moved_at = end, at
        self.checksum = zlib.crc32(payload, self.checksum)

    def end(self, payload: bytes) -> None:
        """Check the trailer.

        Raises:
            WireError: data are missing or the checksum differs.
        """
        if len(payload) != TRAILER.size:
            raise WireError("a trailer has the wrong size")
        size, checksum = TRAILER.unpack(payload)
        if size != len(self.body) or self.received != size:
            raise WireError(f"a message was cut: {self.received} of {len(self.body)} bytes arrived")
        if checksum != self.checksum:
            raise WireError("a message was damaged on the way (checksum)")
