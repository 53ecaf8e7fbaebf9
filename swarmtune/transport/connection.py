"""One stream between two peers: a handshake, then many messages multiplexed by request id.

The same class serves both ends. A silent peer is found by pings, a dead one by the end of the stream; either fails every open request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from swarmtune.errors import WireError
from swarmtune.transport.base import Handler, Traffic, TransportError
from swarmtune.transport.clock import now
from swarmtune.wire.codec import encode
from swarmtune.wire.frames import PREFIX, Budget, BudgetFull, Encoded, FrameKind, Incoming, Prefix, Share, WireLimits, dump_json, parse_json
from swarmtune.wire.messages import Fault, FaultCode

logger = logging.getLogger(__name__)

PROTOCOL_VERSIONS = (1,)
FEATURES: tuple[str, ...] = ()
"""What a side may do on a stream only when the other has named it too. Call kinds and fields are none of these: a server answers one that it does not
know with a fault, and another server of the swarm may know it."""
HANDSHAKE_TIMEOUT_S = 10.0
PING_EVERY_S = 1.0
PONG_EVERY_S = 1.0
SILENCE_S = 8.0
STALL_S = 60.0
"""How long a message under way may stand still, in either direction."""
FLUSH_S = 2.0
MAX_CONTROL = 1024
NO_ROOM_RETRY_MS = 500
"""When to ask again whoever had no room for a message: nobody knows how fast the messages under way come in."""
UNKNOWN, ARRIVING, ANSWERING = 0, 1, 2
"""What a PONG says of the call that its PING asked about: not here, still coming in, being answered."""
WRITE_BUFFER_BYTES = 1 << 20
JOIN_BYTES = 1 << 16


def agree(hello: dict[str, Any]) -> tuple[int, frozenset[str]]:
    """The protocol version and the features to use with a peer that sent ``hello``; unknown features are ignored.

    Raises:
        WireError: no common version.
    """
    versions, features = hello.get("versions"), hello.get("features", [])
    if not isinstance(versions, list) or not isinstance(features, list) or len(features) > 64:
        raise WireError("a hello must list protocol versions and features")
    common = [version for version in PROTOCOL_VERSIONS if version in versions]
    if not common:
        theirs = ", ".join(f"{version!r:.20}" for version in versions[:8])
        raise WireError(f"the peer speaks protocol versions [{theirs}], this side speaks {list(PROTOCOL_VERSIONS)}: update the older of the two")
    return max(common), frozenset(FEATURES) & {feature for feature in features if isinstance(feature, str)}


class Connection:
    """Requests and answers over one reader and writer.

    Attributes:
        peer: who is at the other end.
        version: of the protocol, agreed with the peer; 0 before the handshake.
        features: which both sides have named.
        closed: set when the stream has ended.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        peer: str,
        handler: Handler | None = None,
        limits: WireLimits | None = None,
        budget: Budget | Share | None = None,
        traffic: Traffic | None = None,
        on_closed: Callable[[], None] | None = None,
    ) -> None:
        self.peer, self._on_closed = peer, on_closed
        self._reader, self._writer, self._handler = reader, writer, handler
        self._limits = limits or WireLimits()
        self._budget = budget or Budget(self._limits.open_bytes)
        self._traffic = traffic or Traffic()
        self._write_lock, self._bulk_lock = asyncio.Lock(), asyncio.Lock()
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[Incoming]] = {}
        self._allowed: dict[int, int] = {}
        self._sent: set[int] = set()
        self._partial: dict[int, Incoming] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._control: dict[tuple[FrameKind, int], None] = {}
        self._flushing, self._asked_about = False, 0
        self._slots = asyncio.Semaphore(max(1, self._limits.open_messages // 2))  # the peer has no more than twice as many
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_at = self._said_at = self._pinged_at = now()
        self._dropping: set[int] = set()
        self._refusing: set[asyncio.Task[None]] = set()
        self._failure: TransportError | None = None
        self.version, self.features = 0, frozenset[str]()
        self.closed = asyncio.Event()

    @property
    def idle_since(self) -> float | None:
        """Monotonic instant of the last frame; ``None`` while something is under way."""
        return None if self._partial or self._answering or self._waiting else self._heard_at

    @property
    def silent_s(self) -> float:
        """Seconds since the last frame came in."""
        return now() - self._heard_at

    @property
    def answering(self) -> bool:
        """Whether an answer is being computed or is still on its way."""
        return bool(self._answering)

    async def open(self) -> Connection:
        """Shake hands, then start to read.

        Raises:
            TransportError: the peer is silent, gone, or speaks no common version.
        """
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                self._writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
                hello = dump_json({"versions": list(PROTOCOL_VERSIONS), "features": list(FEATURES)})
                await self._send_frame(FrameKind.HELLO, hello)
                prefix, payload = await self._read_frame()
                if prefix.kind is FrameKind.GOODBYE:
                    raise WireError(f"the peer refused: {_printable(payload)}")
                if prefix.kind is not FrameKind.HELLO:
                    raise WireError("the peer did not begin with a hello")
                self.version, self.features = agree(parse_json(payload))
        except (WireError, OSError, EOFError) as error:
            detail = "it ended the stream" if isinstance(error, EOFError) else str(error) or "no handshake in time"
            if isinstance(error, WireError):
                await self._goodbye(detail)
            failure = TransportError(f"no connection to peer {self.peer}: {detail}")
            self._fail(failure)
            raise failure from error
        except asyncio.CancelledError:
            self._fail(TransportError(f"the connection to peer {self.peer} was given up"))
            raise
        self._start(self._read_loop())
        self._start(self._watch_loop())
        return self

    async def request(self, request: Encoded, timeout_s: float) -> Incoming:
        """Send ``request`` and wait for its whole answer.

        Raises:
            TransportError: the stream ended, the peer went silent, or ``timeout_s`` passed.
        """
        if self._failure is not None:
            raise TransportError(str(self._failure))
        request_id, self._next_id = self._next_id, self._next_id + 1
        future: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        self._allowed[request_id] = self._limits.message_bytes if request.answer_bytes is None else request.answer_bytes
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                sending = asyncio.ensure_future(self._send_message(FrameKind.CALL, request_id, request))
                try:
                    await asyncio.wait((sending, future), return_when=asyncio.FIRST_COMPLETED)
                    if not future.done():
                        await sending
                        self._sent.add(request_id)
                    return await future
                finally:
                    cut = sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
                    if cut:  # answered before it was sent whole: the peer must not wait for the rest
                        self._post(FrameKind.CANCEL, request_id)
        except TimeoutError as error:
            self._post(FrameKind.CANCEL, request_id)
            raise TransportError(f"peer {self.peer} did not answer within {timeout_s:.1f} s") from error
        except asyncio.CancelledError:
            self._post(FrameKind.CANCEL, request_id)
            raise
        except OSError as error:
            raise TransportError(f"the connection to peer {self.peer} broke: {error}") from error
        finally:
            del self._waiting[request_id], self._allowed[request_id]
            self._sent.discard(request_id)
            if future.done() and not future.cancelled():
                future.exception()  # it may have failed in the moment in which the caller gave up

    def abort(self, reason: str) -> None:
        """End the stream at once; every open request fails with ``reason``."""
        self._fail(TransportError(f"the connection to peer {self.peer} ended: {reason}"))

    async def close(self) -> None:
        """Stop reading, cancel what is being answered, close the stream."""
        self._fail(TransportError(f"the connection to peer {self.peer} was closed"))
        current = asyncio.current_task()
        tasks = [task for task in (*self._tasks, *self._answering.values()) if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_writer(self._writer)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _fail(self, failure: TransportError) -> None:
        """End the stream and all its tasks, once; every open request fails with ``failure``."""
        if self._failure is not None:
            return
        self._failure = failure
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(TransportError(str(failure)))
        for partial in self._partial.values():
            self._budget.release(partial.held_bytes)
        self._partial.clear()
        current = asyncio.current_task()
        for task in (*self._tasks, *self._answering.values()):
            if task is not current:
                task.cancel()
        self._writer.close()
        # To close waits until the peer has taken what is buffered, which a silent one never does.
        asyncio.get_running_loop().call_later(FLUSH_S, self._writer.transport.abort)
        self.closed.set()
        if self._on_closed is not None:
            self._on_closed()

    async def _read_frame(self) -> tuple[Prefix, bytes]:
        prefix = Prefix.unpack(await self._reader.readexactly(PREFIX.size))
        payload = await self._reader.readexactly(prefix.payload_bytes) if prefix.payload_bytes else b""
        self._traffic.bytes_down += PREFIX.size + len(payload)
        self._heard_at = now()
        return prefix, payload

    async def _read_loop(self) -> None:
        try:
            while self._failure is None:
                self._dispatch(*await self._read_frame())
        except WireError as error:
            logger.warning("peer %s: %s", self.peer, error)
            await self._goodbye(str(error))
            self._fail(TransportError(f"peer {self.peer} broke the protocol: {error}"))
        except (OSError, EOFError) as error:
            reason = str(error) if isinstance(error, OSError) and str(error) else "the stream was cut"
            self._fail(TransportError(f"the connection to peer {self.peer} ended: {reason}"))
        finally:
            self._fail(TransportError(f"the connection to peer {self.peer} ended: nobody reads it any more"))

    def _dispatch(self, prefix: Prefix, payload: bytes) -> None:
        match prefix.kind:
            case FrameKind.CALL | FrameKind.REPLY:
                self._begin(prefix, payload)
            case FrameKind.DATA:
                if now() - self._said_at > PONG_EVERY_S:
                    self._post(FrameKind.PONG)  # a slow sender must know that its data arrive
                if prefix.request_id not in self._dropping:
                    self._expect(prefix).data(payload, now())
            case FrameKind.END if prefix.request_id in self._dropping:
                self._dropping.discard(prefix.request_id)
            case FrameKind.END:
                incoming = self._expect(prefix)
                incoming.end(payload)
                del self._partial[prefix.request_id]
                self._finish(incoming)
            case FrameKind.CANCEL:
                self._abandon(prefix.request_id)
            case FrameKind.PING:
                self._asked_about = prefix.request_id
                self._post(FrameKind.PONG)
            case FrameKind.GOODBYE:
                raise ConnectionError(f"it said: {_printable(payload)}")
            case FrameKind.HELLO:
                raise WireError("a second hello")
            case FrameKind.PONG if payload[:1] == bytes([UNKNOWN]):
                self._lost(prefix.request_id)
            case FrameKind.PONG:
                pass

    def _lost(self, request_id: int) -> None:
        """The peer has no such call and sends no answer: what it had written before it said so has been read here before."""
        future = self._waiting.get(request_id)
        if request_id in self._sent and request_id not in self._partial and future is not None and not future.done():
            future.set_exception(TransportError(f"peer {self.peer} does not know of the call any more"))

    def _state(self, request_id: int) -> bytes:
        """What a PONG says of a call: one byte; nothing where the PING asked about none."""
        if not request_id:
            return b""
        arriving = request_id in self._partial or request_id in self._dropping or bool(self._refusing)
        return bytes([ANSWERING if request_id in self._answering else ARRIVING if arriving else UNKNOWN])

    def _begin(self, prefix: Prefix, payload: bytes) -> None:
        if prefix.request_id in self._partial or len(self._partial) >= self._limits.open_messages:
            raise WireError("too many unfinished messages, or one begun twice")
        if prefix.kind is FrameKind.CALL:
            if self._handler is None:
                raise WireError("this side takes no calls")
            if prefix.request_id in self._answering or len(self._answering) >= self._limits.open_messages:
                raise WireError(f"a request id in use, or more than {self._limits.open_messages} open calls")
        elif prefix.request_id >= self._next_id:
            raise WireError("an answer to a call that was never made")
        elif prefix.request_id not in self._waiting:  # a call that was given up
            if len(self._dropping) >= self._limits.open_messages:
                raise WireError("too many answers that nobody waits for")
            self._dropping.add(prefix.request_id)
            return
        limits = self._limits
        if prefix.kind is FrameKind.REPLY:
            limits = replace(limits, message_bytes=self._allowed[prefix.request_id])
        try:
            self._partial[prefix.request_id] = Incoming.begin(prefix, payload, limits, self._budget, now())
        except BudgetFull as error:
            self._drop(prefix, error)

    def _drop(self, prefix: Prefix, error: BudgetFull) -> None:
        """There is no room for this message now: its data are thrown away as they come; the stream and the other messages go on."""
        if (
            len(self._dropping) >= self._limits.open_messages
            or len(self._refusing) >= self._limits.open_messages
            or prefix.request_id in self._dropping
        ):
            raise WireError("too many messages begun while there is no room for them") from error
        self._dropping.add(prefix.request_id)
        if prefix.kind is FrameKind.CALL:
            task = self._start(self._refuse(prefix.request_id, encode(Fault(FaultCode.BUSY, str(error), retry_ms=NO_ROOM_RETRY_MS).to_message())))
            self._refusing.add(task)
            task.add_done_callback(self._refusing.discard)
            return
        future = self._waiting.get(prefix.request_id)
        if future is not None and not future.done():
            future.set_exception(TransportError(f"the answer of peer {self.peer} does not fit here now: {error}"))

    async def _refuse(self, request_id: int, answer: Encoded) -> None:
        try:
            await self._send_message(FrameKind.REPLY, request_id, answer)
        except OSError as error:
            self._fail(TransportError(f"the connection to peer {self.peer} broke: {error}"))

    def _abandon(self, request_id: int) -> None:
        """The peer gave up a message: ours that it awaited, or its own that it began."""
        self._dropping.discard(request_id)
        if partial := self._partial.pop(request_id, None):
            self._budget.release(partial.held_bytes)
        if task := self._answering.pop(request_id, None):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.cancel()
        future = self._waiting.get(request_id)
        if future is not None and not future.done():
            future.set_exception(TransportError(f"peer {self.peer} gave up its answer"))

    def _expect(self, prefix: Prefix) -> Incoming:
        incoming = self._partial.get(prefix.request_id)
        if incoming is None:
            raise WireError("data that belong to no message")
        return incoming

    def _finish(self, incoming: Incoming) -> None:
        if incoming.kind is FrameKind.CALL:
            task = asyncio.create_task(self._answer(incoming))
            self._answering[incoming.request_id] = task
            task.add_done_callback(lambda task: self._answered(incoming, task))
            return
        self._budget.release(incoming.held_bytes)
        future = self._waiting.get(incoming.request_id)
        if future is not None and not future.done():
            future.set_result(incoming)

    async def _answer(self, incoming: Incoming) -> None:
        assert self._handler is not None
        reply = await self._handler(self.peer, incoming)
        try:
            await self._send_message(FrameKind.REPLY, incoming.request_id, reply)
        except OSError as error:
            self._fail(TransportError(f"the connection to peer {self.peer} broke: {error}"))
        except asyncio.CancelledError:
            self._post(FrameKind.CANCEL, incoming.request_id)  # it may hold a part of the answer
            raise

    def _answered(self, incoming: Incoming, task: asyncio.Task[None]) -> None:
        """Clean up after an answer; a callback, because a task that is cancelled before its first step runs no line of its own."""
        self._budget.release(incoming.held_bytes)
        if self._answering.get(incoming.request_id) is task:
            del self._answering[incoming.request_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a call of peer %s ended without an answer", self.peer, exc_info=error)
            self._fail(TransportError(f"the connection to peer {self.peer} ended: a call could not be answered"))

    async def _send_message(self, kind: FrameKind, request_id: int, message: Encoded) -> None:
        """Write large messages one after the other, so that the first is whole as soon as it can be; small ones that may go between."""
        if message.body_bytes <= JOIN_BYTES and not message.in_order:
            joined = b"".join(part for frame in message.frames(kind, request_id) for part in frame)
            async with self._write_lock:
                await self._write(joined)
            return
        async with self._bulk_lock:
            for prefix, payload in message.frames(kind, request_id):
                async with self._write_lock:
                    await self._write(prefix, payload)

    async def _send_frame(self, kind: FrameKind, payload: bytes = b"", request_id: int = 0) -> None:
        async with self._write_lock:
            await self._write(Prefix(kind, len(payload), request_id).pack() + payload)

    async def _write(self, *parts: bytes | memoryview) -> None:
        if self._failure is not None:
            raise ConnectionError(str(self._failure))
        for part in parts:
            self._writer.write(part)
            self._traffic.bytes_up += len(part)
        self._said_at = now()
        try:
            async with asyncio.timeout(STALL_S):
                await self._writer.drain()
        except TimeoutError as error:
            self._fail(TransportError(f"peer {self.peer} has taken no data for {STALL_S:.0f} s"))
            raise ConnectionError(str(self._failure)) from error

    def _post(self, kind: FrameKind, request_id: int = 0) -> None:
        """Send a frame without payload as soon as possible. Each waits at most once, so that a peer cannot pile them up here."""
        if self._failure is not None:
            return
        self._control[kind, request_id] = None
        if len(self._control) > MAX_CONTROL:
            self._fail(TransportError(f"peer {self.peer} sends much and takes nothing"))
        elif not self._flushing:
            self._flushing = True
            self._start(self._flush_control())

    async def _flush_control(self) -> None:
        try:
            while self._control:
                kind, request_id = next(iter(self._control))
                del self._control[kind, request_id]
                if kind is FrameKind.PONG:  # of several questions that have come in meanwhile, the last is answered
                    request_id, self._asked_about = self._asked_about, 0
                    await self._send_frame(kind, self._state(request_id), request_id)
                else:
                    await self._send_frame(kind, b"", request_id)
        except OSError as error:
            self._fail(TransportError(f"the connection to peer {self.peer} broke: {error}"))
        finally:
            self._flushing = False

    async def _goodbye(self, detail: str) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._send_frame(FrameKind.GOODBYE, detail.encode("utf-8", "replace")[:1000])
        except (OSError, TimeoutError) as error:
            logger.debug("no goodbye to %s: %s", self.peer, error)

    async def _watch_loop(self) -> None:
        """While an answer is awaited, make sure that the peer's process is alive; while a message comes in, that it goes on."""
        while self._failure is None:
            await asyncio.sleep(PING_EVERY_S)
            at = now()
            if any(at - partial.moved_at > STALL_S for partial in self._partial.values()):
                self._fail(TransportError(f"peer {self.peer} stopped in the middle of a message"))
            elif self._waiting:
                await self._ping()

    async def _ping(self) -> None:
        """Ask for a sign of life. The silence counts from the first ping that nobody has answered, also over calls that end sooner."""
        if self._heard_at >= self._pinged_at:
            self._pinged_at = now()
        asked_at = self._pinged_at
        self._post(FrameKind.PING, min(self._sent, default=0))
        while self._waiting and self._heard_at < asked_at:
            if now() - asked_at > SILENCE_S:
                self._fail(TransportError(f"peer {self.peer} has been silent for {SILENCE_S:.0f} s"))
                return
            await asyncio.sleep(0.1)


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Close a stream and wait until its socket is gone; what could not be sent by then is dropped."""
    writer.close()
    try:
        async with asyncio.timeout(FLUSH_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


def _printable(payload: bytes) -> str:
    return "".join(character if character.isprintable() else " " for character in payload.decode("utf-8", "replace"))[:1000]
