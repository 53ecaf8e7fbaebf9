"""One call to one server: what it is sent, how long it may take, what it answers, and what is remembered of it. Nothing is tried again here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from swarmtune.errors import (
    GraphLost,
    KwargError,
    NonFinite,
    PeerBusy,
    PeerCutOff,
    PeerDraining,
    PeerFault,
    PeerSlow,
    TensorsLost,
    WireError,
)
from swarmtune.remote.batch import KeptGraph
from swarmtune.remote.deadlines import CallTimes
from swarmtune.remote.events import EventKind, EventLog
from swarmtune.remote.ledger import Page, Way
from swarmtune.remote.route import Directory, Hop
from swarmtune.remote.totals import ChainCounters, ServerTotals, label_of
from swarmtune.remote.uploads import Uploads, without_digests
from swarmtune.transport.base import NodeLost, Transport, TransportError
from swarmtune.transport.clock import now
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Incoming
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import (
    DETERMINISTIC,
    KEEPS_GRAPHS,
    MAX_RELEASED,
    STORES_TENSORS,
    Fault,
    FaultCode,
    SpanCall,
    SpanResult,
)

logger = logging.getLogger(__name__)
RETRY_BUSY_S = 1.0
"""When to ask a busy server again that does not say when."""
RECHECK_S = 1.0
"""How often a call that is slow looks for another server."""


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a call is for.

    Attributes:
        page: of the ledger.
        micro: number of the micro-batch.
        tokens: of it.
        way: forward or backward.
        replay: its result is not counted.
        allowance: how many times as long as usual it may take.
    """

    page: Page
    micro: int
    tokens: int
    way: Way
    replay: bool = False
    allowance: float = 1.0


class Caller:
    """Asks servers, and keeps the books of it. Methods run on the loop thread.

    Attributes:
        running: by first block, who was asked last.
    """

    def __init__(self, transport: Transport, directory: Directory, call_timeout_s: float) -> None:
        self._transport, self._directory, self._call_timeout_s = transport, directory, call_timeout_s
        self.counters, self.events = ChainCounters(), EventLog()
        self.running: dict[int, Hop] = {}
        self._times = CallTimes()
        self._uploads = Uploads()
        self._released: dict[tuple[str, int], list[int]] = {}

    def is_open(self, kept: KeptGraph) -> bool:
        """Whether the connection over which a graph was kept is still the one."""
        return self._transport.generation(kept.peer) == kept.generation

    async def call(self, hop: Hop, call: SpanCall, purpose: Purpose, kept: KeptGraph | None = None) -> SpanResult:
        """One forward or backward on one server; a backward through the graph that it keeps, where it does.

        Raises:
            PeerFault: it failed in a way that another server may not.
        """
        began, tokens, within_s = now(), purpose.tokens, self._call_timeout_s
        self.totals(hop.peer)  # from here on it has a label
        self._notice_move(hop)
        usual_s = self._times.limit_s(purpose.way, hop.span, tokens)
        limit_s = None if usual_s is None else min(within_s, usual_s * purpose.allowance)
        number = purpose.page.ask(purpose.micro, purpose.way, hop.span, hop.peer, within_s, purpose.replay)
        try:
            self._check_same(hop)
            message = self._message(hop, call, kept)
            reply, answer = await self.exchange(hop, message, call.answer_bytes, limit_s)
            self._check_same(hop)
            result = _result(reply, call, hop)
        except BaseException as error:
            purpose.page.fail(number, f"{type(error).__name__}: {error}")
            self._uploads.failed(hop.peer, call)
            if isinstance(error, TensorsLost):
                self._uploads.missed(hop.peer)
            if isinstance(error, PeerFault):
                self._count(error, hop, now() - began)
            if isinstance(error, PeerSlow):
                self._times.add(purpose.way, hop.span, tokens, now() - began)
                self._directory.slow(hop, now() - began, tokens)
            raise
        purpose.page.accept(number, purpose.micro, hop.span, purpose.replay)
        seconds = now() - began
        self.totals(hop.peer).add(seconds, result.times, answer)
        self._times.add(purpose.way, hop.span, tokens, seconds)
        self._directory.succeeded(hop, seconds, tokens)
        return result

    def _message(self, hop: Hop, call: SpanCall, kept: KeptGraph | None) -> Message:
        remaining_ms = self.remaining_ms()
        if kept is not None:
            assert call.grad_BTH is not None, "only a backward uses a kept graph"
            return KeptCall(call.span, call.model, kept.handle, call.grad_BTH, call.input_grad, remaining_ms, call.sum).to_message()
        generation = self._transport.generation(hop.peer)
        stores = self._directory.has(hop.peer, STORES_TENSORS)
        call = self._uploads.by_reference(hop.peer, generation, call) if stores else without_digests(call)
        if call.keep and self._directory.has(hop.peer, KEEPS_GRAPHS):
            released = self._released.pop((hop.peer, generation), [])
            return replace(call, remaining_ms=remaining_ms, release=tuple(released[-MAX_RELEASED:])).to_message()
        return replace(call, remaining_ms=remaining_ms, keep=False).to_message()

    def release(self, kept: Iterable[KeptGraph]) -> None:
        """Graphs that nobody will go back through: their servers are told with the next forward; what they are not told, they forget in time."""
        for graph in kept:
            if self.is_open(graph):
                self._released.setdefault((graph.peer, graph.generation), []).append(graph.handle)
        for peer, generation in [key for key in self._released if self._transport.generation(key[0]) != key[1]]:
            del self._released[peer, generation]

    def _check_same(self, hop: Hop) -> None:
        """A connection that was opened since its server described itself may lead to another process, with other weights.

        Raises:
            PeerCutOff: it has to describe itself again.
        """
        if not self._directory.same(hop.peer):
            self._directory.doubt(hop.peer)
            raise PeerCutOff(hop.peer, hop.span, "the connection to it is a new one, so it has to describe itself again")

    def _count(self, fault: PeerFault, hop: Hop, lost_s: float) -> None:
        kinds: dict[type, EventKind] = {
            PeerBusy: EventKind.BUSY,
            PeerDraining: EventKind.DRAINED,
            PeerSlow: EventKind.SLOW,
            PeerCutOff: EventKind.CUT_OFF,
            GraphLost: EventKind.RECOMPUTED,
            TensorsLost: EventKind.RESENT,
        }
        kind = kinds.get(type(fault), EventKind.FAILED)
        server = "" if kind is EventKind.CUT_OFF else self.label(hop.peer)
        if server:
            self.totals(hop.peer).lost_s += lost_s
        self.events.add(kind, str(fault), server=server, span=hop.span, lost_s=lost_s, at=now())

    def _notice_move(self, hop: Hop) -> None:
        """Say when calls leave a server that could be asked, because another one is faster."""
        before = self.running.get(hop.span.start)
        if before == hop:
            return
        for start in [start for start, old in self.running.items() if old.span.overlap(hop.span)]:
            del self.running[start]
        self.running[hop.span.start] = hop
        if before is not None and (times := self._directory.times_slower(before.peer, hop.peer)) is not None:
            detail = f"blocks {hop.span} go to {self.label(hop.peer)} from now on: {self.label(before.peer)} takes {times:.1f} times as long"
            self.events.add(EventKind.MOVED, detail, server=self.label(before.peer), span=hop.span, at=now())
            logger.info("%s", detail)

    def remaining_ms(self) -> int:
        """How long a call that begins now may take."""
        return max(1, int(self._call_timeout_s * 1000))

    async def exchange(self, hop: Hop, message: Message, answer_bytes: int, limit_s: float | None) -> tuple[Message, Incoming]:
        """One message to one server, and its answer, which is no fault.

        Args:
            hop: the server, and the blocks.
            message: what to ask.
            answer_bytes: the largest body that the answer may have.
            limit_s: after which another server is asked, where there is one.

        Raises:
            PeerFault: it failed in a way that another server may not.
        """
        self.counters.calls += 1
        totals = self.totals(hop.peer)
        totals.calls += 1
        request = encode(message, answer_bytes=answer_bytes)
        totals.bytes_up += len(request.header) + request.body_bytes
        self.counters.carried("up", message.kind, message)
        try:
            async with asyncio.timeout(None) as scope:
                watch = _SlowWatch(scope, self._directory, hop, limit_s)
                try:
                    answer = await self._transport.call(hop.peer, request, self._call_timeout_s)
                finally:
                    watch.stop()
            reply = decode(answer)
            self.counters.carried("down", message.kind, reply)
            if reply.kind == "fault":
                raise _as_error(hop, Fault.from_message(reply))
        except TimeoutError as error:
            raise PeerSlow(hop.peer, hop.span, f"no answer within {watch.after_s:.1f} s, which is long for such a call") from error
        except NodeLost as error:
            raise PeerCutOff(hop.peer, hop.span, str(error)) from error
        except TransportError as error:
            raise PeerFault(hop.peer, hop.span, str(error)) from error
        except WireError as error:
            raise PeerFault(hop.peer, hop.span, f"its answer is malformed: {error}") from error
        return reply, answer

    def totals(self, peer: str) -> ServerTotals:
        """The books of one server."""
        totals = self.counters.servers.get(peer)
        if totals is None:
            info = self._directory.known[peer].info
            taken = {server.label for server in self.counters.servers.values()}
            totals = self.counters.servers[peer] = ServerTotals(label_of(peer, info, taken), info.span)
        return totals

    def label(self, peer: str) -> str:
        """What people call it."""
        totals = self.counters.servers.get(peer)
        return totals.label if totals is not None else peer[-6:]


class _SlowWatch:
    """Ends a call that takes longer than its like, as soon as another server can do it; where none can, it goes on."""

    def __init__(self, scope: asyncio.Timeout, directory: Directory, hop: Hop, limit_s: float | None) -> None:
        self._scope, self._directory, self._hop = scope, directory, hop
        self._loop, self._began = asyncio.get_running_loop(), now()
        self._handle = None if limit_s is None else self._loop.call_later(limit_s, self._look)
        self.after_s = 0.0

    def _look(self) -> None:
        if not self._directory.blind and self._directory.others_can(self._hop):
            self.after_s = self._loop.time() - self._began
            self._scope.reschedule(self._loop.time())
        else:
            self._handle = self._loop.call_later(RECHECK_S, self._look)

    def stop(self) -> None:
        """The call is over."""
        if self._handle is not None:
            self._handle.cancel()


def _result(reply: Message, call: SpanCall, hop: Hop) -> SpanResult:
    try:
        return SpanResult.from_message(reply, call)
    except WireError as error:
        raise PeerFault(hop.peer, hop.span, f"its answer is malformed: {error}") from error


def _as_error(hop: Hop, fault: Fault) -> PeerFault | NonFinite | KwargError:
    if fault.code is FaultCode.NON_FINITE:
        return NonFinite(f"{fault.detail} (said by peer {hop.peer} for blocks {hop.span})", fault.block)
    if fault.code in DETERMINISTIC:
        return KwargError(f"peer {hop.peer} refused blocks {hop.span}: {fault.detail}")
    detail = f"{fault.code}: {fault.detail}"
    if fault.code is FaultCode.NO_GRAPH:
        return GraphLost(hop.peer, hop.span, fault.detail)
    if fault.code is FaultCode.NO_TENSORS:
        return TensorsLost(hop.peer, hop.span, fault.detail)
    if fault.code is FaultCode.BUSY:
        return PeerBusy(hop.peer, hop.span, detail, RETRY_BUSY_S if fault.retry_ms is None else fault.retry_ms / 1000)
    return PeerDraining(hop.peer, hop.span, detail) if fault.code is FaultCode.DRAINING else PeerFault(hop.peer, hop.span, detail)
