"""One call to one server: what it is sent, how long it may take, what it answers, and what is remembered of it. Nothing is tried again here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
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
    UsageError,
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
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.compression import Codec, expanded, feature, squeezed
from swarmtune.wire.frames import Incoming
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import (
    COMPILES,
    DETERMINISTIC,
    KEEPS_GRAPHS,
    MAX_RELEASED,
    STORES_TENSORS,
    Fault,
    FaultCode,
    ServerTimes,
    SpanCall,
    SpanResult,
)
from swarmtune.wire.relay import COPIES, Delivery, Receive, Relay, Send, new_token, with_relay
from swarmtune.wire.tensors import ALIGNMENT

logger = logging.getLogger(__name__)
RETRY_BUSY_S = 1.0
"""When to ask a busy server again that does not say when."""
SILENT_S = 1.2
"""A server that has a call and has not been heard for so long is behind with its answer to a ping."""
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
        lane: of the micro-batch.
        copies: of a chain, for each server, whether what it hands on comes here, too, where a backward of the next may need it.
    """

    page: Page
    micro: int
    tokens: int
    way: Way
    replay: bool = False
    allowance: float = 1.0
    lane: int = 0
    copies: Sequence[bool] = ()

    @property
    def kind(self) -> str:
        """Calls that take about the same time: copies have to be fetched, too."""
        return "forward with copies" if any(self.copies) else self.way


@dataclass(frozen=True, slots=True)
class Codecs:
    """How hidden states travel, and gradients by them; each in both directions."""

    hidden: Codec = Codec.NONE
    gradient: Codec = Codec.NONE


class Caller:
    """Asks servers, and keeps the books of it. Methods run on the loop thread.

    Attributes:
        running: by lane and first block, who was asked last.
        codecs: how hidden states and gradients travel.
    """

    def __init__(
        self, transport: Transport, directory: Directory, call_timeout_s: float, codecs: Codecs | None = None, compile: bool = False
    ) -> None:
        self._transport, self._directory, self._call_timeout_s = transport, directory, call_timeout_s
        self.codecs = codecs or Codecs()
        self.counters, self.events = ChainCounters(), EventLog()
        self.running: dict[tuple[int, int], Hop] = {}
        self._compile, self._compiled = compile, set[tuple[str, BlockSpan]]()
        self._said = set[tuple[str, str]]()
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
        (result,) = await self.pass_through([hop], [call], purpose, [kept])
        return result

    async def pass_through(
        self, hops: Sequence[Hop], calls: Sequence[SpanCall], purpose: Purpose, kept: Sequence[KeptGraph | None]
    ) -> list[SpanResult]:
        """The same on several servers, each of which hands its hidden states, or their gradient, to the next; only the last returns them.

        Where a server cannot reach the next one, what it was to hand on comes here and goes there from here. All of it counts, or nothing.

        Args:
            hops: the servers, in the order in which the tensor goes.
            calls: one for each; all hold the first one's tensor, for its shape.
            purpose: what this is for.
            kept: for each, the graph that its backward goes through.

        Raises:
            PeerFault: one of them failed in a way that another server may not.
        """
        began, tokens = now(), purpose.tokens
        for hop in hops:
            self.totals(hop.peer)  # from here on it has a label
            self._notice_move(hop, purpose.lane)
        whole = BlockSpan(min(hop.span.start for hop in hops), max(hop.span.stop for hop in hops))
        usual_s = self._times.limit_s(purpose.kind, whole, tokens)
        limit_s = None if usual_s is None else min(self._call_timeout_s, usual_s * purpose.allowance)
        numbers = [purpose.page.ask(purpose.micro, purpose.way, hop.span, hop.peer, self._call_timeout_s, purpose.replay) for hop in hops]
        try:
            for hop in hops:
                self._check_same(hop)
            generations = [self._transport.generation(hop.peer) for hop in hops]
            answers = await self._answers(hops, calls, kept, limit_s, purpose)
            for hop, generation, call in zip(hops, generations, calls, strict=True):
                self._check_same(hop, generation)  # a handle means nothing to another process
                self._uploads.arrived(hop.peer, generation, call)
        except BaseException as error:
            self._failed(error, hops, calls, purpose, numbers, now() - began)
            raise
        seconds = now() - began
        for number, hop in zip(numbers, hops, strict=True):
            purpose.page.accept(number, purpose.micro, hop.span, purpose.replay)
        self._times.add(purpose.kind, whole, tokens, seconds)
        shares = _shares([result.times for result, _ in answers])
        for hop, (result, answer), share, graph in zip(hops, answers, shares, kept, strict=True):
            self.totals(hop.peer).add(seconds * share, result.times, answer)
            if len(hops) > 1:
                self._times.add(purpose.kind, hop.span, tokens, seconds * share)
            self._directory.succeeded(hop, seconds * share, tokens)
            self.counters.compiled += result.compiled
            if self._compile and not self._directory.has(hop.peer, COMPILES):
                self.say_once(("compile", hop.peer), f"{self.label(hop.peer)} does not compile its blocks: swarm.compile=auto changes nothing there")
            if graph is None:
                self._notice_compiled(hop, result.compiled)
        return [result for result, _ in answers]

    async def _answers(
        self, hops: Sequence[Hop], calls: Sequence[SpanCall], kept: Sequence[KeptGraph | None], limit_s: float | None, purpose: Purpose
    ) -> list[tuple[SpanResult, Incoming]]:
        """Ask all at once; the first that fails ends the others."""
        copies, step = purpose.copies, purpose.page.step
        tokens = [new_token() for _ in hops[1:]]
        done: set[int] = set()

        async def one(index: int) -> tuple[SpanResult, Incoming]:
            hop, call, last = hops[index], calls[index], index == len(hops) - 1
            moving = call.hidden_BTH if call.grad_BTH is None else call.grad_BTH
            receive = Receive(tokens[index - 1], hops[index - 1].peer, moving.nbytes) if index else None
            copy = any(copies[index : index + 1]) and not last and calls[index + 1].keep and self._directory.has(hop.peer, COPIES)
            send = None if last else Send(hops[index + 1].peer, tokens[index], copy)
            message = with_relay(self._message(hop, call, kept[index], step), Relay(receive, send))
            message = self._with_codec(hop, message, call)
            room = call.answer_bytes + 2 * ALIGNMENT  # compressed, a tensor has two parts
            reply, answer = await self.exchange(hop, message, room)
            result = _result(reply, call, hop, not last, copy)
            if not last and result.sent:
                self._directory.together(hop.peer, hops[index + 1].peer)
            elif not last:
                assert result.hidden_BTH is not None, "a result holds what it did not send"
                self._directory.apart(hop.peer, hops[index + 1].peer)
                await self.exchange(hops[index + 1], Delivery(tokens[index], result.hidden_BTH).to_message(), 0, call.grad_BTH is not None)
            done.add(index)
            return result, answer

        def slowest() -> Hop:
            waiting = [hop for index, hop in enumerate(hops) if index not in done]
            # A server is not done before the next one has taken what it hands on, so a frozen one holds up those before it.
            quietest = max(waiting, key=lambda hop: self._transport.silent_s(hop.peer))
            return quietest if self._transport.silent_s(quietest.peer) > SILENT_S else waiting[0]

        async with _slow_limit(self._directory, slowest, limit_s):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(index)) for index in range(len(hops))]
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from failures.exceptions[0].__cause__
        return [task.result() for task in tasks]

    def _failed(
        self, error: BaseException, hops: Sequence[Hop], calls: Sequence[SpanCall], purpose: Purpose, numbers: Sequence[int], seconds: float
    ) -> None:
        """Put down what went wrong, and at whom."""
        for number, hop, call in zip(numbers, hops, calls, strict=True):
            purpose.page.fail(number, f"{type(error).__name__}: {error}")
            self._uploads.failed(hop.peer, call, purpose.page.step)
        if not isinstance(error, PeerFault):
            return
        hop = next(hop for hop in hops if hop.peer == error.peer)
        self._count(error, hop, seconds)
        if isinstance(error, TensorsLost):
            self._uploads.missed(hop.peer)
        if isinstance(error, PeerSlow):
            self._times.add(
                purpose.kind, BlockSpan(min(each.span.start for each in hops), max(each.span.stop for each in hops)), purpose.tokens, seconds
            )
            self._directory.slow(hop, seconds, purpose.tokens)

    def _with_codec(self, hop: Hop, message: Message, call: SpanCall) -> Message:
        """Say how the answer is to come.

        Raises:
            UsageError: the server does not know a codec that is wanted.
        """
        for codec in (self.codecs.hidden, self.codecs.gradient):
            if codec is not Codec.NONE and not self._directory.has(hop.peer, feature(codec)):
                raise UsageError(f"the server {self.label(hop.peer)} does not know the codec {codec}: update it, or use swarm.codec=none")
        codec = self.codecs.hidden if call.grad_BTH is None else self.codecs.gradient
        return message if codec is Codec.NONE else replace(message, fields={**message.fields, "answer_codec": str(codec)})

    def _message(self, hop: Hop, call: SpanCall, kept: KeptGraph | None, step: int) -> Message:
        remaining_ms = self.remaining_ms()
        if kept is not None:
            assert call.grad_BTH is not None, "only a backward uses a kept graph"
            return KeptCall(call.span, call.model, kept.handle, call.grad_BTH, call.input_grad, remaining_ms, call.sum).to_message()
        generation = self._transport.generation(hop.peer)
        stores = self._directory.has(hop.peer, STORES_TENSORS)
        call = self._uploads.by_reference(hop.peer, generation, call, step) if stores else without_digests(call)
        if self._compile and self._directory.has(hop.peer, COMPILES):
            call = replace(call, compile=True)
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

    def _check_same(self, hop: Hop, generation: int | None = None) -> None:
        """A connection that was opened since its server described itself may lead to another process, with other weights.

        Raises:
            PeerCutOff: it has to describe itself again.
        """
        if not self._directory.same(hop.peer) or generation not in (None, self._transport.generation(hop.peer)):
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

    def _notice_move(self, hop: Hop, lane: int) -> None:
        """Say when calls of a lane leave a server that could be asked, because another one is faster."""
        before = self.running.get((lane, hop.span.start))
        if before == hop:
            return
        for key in [key for key, old in self.running.items() if key[0] == lane and old.span.overlap(hop.span)]:
            del self.running[key]
        self.running[lane, hop.span.start] = hop
        if before is not None and (times := self._directory.times_slower(before.peer, hop.peer)) is not None:
            detail = f"blocks {hop.span} go to {self.label(hop.peer)} from now on: {self.label(before.peer)} takes {times:.1f} times as long"
            self.events.add(EventKind.MOVED, detail, server=self.label(before.peer), span=hop.span, at=now())
            logger.info("%s", detail)

    def _notice_compiled(self, hop: Hop, compiled: bool) -> None:
        """Say when a server changes over between eager and compiled code, which are two numeric classes."""
        if compiled == ((hop.peer, hop.span) in self._compiled):
            return
        self._compiled ^= {(hop.peer, hop.span)}
        detail = f"{self.label(hop.peer)} runs {'compiled' if compiled else 'eager'} code for blocks {hop.span} from now on: last digits are others"
        self.events.add(EventKind.COMPILED, detail, server=self.label(hop.peer), span=hop.span, at=now())
        logger.info("%s", detail)

    def say_once(self, kind: tuple[str, str], what: str) -> None:
        """Warn of something that goes on, such as a setting without effect, the first time one of its kind is seen at a server (``""``: nobody's)."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s", what)

    def remaining_ms(self) -> int:
        """How long a call that begins now may take."""
        return max(1, int(self._call_timeout_s * 1000))

    async def exchange(self, hop: Hop, message: Message, answer_bytes: int, of_gradient: bool = False) -> tuple[Message, Incoming]:
        """One message to one server, and its answer, which is no fault.

        Args:
            hop: the server, and the blocks.
            message: what to ask.
            answer_bytes: the largest body that the answer may have.
            of_gradient: what is delivered is one.

        Raises:
            PeerFault: it failed in a way that another server may not.
        """
        codecs = {"hidden": self.codecs.hidden, "grad": self.codecs.gradient}
        message = await squeezed(message, {**codecs, "tensor": codecs["grad" if of_gradient else "hidden"]})
        self.counters.calls += 1
        totals = self.totals(hop.peer)
        totals.calls += 1
        request = replace(encode(message, answer_bytes=answer_bytes), in_order=_refers(message))
        totals.bytes_up += len(request.header) + request.body_bytes
        self.counters.carried("up", message)
        try:
            answer = await self._transport.call(hop.peer, request, self._call_timeout_s)
            reply = decode(answer)
            self.counters.carried("down", reply, message.kind)
            if reply.fields.get("codecs") and all(codec is Codec.NONE for codec in (self.codecs.hidden, self.codecs.gradient)):
                raise WireError("it is compressed, which nobody asked for")
            reply = await expanded(reply)
            if reply.kind == "fault":
                raise _as_error(hop, Fault.from_message(reply))
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


@contextlib.asynccontextmanager
async def _slow_limit(directory: Directory, slowest: Callable[[], Hop], limit_s: float | None) -> AsyncIterator[None]:
    """Ends calls that take longer than their like, as soon as another server can do what is missing; where none can, they go on.

    Raises:
        PeerSlow: that happened.
    """
    loop, began = asyncio.get_running_loop(), now()
    handle: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal handle
        if not directory.blind and directory.others_can(slowest()):
            scope.reschedule(loop.time())
        else:
            handle = loop.call_later(RECHECK_S, look)

    try:
        async with asyncio.timeout(None) as scope:
            handle = None if limit_s is None else loop.call_later(limit_s, look)
            try:
                yield
            finally:
                if handle is not None:
                    handle.cancel()
    except TimeoutError as error:
        hop = slowest()
        raise PeerSlow(hop.peer, hop.span, f"no answer within {now() - began:.1f} s, which is long for such a call") from error


def _shares(times: Sequence[ServerTimes | None]) -> list[float]:
    """How the time of a chain is divided among its servers: by what they say, since nothing else is known; their sum is what passed."""
    said = [each.queue_us + each.compute_us if each is not None else 0 for each in times]
    return [each / sum(said) for each in said] if all(said) else [1 / len(said)] * len(said)


def _result(reply: Message, call: SpanCall, hop: Hop, passes_on: bool, copy: bool) -> SpanResult:
    try:
        return SpanResult.from_message(reply, call, passes_on, copy)
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


def _refers(message: Message) -> bool:
    """Whether a call leaves out tensors that another message brings, which it must not overtake."""
    kwargs = message.fields.get("kwargs")
    return isinstance(kwargs, list) and any(f"k{index}" not in message.tensors for index in range(len(kwargs)))
