"""Door 4: one batch as calls along a route. Retry and failover happen here and nowhere else.

Requests are pure: a span, hidden states and kwargs in, hidden states or gradients out. So a call may be computed more than once, and its result is
used exactly once. Micro-batches are a pure function of configuration and batch shape; measurements only choose which server runs a call.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from swarmtune.errors import (
    BlocksUnserved,
    GraphLost,
    KwargError,
    NonFinite,
    PeerBusy,
    PeerCutOff,
    PeerDraining,
    PeerFault,
    PeerSlow,
    SwarmError,
    TensorsLost,
    WireError,
)
from swarmtune.remote.batch import Batch, KeptGraph, Leg, MicroResult
from swarmtune.remote.deadlines import CallTimes, Patience
from swarmtune.remote.events import EventKind, EventLog, SwarmStatus, Waiting
from swarmtune.remote.ledger import Ledger, Page, Way
from swarmtune.remote.route import Directory, Hop
from swarmtune.remote.totals import ChainCounters, ServerTotals, label_of
from swarmtune.remote.uploads import Uploads, without_digests
from swarmtune.transport.base import NodeLost, Transport, TransportError
from swarmtune.transport.clock import now
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Incoming
from swarmtune.wire.initial import MAX_INITIAL, InitialCall, InitialResult
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import DETERMINISTIC, KEEPS_GRAPHS, MAX_RELEASED, STORES_TENSORS, AdapterSpec, Fault, FaultCode, SpanCall, SpanResult

logger = logging.getLogger(__name__)
T = TypeVar("T")
WAIT_S = 0.25
"""How often a call that finds nobody looks again."""
TELL_EVERY_S = 5.0
"""How often it says so."""
RETRY_BUSY_S = 1.0
"""When to ask a busy server again that does not say when."""
SEEN_S = 0.5
"""A busy server is waited for silently below this."""
RECHECK_S = 1.0
"""How often a call that is slow looks for another server."""
INITIAL_ELEMENTS = 1 << 25
"""Values are asked for in answers of at most about this many elements."""


@dataclass(frozen=True, slots=True)
class ChainSettings:
    """How calls are cut and how long they may take.

    Attributes:
        micro_batch_tokens: tokens of one micro-batch, at least one row.
        max_in_flight: micro-batches under way at once.
        patience_s: how long to look for a server before giving up.
        call_timeout_s: how long one call to a live server may take.
    """

    micro_batch_tokens: int = 4096
    max_in_flight: int = 4
    patience_s: float = 30.0
    call_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """One pass over one micro-batch, and the patience for the piece that is next.

    Attributes:
        replay: run forward again only for its boundaries, so nothing of it is counted.
        input_grad: of a forward, whether its backward will ask for the gradient by the input; ``None`` where there will be none.
    """

    batch: Batch
    page: Page
    way: Way
    patience: Patience
    replay: bool = False
    input_grad: bool | None = None

    def forward_call(self, span: BlockSpan, hidden_BTH: Tensor, model: str) -> SpanCall:
        """The forward of ``span``, which says what its backward will need."""
        if self.input_grad is None:
            return self.batch.call(span, hidden_BTH, model)
        deeper = self.input_grad or (span.start > 0 and self.batch.trains(BlockSpan(0, span.start)))
        return self.batch.call(span, hidden_BTH, model, input_grad=deeper, keep=deeper or self.batch.trains(span))


class Chain:
    """Runs the whole body of one model. Methods run on the loop thread."""

    def __init__(self, transport: Transport, directory: Directory, settings: ChainSettings, ledger: Ledger | None = None) -> None:
        self._transport, self._directory, self.settings = transport, directory, settings
        self.ledger = ledger or Ledger()
        self.counters, self.events = ChainCounters(), EventLog()
        self._times = CallTimes()
        self._running: dict[int, Hop] = {}
        self._uploads = Uploads()
        self._released: dict[tuple[str, int], list[int]] = {}
        self._waits, self._told_at = 0, -math.inf

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return self._directory.num_blocks

    async def forward(self, micro: Sequence[Batch], page: Page, input_grad: bool | None = None) -> list[tuple[list[Leg], Tensor]]:
        """All blocks, every micro-batch: the legs that ran, and the output.

        Args:
            micro: the micro-batches.
            page: of the ledger.
            input_grad: whether the backward will ask for the gradient by the input; ``None`` where there will be no backward.

        Raises:
            SwarmError: some blocks could not be run within the patience.
            NonFinite: a block gave a NaN or an infinity.
            KwargError: a server says that the call does not fit the model.
        """
        page.begin("forward")
        whole = BlockSpan(0, self._directory.num_blocks)
        works = [_Work(batch, page, "forward", self._patience(), input_grad=input_grad) for batch in micro]
        found = await self._all(page, "forward", [self._forward_span(work, whole, work.batch.hidden_BTH) for work in works])
        page.end("forward")
        return found

    async def backward(
        self, micro: Sequence[Batch], legs: Sequence[Sequence[Leg]], grads: Sequence[Tensor], input_grad: bool, page: Page
    ) -> list[MicroResult]:
        """Gradients of every micro-batch, from the legs that ``forward`` returned.

        Raises:
            SwarmError: some blocks could not be run within the patience; nothing has been applied.
        """
        lowest = 0 if input_grad else min((plan.blocks.start for plan in micro[0].plans if plan.requires_grad), default=self._directory.num_blocks)
        page.begin("backward", lowest)
        works = [_Work(batch, page, "backward", self._patience()) for batch in micro]
        walks = [self._backward_legs(work, own, grad, input_grad) for work, own, grad in zip(works, legs, grads, strict=True)]
        found = await self._all(page, "backward", walks)
        page.end("backward", lowest)
        return found

    def status(self) -> SwarmStatus:
        """What goes on now, for people; from any thread."""
        hops = sorted(list(self._running.values()), key=lambda hop: hop.span)
        return SwarmStatus(
            route=tuple((self._label(hop.peer), hop.span) for hop in hops),
            slow=tuple(sorted(self._label(peer) for peer in self._directory.slow_peers())),
            waiting=self.events.longest_wait(),
            retries=self.counters.retries,
            events=self.events.by_kind,
            last=self.events.latest[-1] if self.events.latest else None,
        )

    async def initial(
        self, names: Sequence[tuple[int, str]], shapes: Sequence[tuple[int, ...]], adapter: AdapterSpec | None = None, rng: Tensor | None = None
    ) -> list[Tensor]:
        """First values that depend on body weights, by block and name, from whoever holds the blocks.

        Args:
            names: block and name of each.
            shapes: what is expected.
            adapter: the tuner whose tensors are asked for.
            rng: see ``InitialCall``.

        Raises:
            SwarmError: some blocks could not be asked within the patience.
            KwargError: a server says that there is no such value.
        """
        found: dict[int, Tensor] = {}
        order = sorted(range(len(names)), key=lambda index: names[index][0])
        patience = self._patience()
        while order:
            block = names[order[0]][0]
            hop = (await self._route(BlockSpan(block, block + 1), 1, patience))[0]
            wanted = _fitting(order, names, shapes, self._directory.known[hop.peer].info.span)
            call = InitialCall(
                BlockSpan(block, names[wanted[-1]][0] + 1),
                self._directory.model,
                tuple(names[index] for index in wanted),
                adapter,
                rng,
                self._remaining_ms(),
                tuple(shapes[index] for index in wanted),
            )
            try:
                reply, _ = await self._exchange(hop, call.to_message(), call.answer_bytes, None)
                values = InitialResult.from_message(reply, call).values
            except WireError as error:
                self._after(PeerFault(hop.peer, hop.span, f"its answer is malformed: {error}"), patience)
                continue
            except PeerFault as fault:
                self._after(fault, patience)
                continue
            found.update(zip(wanted, values, strict=True))
            order, patience = order[len(wanted) :], self._patience()
        return [found[index] for index in range(len(names))]

    def _patience(self) -> Patience:
        return Patience(self.settings.patience_s, self.settings.call_timeout_s)

    async def _all(self, page: Page, way: Way, coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run at most ``max_in_flight`` at once; the first failure cancels the others and is raised."""
        gate = asyncio.Semaphore(self.settings.max_in_flight)

        async def gated(coroutine: Coroutine[Any, Any, T]) -> T:
            async with gate:
                return await coroutine

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(gated(coroutine)) for coroutine in coroutines]
        except BaseExceptionGroup as failures:
            page.give_up(way, str(failures.exceptions[0]))
            raise failures.exceptions[0] from failures.exceptions[0].__cause__
        except asyncio.CancelledError:
            page.give_up(way, "the caller was interrupted")
            raise
        finally:
            for coroutine in coroutines:
                coroutine.close()  # those that were cancelled before their turn
        return [task.result() for task in tasks]

    async def _forward_span(self, work: _Work, span: BlockSpan, hidden_BTH: Tensor) -> tuple[list[Leg], Tensor]:
        legs: list[Leg] = []
        position, work = span.start, replace(work, patience=self._patience())  # from now on, not since it was planned
        while position < span.stop:
            hop = (await self._route(BlockSpan(position, span.stop), work.batch.tokens, work.patience))[0]
            try:
                result = await self._call(hop, work.forward_call(hop.span, hidden_BTH, self._directory.model), work)
            except PeerFault as fault:
                self._after(fault, work.patience)
                continue
            assert result.hidden_BTH is not None
            kept = KeptGraph(hop.peer, result.handle, self._transport.generation(hop.peer)) if result.handle else None
            legs.append(Leg(hop.span, hidden_BTH, kept))
            hidden_BTH, position, work = result.hidden_BTH, hop.span.stop, replace(work, patience=self._patience())
        return legs, hidden_BTH

    async def _backward_legs(self, work: _Work, legs: Sequence[Leg], grad_BTH: Tensor, input_grad: bool) -> MicroResult:
        """Walk the legs back to front, as far as anything below still needs a gradient."""
        found: dict[int, dict[int, Tensor]] = {}
        grad: Tensor | None = grad_BTH
        for leg in reversed(legs):
            if not (input_grad or work.batch.trains(BlockSpan(0, leg.span.stop))):
                return MicroResult(None, found)
            assert grad is not None
            deeper = input_grad or (leg.span.start > 0 and work.batch.trains(BlockSpan(0, leg.span.start)))
            grad = await self._backward_leg(replace(work, patience=self._patience()), leg, grad, deeper, found)
        return MicroResult(grad, found)

    async def _backward_leg(self, work: _Work, leg: Leg, grad_BTH: Tensor, input_grad: bool, found: dict[int, dict[int, Tensor]]) -> Tensor | None:
        kept = leg.kept
        while True:
            holder = self._directory.holder(kept.peer, leg.span) if kept is not None and self._is_open(kept) else None
            kept = kept if holder is not None else None
            route = [holder] if holder is not None else await self._route(leg.span, work.batch.tokens, work.patience)
            if len(route) > 1:
                return await self._backward_pieces(work, leg, route[-1].span, grad_BTH, input_grad, found)
            call = work.batch.call(leg.span, leg.hidden_BTH, self._directory.model, grad_BTH, input_grad)
            try:
                result = await self._call(route[0], call, work, kept)
            except PeerFault as fault:
                self._after(fault, work.patience)
                kept = kept if isinstance(fault, PeerBusy) else None
                continue
            work.batch.collect(leg.span, result, found)
            return result.hidden_BTH

    async def _backward_pieces(
        self, work: _Work, leg: Leg, last: BlockSpan, grad_BTH: Tensor, input_grad: bool, found: dict[int, dict[int, Tensor]]
    ) -> Tensor | None:
        """No single server holds the blocks of ``leg`` any more: run them forward again in the pieces that there are, then back through each."""
        again = replace(work, way="forward", patience=self._patience(), replay=True, input_grad=input_grad)
        legs, boundary_BTH = await self._forward_span(again, BlockSpan(leg.span.start, last.start), leg.hidden_BTH)
        grad: Tensor | None = grad_BTH
        for piece in reversed([*legs, Leg(last, boundary_BTH)]):
            assert grad is not None
            deeper = input_grad or piece.span.start > leg.span.start
            grad = await self._backward_leg(replace(work, patience=self._patience()), piece, grad, deeper, found)
        return grad

    async def _route(self, span: BlockSpan, tokens: int, patience: Patience) -> list[Hop]:
        """A route for ``span`` now, or as soon as there is one, within the patience."""
        began, number = now(), None
        try:
            while True:
                try:
                    return self._directory.route(span.start, span.stop, tokens)
                except BlocksUnserved as error:
                    if patience.remaining_s() <= 0:
                        raise patience.exhausted(error) from (patience.last_fault or error)
                    if (busy_s := self._directory.busy_s(span)) is not None:
                        if busy_s >= SEEN_S:
                            number = self._wait_visibly(number, f"the servers of blocks {span} are busy", now() + busy_s)
                        self._directory.look()  # another one may come
                        await asyncio.sleep(min(busy_s, patience.remaining_s(), RECHECK_S))
                        continue
                    number = self._wait_visibly(number, error.detail, patience.ends_at)
                    if now() - self._told_at >= TELL_EVERY_S:
                        self._told_at = now()
                        logger.warning("%s; looking for one, %.0f s left", error.detail, patience.remaining_s())
                self._directory.look()
                await asyncio.sleep(min(WAIT_S, max(0.0, patience.remaining_s())))
        finally:
            if number is not None:
                del self.events.waiting[number]
                waited_s = now() - began
                self.events.add(EventKind.WAITED, f"blocks {span} waited {waited_s:.1f} s for a server", span=span, lost_s=waited_s, at=now())

    def _wait_visibly(self, number: int | None, what: str, ends_at: float) -> int:
        if number is None:
            number = self._waits = self._waits + 1
        self.events.waiting[number] = Waiting(what, ends_at)
        return number

    def _after(self, fault: PeerFault, patience: Patience) -> None:
        """Count a failed call, and see to it that the next one goes where it can be done.

        Raises:
            SwarmError: it has been tried long enough.
        """
        self.counters.retries += 1
        if isinstance(fault, PeerBusy):
            self._directory.busy(fault.peer, fault.retry_s)
            over = patience.wait_for(fault.retry_s, fault)
        elif isinstance(fault, GraphLost | TensorsLost):
            over = False  # the inputs go there next
        elif isinstance(fault, PeerDraining | PeerCutOff):
            if isinstance(fault, PeerDraining):
                self._directory.draining(fault.peer)
            over = patience.blame(fault)
        else:
            self._totals(fault.peer).failures += 1
            over = patience.blame(fault)
            if isinstance(fault, PeerSlow):
                patience.slower()
            else:
                self._directory.failed(fault.peer)
        if over:
            raise SwarmError(f"no server did the work within {self.settings.patience_s:.0f} s of patience; last failure: {fault}") from fault
        expected = isinstance(fault, PeerBusy | PeerDraining | PeerCutOff | GraphLost | TensorsLost)
        logger.log(logging.INFO if expected else logging.WARNING, "%s; trying %s", fault, "again" if expected else "another server")

    def _is_open(self, kept: KeptGraph) -> bool:
        return self._transport.generation(kept.peer) == kept.generation

    async def _call(self, hop: Hop, call: SpanCall, work: _Work, kept: KeptGraph | None = None) -> SpanResult:
        """One forward or backward on one server; a backward through the graph that it keeps, where it does.

        Raises:
            PeerFault: it failed in a way that another server may not.
        """
        began, tokens, within_s = now(), work.batch.tokens, self.settings.call_timeout_s
        self._totals(hop.peer)  # from here on it has a label
        self._notice_move(hop)
        usual_s = self._times.limit_s(work.way, hop.span, tokens)
        limit_s = None if usual_s is None else min(within_s, usual_s * work.patience.allowance)
        number = work.page.ask(work.batch.index, work.way, hop.span, hop.peer, within_s, work.replay)
        try:
            self._check_same(hop)
            message = self._message(hop, call, kept)
            reply, answer = await self._exchange(hop, message, call.answer_bytes, limit_s)
            self._check_same(hop)
            result = _result(reply, call, hop)
        except BaseException as error:
            work.page.fail(number, f"{type(error).__name__}: {error}")
            self._uploads.failed(hop.peer, call)
            if isinstance(error, TensorsLost):
                self._uploads.missed(hop.peer)
            if isinstance(error, PeerFault):
                self._count(error, hop, now() - began)
            if isinstance(error, PeerSlow):
                self._times.add(work.way, hop.span, tokens, now() - began)
                self._directory.slow(hop, now() - began, tokens)
            raise
        work.page.accept(number, work.batch.index, hop.span, work.replay)
        seconds = now() - began
        self._totals(hop.peer).add(seconds, result.times, answer)
        self._times.add(work.way, hop.span, tokens, seconds)
        self._directory.succeeded(hop, seconds, tokens)
        return result

    def _message(self, hop: Hop, call: SpanCall, kept: KeptGraph | None) -> Message:
        remaining_ms = self._remaining_ms()
        if kept is not None:
            assert call.grad_BTH is not None, "only a backward uses a kept graph"
            return KeptCall(call.span, call.model, kept.handle, call.grad_BTH, call.input_grad, remaining_ms).to_message()
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
            if self._is_open(graph):
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
        server = "" if kind is EventKind.CUT_OFF else self._label(hop.peer)
        if server:
            self._totals(hop.peer).lost_s += lost_s
        self.events.add(kind, str(fault), server=server, span=hop.span, lost_s=lost_s, at=now())

    def _notice_move(self, hop: Hop) -> None:
        """Say when calls leave a server that could be asked, because another one is faster."""
        before = self._running.get(hop.span.start)
        if before == hop:
            return
        for start in [start for start, old in self._running.items() if old.span.overlap(hop.span)]:
            del self._running[start]
        self._running[hop.span.start] = hop
        if before is not None and (times := self._directory.times_slower(before.peer, hop.peer)) is not None:
            detail = f"blocks {hop.span} go to {self._label(hop.peer)} from now on: {self._label(before.peer)} takes {times:.1f} times as long"
            self.events.add(EventKind.MOVED, detail, server=self._label(before.peer), span=hop.span, at=now())
            logger.info("%s", detail)

    def _remaining_ms(self) -> int:
        return max(1, int(self.settings.call_timeout_s * 1000))

    async def _exchange(self, hop: Hop, message: Message, answer_bytes: int, limit_s: float | None) -> tuple[Message, Incoming]:
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
        totals = self._totals(hop.peer)
        totals.calls += 1
        request = encode(message, answer_bytes=answer_bytes)
        totals.bytes_up += len(request.header) + request.body_bytes
        self.counters.carried("up", message.kind, message)
        try:
            async with asyncio.timeout(None) as scope:
                watch = _SlowWatch(scope, self._directory, hop, limit_s)
                try:
                    answer = await self._transport.call(hop.peer, request, self.settings.call_timeout_s)
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

    def _totals(self, peer: str) -> ServerTotals:
        totals = self.counters.servers.get(peer)
        if totals is None:
            info = self._directory.known[peer].info
            taken = {server.label for server in self.counters.servers.values()}
            totals = self.counters.servers[peer] = ServerTotals(label_of(peer, info, taken), info.span)
        return totals

    def _label(self, peer: str) -> str:
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


def _fitting(order: Sequence[int], names: Sequence[tuple[int, str]], shapes: Sequence[tuple[int, ...]], span: BlockSpan) -> list[int]:
    """The first of ``order`` that one server holds and one answer takes."""
    taken: list[int] = []
    elements = 0
    for index in order:
        elements += math.prod(shapes[index])
        if taken and (names[index][0] not in span or len(taken) == MAX_INITIAL or elements > INITIAL_ELEMENTS):
            break
        taken.append(index)
    return taken


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
