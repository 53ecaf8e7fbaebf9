"""Door 4: one batch as calls along a route. Retry and failover happen here and nowhere else.

Requests are pure: a span, hidden states and kwargs in, hidden states or gradients out. So a call may be computed more than once, and its result is
used exactly once. Micro-batches are a pure function of configuration and batch shape; measurements only choose which server runs a call.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from swarmtune.errors import BlocksUnserved, KwargError, NonFinite, PeerFault, SwarmError, WireError
from swarmtune.remote.route import Directory, Hop
from swarmtune.transport.base import Transport, TransportError
from swarmtune.types import Axis, BlockSpan
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Incoming
from swarmtune.wire.initial import MAX_INITIAL, InitialCall, InitialResult
from swarmtune.wire.messages import (
    DETERMINISTIC,
    AdapterSpec,
    CallKwarg,
    DropoutSeed,
    Fault,
    FaultCode,
    ServerInfo,
    ServerTimes,
    SpanCall,
    SpanResult,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
WAIT_S = 0.25
INITIAL_ELEMENTS = 1 << 25
"""Values are asked for in answers of at most about this many elements."""
MAX_SILENCE_S = 12.0


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


@dataclass(frozen=True, slots=True)
class KwargPlan:
    """What is known of a kwarg besides its tensor."""

    name: str
    axes: Mapping[Axis, int]
    blocks: BlockSpan
    requires_grad: bool


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch: its hidden states and its share of the kwargs."""

    hidden_BTH: Tensor
    plans: tuple[KwargPlan, ...]
    tensors: tuple[Tensor, ...]
    adapter: AdapterSpec | None
    dropout: DropoutSeed | None = None

    @property
    def tokens(self) -> int:
        """Rows times sequence length."""
        return self.hidden_BTH.shape[0] * self.hidden_BTH.shape[1]

    def trains(self, span: BlockSpan) -> bool:
        """Whether any kwarg of these blocks needs a gradient."""
        return any(plan.requires_grad and plan.blocks.overlap(span) for plan in self.plans)

    def call(self, span: BlockSpan, hidden_BTH: Tensor, model: str, grad_BTH: Tensor | None = None, input_grad: bool = False) -> SpanCall:
        """The call that runs ``span``: kwargs are sliced to its blocks, here and on every retry."""
        kwargs = []
        for index in self._of(span):
            plan, blocks = self.plans[index], self.plans[index].blocks.overlap(span)
            assert blocks is not None
            kwargs.append(CallKwarg(plan.name, self.tensors[index], plan.axes, blocks, plan.requires_grad))
        adapter = self.adapter if any(kwarg.name.startswith("peft.") for kwarg in kwargs) else None
        return SpanCall(span, model, hidden_BTH, tuple(kwargs), adapter, grad_BTH, input_grad, dropout=self.dropout if adapter is not None else None)

    def collect(self, span: BlockSpan, result: SpanResult, found: dict[int, dict[int, Tensor]]) -> None:
        """File the gradients that a backward of ``span`` returned, by kwarg and block."""
        indices = self._of(span)
        for position, grads in result.kwarg_grads.items():
            index = indices[position]
            blocks = self.plans[index].blocks.overlap(span)
            assert blocks is not None
            found.setdefault(index, {}).update(zip(range(blocks.start, blocks.stop), grads, strict=True))

    def _of(self, span: BlockSpan) -> list[int]:
        return [index for index, plan in enumerate(self.plans) if plan.blocks.overlap(span)]


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of a route that has run forward: its blocks, and the hidden states that entered them."""

    span: BlockSpan
    hidden_BTH: Tensor


@dataclass(frozen=True, slots=True)
class MicroResult:
    """Gradients of one micro-batch: by the input (``None`` where not needed), and by kwarg index and block."""

    input_grad_BTH: Tensor | None
    kwarg_grads: Mapping[int, Mapping[int, Tensor]]


@dataclass(slots=True)
class ServerTotals:
    """What one server did for this client so far.

    Attributes:
        label: its name or its blocks, fit for the name of a metric.
        span: the blocks that it held when it was first called.
        calls: forwards and backwards asked of it.
        failures: of these, those that it did not do.
        network_s: seconds of done calls that it did not account for: the way there and back.
        queue_s: seconds that calls waited there, as it says.
        compute_s: seconds of work, as it says.
        bytes_up: of messages sent to it.
        bytes_down: of whole answers received.
    """

    label: str
    span: BlockSpan
    calls: int = 0
    failures: int = 0
    network_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def add(self, seconds: float, times: ServerTimes | None, answer: Incoming) -> None:
        """Count a done call; a server cannot claim more time than has passed."""
        compute_s = min(seconds, times.compute_us / 1e6) if times else 0.0
        queue_s = min(seconds - compute_s, times.queue_us / 1e6) if times else 0.0
        self.compute_s, self.queue_s, self.network_s = (
            self.compute_s + compute_s,
            self.queue_s + queue_s,
            self.network_s + seconds - compute_s - queue_s,
        )
        self.bytes_down += len(answer.body)


@dataclass(slots=True)
class ChainCounters:
    """Running totals, for people.

    Attributes:
        wait_s: seconds that the caller's thread waited for the chain.
        servers: by peer id.
    """

    calls: int = 0
    retries: int = 0
    wait_s: float = 0.0
    servers: dict[str, ServerTotals] = field(default_factory=dict)


def _label(peer: str, info: ServerInfo, taken: Collection[str]) -> str:
    """The name of a server, or its blocks, so that runs can be compared; where two would be called alike, with the end of its peer id."""
    label = re.sub(r"[^A-Za-z0-9_.-]", "_", info.name)[:40] or f"blocks{info.span.start}-{info.span.stop}"
    return f"{label}.{peer[-6:]}" if label in taken else label


def micro_batches(batch: int, sequence: int, tokens: int) -> list[tuple[int, int]]:
    """Cut ``batch`` rows of ``sequence`` tokens into ranges of at most ``tokens`` tokens, as even as possible; at least one row each."""
    rows = max(1, tokens // sequence)
    count = -(-batch // rows)
    base, extra = divmod(batch, count)
    sizes = [base + (index < extra) for index in range(count)]
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


class Chain:
    """Runs the whole body of one model. Methods run on the loop thread."""

    def __init__(self, transport: Transport, directory: Directory, settings: ChainSettings) -> None:
        self._transport, self._directory, self.settings = transport, directory, settings
        self.counters = ChainCounters()

    async def forward(self, micro: Sequence[Batch]) -> list[tuple[list[Leg], Tensor]]:
        """All blocks, every micro-batch: the legs that ran, and the output.

        Raises:
            SwarmError: some blocks could not be run within the patience.
            NonFinite: a block gave a NaN or an infinity.
            KwargError: a server says that the call does not fit the model.
        """
        return await self._all([self._forward_span(batch, BlockSpan(0, self._directory.num_blocks), batch.hidden_BTH) for batch in micro])

    async def backward(self, micro: Sequence[Batch], legs: Sequence[Sequence[Leg]], grads: Sequence[Tensor], input_grad: bool) -> list[MicroResult]:
        """Gradients of every micro-batch, from the legs that ``forward`` returned.

        Raises:
            SwarmError: some blocks could not be run within the patience; nothing has been applied.
        """
        return await self._all([self._backward_legs(batch, own, grad, input_grad) for batch, own, grad in zip(micro, legs, grads, strict=True)])

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
        patience = _Patience(self.settings.patience_s)
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
                reply, _ = await self._exchange(hop, call.to_message(), call.answer_bytes)
                values = InitialResult.from_message(reply, call).values
            except WireError as error:
                self._after(PeerFault(hop.peer, hop.span, f"its answer is malformed: {error}"), patience)
                continue
            except PeerFault as fault:
                self._after(fault, patience)
                continue
            found.update(zip(wanted, values, strict=True))
            order, patience = order[len(wanted) :], _Patience(self.settings.patience_s)
        return [found[index] for index in range(len(names))]

    async def _all(self, coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run at most ``max_in_flight`` at once; the first failure cancels the others and is raised."""
        gate = asyncio.Semaphore(self.settings.max_in_flight)

        async def gated(coroutine: Coroutine[Any, Any, T]) -> T:
            async with gate:
                return await coroutine

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(gated(coroutine)) for coroutine in coroutines]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures.exceptions[0].__cause__
        return [task.result() for task in tasks]

    async def _forward_span(self, batch: Batch, span: BlockSpan, hidden_BTH: Tensor) -> tuple[list[Leg], Tensor]:
        legs: list[Leg] = []
        position, patience = span.start, _Patience(self.settings.patience_s)
        while position < span.stop:
            hop = (await self._route(BlockSpan(position, span.stop), batch.tokens, patience))[0]
            try:
                result = await self._call(hop, batch.call(hop.span, hidden_BTH, self._directory.model))
            except PeerFault as fault:
                self._after(fault, patience)
                continue
            assert result.hidden_BTH is not None
            legs.append(Leg(hop.span, hidden_BTH))
            hidden_BTH, position, patience = result.hidden_BTH, hop.span.stop, _Patience(self.settings.patience_s)
        return legs, hidden_BTH

    async def _backward_legs(self, batch: Batch, legs: Sequence[Leg], grad_BTH: Tensor, input_grad: bool) -> MicroResult:
        """Walk the legs back to front, as far as anything below still needs a gradient."""
        found: dict[int, dict[int, Tensor]] = {}
        grad: Tensor | None = grad_BTH
        for leg in reversed(legs):
            if not (input_grad or batch.trains(BlockSpan(0, leg.span.stop))):
                return MicroResult(None, found)
            assert grad is not None
            deeper = input_grad or (leg.span.start > 0 and batch.trains(BlockSpan(0, leg.span.start)))
            grad = await self._backward_leg(batch, leg, grad, deeper, found)
        return MicroResult(grad, found)

    async def _backward_leg(self, batch: Batch, leg: Leg, grad_BTH: Tensor, input_grad: bool, found: dict[int, dict[int, Tensor]]) -> Tensor | None:
        patience = _Patience(self.settings.patience_s)
        while True:
            route = await self._route(leg.span, batch.tokens, patience)
            if len(route) > 1:
                return await self._backward_pieces(batch, leg, route[-1].span, grad_BTH, input_grad, found)
            call = batch.call(leg.span, leg.hidden_BTH, self._directory.model, grad_BTH, input_grad)
            try:
                result = await self._call(route[0], call)
            except PeerFault as fault:
                self._after(fault, patience)
                continue
            batch.collect(leg.span, result, found)
            return result.hidden_BTH

    async def _backward_pieces(
        self, batch: Batch, leg: Leg, last: BlockSpan, grad_BTH: Tensor, input_grad: bool, found: dict[int, dict[int, Tensor]]
    ) -> Tensor | None:
        """No single server holds the blocks of ``leg`` any more: run them forward again in the pieces that there are, then back through each."""
        legs, boundary_BTH = await self._forward_span(batch, BlockSpan(leg.span.start, last.start), leg.hidden_BTH)
        grad: Tensor | None = grad_BTH
        for piece in reversed([*legs, Leg(last, boundary_BTH)]):
            assert grad is not None
            grad = await self._backward_leg(batch, piece, grad, input_grad or piece.span.start > leg.span.start, found)
        return grad

    async def _route(self, span: BlockSpan, tokens: int, patience: _Patience) -> list[Hop]:
        """A route for ``span`` now, or as soon as there is one, within the patience."""
        while True:
            try:
                return self._directory.route(span.start, span.stop, tokens)
            except BlocksUnserved as error:
                remaining_s = patience.remaining_s()
                if remaining_s <= 0:
                    raise patience.exhausted(error) from (patience.last_fault or error)
            try:
                async with asyncio.timeout(remaining_s):
                    await self._directory.refresh()
                    await asyncio.sleep(WAIT_S)
            except TimeoutError:
                logger.debug("the patience ended while looking for servers")

    def _after(self, fault: PeerFault, patience: _Patience) -> None:
        self.counters.retries += 1
        self._totals(fault.peer).failures += 1
        self._directory.failed(fault.peer)
        if patience.blame(fault):
            raise SwarmError(f"no server did the work within {self.settings.patience_s:.0f} s of patience; last failure: {fault}") from fault
        logger.warning("%s; trying another server", fault)

    async def _call(self, hop: Hop, call: SpanCall) -> SpanResult:
        """One forward or backward on one server.

        Raises:
            PeerFault: it failed in a way that another server may not.
        """
        began = time.monotonic()
        reply, answer = await self._exchange(hop, replace(call, remaining_ms=self._remaining_ms()).to_message(), call.answer_bytes)
        try:
            result = SpanResult.from_message(reply, call)
        except WireError as error:
            raise PeerFault(hop.peer, hop.span, f"its answer is malformed: {error}") from error
        seconds = time.monotonic() - began
        self._totals(hop.peer).add(seconds, result.times, answer)
        self._directory.succeeded(hop, seconds, call.hidden_BTH.shape[0] * call.hidden_BTH.shape[1])
        return result

    def _remaining_ms(self) -> int:
        return max(1, int(self.settings.call_timeout_s * 1000))

    async def _exchange(self, hop: Hop, message: Message, answer_bytes: int) -> tuple[Message, Incoming]:
        """One message to one server, and its answer, which is no fault.

        Raises:
            PeerFault: it failed in a way that another server may not.
        """
        self.counters.calls += 1
        totals = self._totals(hop.peer)
        totals.calls += 1
        request = encode(message, answer_bytes=answer_bytes)
        totals.bytes_up += len(request.header) + request.body_bytes
        try:
            answer = await self._transport.call(hop.peer, request, self.settings.call_timeout_s)
            reply = decode(answer)
            if reply.kind == "fault":
                raise _as_error(hop, Fault.from_message(reply))
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
            totals = self.counters.servers[peer] = ServerTotals(_label(peer, info, taken), info.span)
        return totals


class _Patience:
    """How much longer to look for a server: the clock starts with the first fault."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = time.monotonic()
        self._ends_at: float | None = None
        self._failed: set[str] = set()
        self.last_fault: PeerFault | None = None

    def blame(self, fault: PeerFault) -> bool:
        """Start the clock, and remember why; whether to give up: the time is over, and this server has failed here before.

        Without it, servers that describe themselves well and fail every call could be asked in turns for ever.
        """
        again = fault.peer in self._failed
        self._failed.add(fault.peer)
        self.last_fault = fault
        if self._ends_at is None:  # a silence that has been waited out counts
            self._ends_at = time.monotonic() + self._limit_s - min(time.monotonic() - self._began, MAX_SILENCE_S, self._limit_s / 2)
        return again and self.remaining_s() <= 0

    def remaining_s(self) -> float:
        """Seconds left; starts the clock."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + self._limit_s
        return self._ends_at - time.monotonic()

    def exhausted(self, error: BlocksUnserved) -> BlocksUnserved:
        """The error to raise, with all that is known."""
        because = f"; last failure: {self.last_fault}" if self.last_fault else ""
        return BlocksUnserved(f"{error.detail}; waited {self._limit_s:.0f} s{because}", error.missing)


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


def _as_error(hop: Hop, fault: Fault) -> PeerFault | NonFinite | KwargError:
    if fault.code is FaultCode.NON_FINITE:
        return NonFinite(f"{fault.detail} (said by peer {hop.peer} for blocks {hop.span})", fault.block)
    if fault.code in DETERMINISTIC:
        return KwargError(f"peer {hop.peer} refused blocks {hop.span}: {fault.detail}")
    return PeerFault(hop.peer, hop.span, f"{fault.code}: {fault.detail}")
