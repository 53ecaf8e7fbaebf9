"""A proxy of bytes inside one stream: it knows where in our frames it is, and cuts, damages or delays there.

It stands between the ``Connection`` and the reader and writer that a node opened. Bytes go through two pumps, so what was let through before a
cut arrives, and nothing after it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from swarmtune.transport.hivemind import HivemindNode
from swarmtune.wire.frames import PREFIX, FrameKind, Prefix
from swarmtune.wire.tensors import TensorSpec

Direction = Literal["up", "down"]
QUEUED_BYTES = 1 << 20


class Cut(Exception):
    """This stream ends here."""


@dataclass(frozen=True, slots=True)
class FrameFault:
    """What to do to one frame.

    Attributes:
        kind: ``cut``, ``stall``, ``trickle``, ``flip`` or ``drop``.
        offset: bytes of the frame, its prefix included, that come before it.
        seconds: of a stall.
    """

    kind: str
    offset: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that is about to pass.

    Attributes:
        at_boundary: whether it begins where a tensor ends and another one begins.
    """

    direction: Direction
    kind: FrameKind
    payload_bytes: int
    at_boundary: bool


Choose = Callable[[Frame], FrameFault | None]


class _Follower:
    """Knows, for the frames of one direction, which tensors of their messages have passed."""

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self._open: dict[int, tuple[set[int], int]] = {}

    def frame(self, prefix: Prefix) -> Frame:
        ends, received = self._open.get(prefix.request_id, (set[int](), 0))
        boundary = prefix.kind is FrameKind.DATA and received in ends
        return Frame(self._direction, prefix.kind, prefix.payload_bytes, boundary)

    def passed(self, prefix: Prefix, payload: bytes) -> None:
        if prefix.kind in (FrameKind.CALL, FrameKind.REPLY):
            specs = [TensorSpec.from_json(entry) for entry in json.loads(payload).get("tensors", [])]
            self._open[prefix.request_id] = (set(accumulate(spec.padded_bytes for spec in specs)), 0)
        elif prefix.kind is FrameKind.DATA:
            ends, received = self._open.get(prefix.request_id, (set[int](), 0))
            self._open[prefix.request_id] = (ends, received + len(payload))
        elif prefix.kind in (FrameKind.END, FrameKind.CANCEL):
            self._open.pop(prefix.request_id, None)


class ProxiedStream:
    """Stands in for the writer of a stream; ``reader`` for its reader."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, choose: Choose) -> None:
        self._inner_reader, self._inner_writer, self._choose = reader, writer, choose
        self.reader = asyncio.StreamReader()
        self._outgoing = asyncio.StreamReader()
        self._ended = asyncio.Event()
        self._closing = False
        self._waiting_bytes = 0
        self._tasks = [asyncio.create_task(self._pump_up()), asyncio.create_task(self._pump_down())]

    @property
    def transport(self) -> Any:
        """What a connection asks of a transport."""
        return self

    def set_write_buffer_limits(self, high: int) -> None:
        """Of the real one."""
        self._inner_writer.transport.set_write_buffer_limits(high=high)

    def abort(self) -> None:
        """End at once."""
        for task in self._tasks:
            task.cancel()
        self._inner_writer.transport.abort()

    def write(self, data: bytes | memoryview) -> None:
        """Queue for the pump."""
        if not self._closing and not self._ended.is_set():
            self._waiting_bytes += len(data)
            self._outgoing.feed_data(bytes(data))

    async def drain(self) -> None:
        """Wait until there is room, as a writer does."""
        while self._waiting_bytes > QUEUED_BYTES and not self._ended.is_set():
            await asyncio.sleep(0.001)
        if self._ended.is_set():
            raise ConnectionResetError("the stream was cut by the nemesis")

    def close(self) -> None:
        """What is queued still goes out."""
        if not self._closing:
            self._closing = True
            self._outgoing.feed_eof()

    async def wait_closed(self) -> None:
        """Until the real stream is closed."""
        await asyncio.wait(self._tasks)
        await self._inner_writer.wait_closed()

    async def _pump_up(self) -> None:
        try:
            await self._pump("up", self._outgoing, self._send)
        except (Cut, OSError):
            pass
        finally:
            self._ended.set()
            self._inner_writer.close()  # after what was let through

    async def _send(self, data: bytes) -> None:
        self._inner_writer.write(data)
        await self._inner_writer.drain()

    async def _pump_down(self) -> None:
        try:
            await self._pump("down", self._inner_reader, self._receive)
        except Cut:
            self._inner_writer.transport.abort()
        except OSError:
            pass
        finally:
            self._ended.set()
            self.reader.feed_eof()

    async def _receive(self, data: bytes) -> None:
        self.reader.feed_data(data)

    async def _pump(self, direction: Direction, source: asyncio.StreamReader, sink: Callable[[bytes], Any]) -> None:
        follower = _Follower(direction)
        while True:
            try:
                head = await source.readexactly(PREFIX.size)
                prefix = Prefix.unpack(head)
                payload = await source.readexactly(prefix.payload_bytes)
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    await sink(error.partial)
                return
            if direction == "up":
                self._waiting_bytes -= PREFIX.size + len(payload)
            fault = self._choose(follower.frame(prefix))
            follower.passed(prefix, payload)
            if fault is None:
                await sink(head + payload)
            else:
                await _suffer(fault, head + payload, sink)


async def _suffer(fault: FrameFault, frame: bytes, sink: Callable[[bytes], Any]) -> None:
    """Pass on what ``fault`` leaves of a frame.

    Raises:
        Cut: nothing comes after it.
    """
    before, after = frame[: fault.offset], frame[fault.offset :]
    match fault.kind:
        case "cut":
            await sink(before)
            raise Cut
        case "stall":
            await sink(before)
            await asyncio.sleep(fault.seconds)
            await sink(after)
        case "trickle":
            size = max(1, len(frame) // 50)
            for start in range(0, len(frame), size):
                await sink(frame[start : start + size])
                await asyncio.sleep(0.001)
        case "flip":
            await sink(before + bytes([after[0] ^ 4]) + after[1:])
        case "drop":
            pass


def attach(node: HivemindNode, choose: Choose) -> None:
    """From now on, streams of ``node`` go through a proxy; those that are open stay as they are."""
    open_stream = node._open_stream

    async def proxied(peer: str) -> tuple[asyncio.StreamReader, Any]:
        stream = ProxiedStream(*await open_stream(peer), choose)
        return stream.reader, stream

    node._open_stream = proxied  # type: ignore[method-assign]
