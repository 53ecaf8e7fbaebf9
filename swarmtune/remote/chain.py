"""Door 4: one batch as calls along a route. Retry and failover happen here and nowhere else.

Requests are pure: a span, hidden states and kwargs in, hidden states or gradients out. So a call may be computed more than once, and its result is
used exactly once. Micro-batches are a pure function of configuration and batch shape; measurements only choose which server runs a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from swarmtune.errors import (
    BlocksUnserved,
    GraphLost,
    PeerBusy,
    PeerCutOff,
    PeerDraining,
    PeerFault,
    PeerSlow,
    SwarmError,
    TensorsLost,
    WireError,
)
from swarmtune.remote.batch import Batch, KeptGraph, Leg, Part, chains, together
from swarmtune.remote.caller import RECHECK_S, Caller, Codecs, Purpose
from swarmtune.remote.deadlines import Patience
from swarmtune.remote.events import EventKind, SwarmStatus, Waiting
from swarmtune.remote.gradients import PassGradients, Withheld
from swarmtune.remote.ledger import Ledger, Page, Way
from swarmtune.remote.route import Directory, Hop
from swarmtune.transport.base import Transport
from swarmtune.transport.clock import now
from swarmtune.types import BlockSpan, Copies, Pipeline
from swarmtune.wire.initial import MAX_INITIAL, InitialCall, InitialResult
from swarmtune.wire.messages import KEEPS_GRAPHS, SUMS_GRADIENTS, AdapterSpec, SpanCall, SpanResult, fits_an_answer

logger = logging.getLogger(__name__)
T = TypeVar("T")
Tail = Callable[[int, Tensor], Awaitable[Tensor]]
"""What comes behind the body."""
WAIT_S = 0.25
"""How often a call that finds nobody looks again."""
TELL_EVERY_S = 5.0
"""How often it says so."""
REMEMBERED = 3
"""So many passes after a server has lost a graph, what goes in and out of it is copied."""
MAX_CHAINS = 16
"""Chains under way at once: each has a call open at each of its servers, and a connection must have room for deliveries beside them."""
SEEN_S = 0.5
"""A busy server is waited for silently below this."""
INITIAL_ELEMENTS = 1 << 25
"""Values are asked for in answers of at most about this many elements."""


@dataclass(frozen=True, slots=True)
class ChainSettings:
    """How calls are cut and how long they may take.

    Attributes:
        micro_batch_tokens: tokens of one micro-batch, at least one row.
        max_in_flight: micro-batches under way at once.
        in_flight_bytes: of their hidden states, what goes and what comes; one micro-batch is under way in any case.
        patience_s: how long to look for a server before giving up.
        call_timeout_s: how long one call to a live server may take.
        chaining: servers hand hidden states on to each other, where they can.
        codecs: how hidden states and gradients travel; exact unless asked for otherwise.
        lanes: micro-batches go in turns over so many routes, where there are replicas; gradients are added by lane.
        pipeline: how training overlaps micro-batches.
        compile: servers may run compiled code.
        copies: whether what servers hand on to each other comes here, too.
    """

    micro_batch_tokens: int = 4096
    max_in_flight: int = 4
    patience_s: float = 30.0
    call_timeout_s: float = 300.0
    chaining: bool = True
    codecs: Codecs = field(default_factory=Codecs)
    in_flight_bytes: int = 1 << 30
    lanes: int = 1
    pipeline: Pipeline = Pipeline.ONE_F_ONE_B
    compile: bool = False
    copies: Copies = Copies.AUTO

    def at_once(self, micro: Sequence[Batch]) -> int:
        """How many of these micro-batches may be under way at once."""
        largest = max(2 * batch.hidden_BTH.nbytes for batch in micro)
        return max(1, min(self.max_in_flight, self.in_flight_bytes // largest))


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """One pass over one micro-batch, and the patience for the piece that is next.

    Attributes:
        replay: run forward again only for its boundaries, so nothing of it is counted.
        input_grad: of a forward, whether its backward will ask for the gradient by the input; ``None`` where there will be none.
        chaining: servers may hand on to each other; not after that has failed.
        lane: which of the routes it takes, where there are replicas.
        routes: by lane, first block and end, what the micro-batches of the pass take as long as it may be asked: of one that goes back and forth
            within a pass no server could add the gradients.
    """

    batch: Batch
    page: Page
    way: Way
    patience: Patience
    replay: bool = False
    input_grad: bool | None = None
    chaining: bool = False
    lane: int = 0
    routes: dict[tuple[int, int, int], Sequence[Hop]] = field(default_factory=dict)

    @property
    def purpose(self) -> Purpose:
        """What its next call is for."""
        return Purpose(self.page, self.batch.index, self.batch.tokens, self.way, self.replay, self.patience.allowance, self.lane)

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
        directory.chained = settings.chaining
        self.caller = Caller(transport, directory, settings.call_timeout_s, settings.codecs, settings.compile)
        self.counters, self.events = self.caller.counters, self.caller.events
        self._same_lanes, self._evicted = 0, dict[str, int]()
        # Tickets of an earlier process with the same identity must not come again: a server may still hold gradients under them.
        self._turn, self._lost = 0, dict[str, int]()
        """The number of the pass, and that of the last one in which a server has lost a graph, or kept none."""
        self._passes, self._chains = secrets.randbits(48), asyncio.Semaphore(MAX_CHAINS)
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
        routes: dict[tuple[int, int, int], Sequence[Hop]] = {}
        works = [replace(self._work(batch, page, "forward", input_grad), routes=routes) for batch in micro]
        found = await self._all(micro, page, ["forward"], [self._forward_span(work, self._whole, work.batch.hidden_BTH) for work in works])
        self._tell_lanes(routes)
        page.end("forward")
        return found

    async def backward(
        self, micro: Sequence[Batch], legs: Sequence[Sequence[Leg]], grads: Sequence[Tensor], input_grad: bool, page: Page
    ) -> tuple[list[Tensor | None], PassGradients]:
        """Gradients from the legs that ``forward`` returned: by the input of each micro-batch (``None`` where not needed), and by the kwargs.

        Raises:
            SwarmError: some blocks could not be run within the patience; nothing has been applied.
        """
        lowest = self._lowest(micro, input_grad)
        page.begin("backward", lowest)
        found = self._gradients(micro)
        for batch, own in zip(micro, legs, strict=True):
            found.ran(batch.index, own)
        works = [self._work(batch, page, "backward") for batch in micro]
        walks = [self._backward_legs(work, own, grad, input_grad, found) for work, own, grad in zip(works, legs, grads, strict=True)]
        try:
            inputs = await self._all(micro, page, ["backward"], walks)
            await self._complete(micro, page, ["backward"], found)
        except BaseException:
            self.caller.release(graph for own in legs for leg in own for graph in leg.graphs())
            raise
        page.end("backward", lowest)
        return inputs, found

    async def train(self, micro: Sequence[Batch], page: Page, input_grad: bool, tail: Tail) -> tuple[list[Tensor | None], PassGradients]:
        """Forward and backward of every micro-batch, each as soon as it can be: 1F1B (Narayanan et al. 2019, PipeDream).

        Args:
            micro: the micro-batches.
            page: of the ledger.
            input_grad: whether the gradient by the input is wanted.
            tail: for the number of a micro-batch and its output, the gradient by that output.

        Returns:
            What ``backward`` returns, the same to the bit.

        Raises:
            SwarmError: some blocks could not be run within the patience; nothing has been applied.
            NonFinite: a block gave a NaN or an infinity.
            KwargError: a server says that the call does not fit the model.
        """
        lowest = self._lowest(micro, input_grad)
        page.begin("forward")
        page.begin("backward", lowest)
        found = self._gradients(micro)
        left: list[KeptGraph] = []
        routes: dict[tuple[int, int, int], Sequence[Hop]] = {}

        async def both(batch: Batch) -> Tensor | None:
            work = replace(self._work(batch, page, "forward", input_grad), routes=routes)
            legs, output_BTH = await self._forward_span(work, self._whole, batch.hidden_BTH)
            left.extend(graph for leg in legs for graph in leg.graphs())
            found.ran(batch.index, legs)
            grad_BTH = await tail(batch.index, output_BTH)
            return await self._backward_legs(self._work(batch, page, "backward"), legs, grad_BTH, input_grad, found)

        ways: list[Way] = ["forward", "backward"]
        try:
            inputs = await self._all(micro, page, ways, [both(batch) for batch in micro])
            await self._complete(micro, page, ways, found)
        except BaseException:
            self.caller.release(left)
            raise
        self._tell_lanes(routes)
        page.end("forward")
        page.end("backward", lowest)
        return inputs, found

    @property
    def _whole(self) -> BlockSpan:
        return BlockSpan(0, self._directory.num_blocks)

    def _work(self, batch: Batch, page: Page, way: Way, input_grad: bool | None = None) -> _Work:
        lane = batch.index % self.settings.lanes
        return _Work(batch, page, way, self._patience(), input_grad=input_grad, chaining=self.settings.chaining, lane=lane)

    def _lowest(self, micro: Sequence[Batch], input_grad: bool) -> int:
        """The lowest block to which a backward must go."""
        trained = [plan.blocks.start for plan in micro[0].plans if plan.requires_grad]
        return 0 if input_grad else min(trained, default=self._directory.num_blocks)

    def _gradients(self, micro: Sequence[Batch]) -> PassGradients:
        self._passes += self.settings.lanes
        self._turn += 1
        return PassGradients(micro[0].plans, len(micro), self._passes, self.settings.lanes)

    async def _complete(self, micro: Sequence[Batch], page: Page, ways: Sequence[Way], found: PassGradients) -> None:
        """Ask again for what a server was to add and did not."""
        if lacking := found.lacking():
            await self._all(micro, page, ways, [self._backward_again(each, page, found) for each in lacking])

    async def _backward_again(self, lost: Withheld, page: Page, found: PassGradients) -> None:
        """The gradients by kwargs of a backward whose server was to add them, and cannot any more."""
        work = _Work(lost.batch, page, "backward", self._patience(), replay=True)
        await self._backward_leg(work, replace(lost.leg, kept=None, parts=()), lost.grad_BTH, False, found)

    def status(self) -> SwarmStatus:
        """What goes on now, for people; from any thread."""
        hops = sorted(set(self.caller.running.copy().values()), key=lambda hop: hop.span)
        return SwarmStatus(
            route=tuple((self.caller.label(hop.peer), hop.span) for hop in hops),
            slow=tuple(sorted(self.caller.label(peer) for peer in self._directory.slow_peers())),
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
                self.caller.remaining_ms(),
                tuple(shapes[index] for index in wanted),
            )
            try:
                reply, _ = await self.caller.exchange(hop, call.to_message(), call.answer_bytes)
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

    async def _all(self, micro: Sequence[Batch], page: Page, ways: Sequence[Way], coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run at most as many at once as may be in flight; the first failure cancels the others and is raised."""
        gate = asyncio.Semaphore(self.settings.at_once(micro))

        async def gated(coroutine: Coroutine[Any, Any, T]) -> T:
            async with gate:
                return await coroutine

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(gated(coroutine)) for coroutine in coroutines]
        except BaseExceptionGroup as failures:
            for way in ways:
                page.give_up(way, str(failures.exceptions[0]))
            raise failures.exceptions[0] from failures.exceptions[0].__cause__
        except asyncio.CancelledError:
            for way in ways:
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
            pinned = work.routes.get((work.lane, position, span.stop), ())
            if not pinned or not self._directory.usable(pinned):
                pinned = await self._route(BlockSpan(position, span.stop), work.batch.tokens, work.patience, work.lane)
                work.routes[work.lane, position, span.stop] = pinned
            hops = list(pinned)
            hops = hops if work.chaining and self._directory.in_touch(hops) else hops[:1]
            calls = [work.forward_call(hop.span, hidden_BTH, self._directory.model) for hop in hops]
            try:
                async with self._chains if len(hops) > 1 else contextlib.nullcontext():
                    purpose = replace(work.purpose, copies=self._copies(hops))
                    results = await self.caller.pass_through(hops, calls, purpose, [None] * len(hops))
            except PeerFault as fault:
                self._after(fault, work.patience)
                work = replace(work, chaining=False)
                continue
            for hop, call, result in zip(hops, calls, results, strict=True):
                if call.keep and not result.handle:
                    self._lost[hop.peer] = self._turn
                    self._tell_unkept(hop, call)
            legs += self._legs(hops, hidden_BTH, results)
            position, work = hops[-1].span.stop, replace(work, patience=self._patience())
            hidden_BTH = _present(results[-1].hidden_BTH)
        return legs, hidden_BTH

    def _tell_lanes(self, routes: Mapping[tuple[int, int, int], Sequence[Hop]]) -> None:
        """Say once if lanes have nowhere to go: in two passes in a row, of which the second knows how fast the first one's servers are.

        A pass shows it that used all lanes from end to end, in which nobody failed, and after which nobody is left alone for a while.
        """
        whole = [tuple(hops) for (_, start, stop), hops in routes.items() if BlockSpan(start, stop) == self._whole]
        same = len(whole) == len(routes) == self.settings.lanes > 1 and len(set(whole)) == 1 and self._directory.all_usable()
        self._same_lanes = self._same_lanes + 1 if same else 0
        if self._same_lanes == 2:
            self.caller.say_once(("lanes", ""), f"swarm.lanes={self.settings.lanes} changes nothing: no other servers are worth the way")

    def _tell_unkept(self, hop: Hop, call: SpanCall) -> None:
        if self._directory.has(hop.peer, KEEPS_GRAPHS) and fits_an_answer(call):
            self.caller.say_once(
                ("room", hop.peer),
                f"{self.caller.label(hop.peer)} had no room for the graph of {hop.span}, so the backward runs these blocks forward again: "
                "where that is the rule, give it more activation_gib, or make swarm.micro_batch_tokens smaller",
            )

    def _tell_lost(self, peer: str) -> None:
        """Say once if a server loses graphs in one pass after the other."""
        before, self._evicted[peer] = self._evicted.get(peer), self._turn
        if before == self._turn - 1:
            self.caller.say_once(
                ("lost", peer),
                f"{self.caller.label(peer)} loses graphs before their backwards come, so their blocks run forward again: "
                "give it more activation_gib or activation_ttl_s, or train by swarm.pipeline=1f1b with a smaller swarm.max_in_flight",
            )

    def _copies(self, hops: Sequence[Hop]) -> list[bool]:
        """Of which hops the output is wanted here, too: of those before and after a server that may need its input again."""
        copies = self.settings.copies
        if copies is not Copies.AUTO:
            return [copies is Copies.ALL] * len(hops)
        forgetful = [self._turn - self._lost.get(hop.peer, -REMEMBERED) < REMEMBERED for hop in hops]
        return [own or after for own, after in zip(forgetful, [*forgetful[1:], False], strict=True)]

    def _legs(self, hops: Sequence[Hop], hidden_BTH: Tensor, results: Sequence[SpanResult]) -> list[Leg]:
        """What has run, and what of it was kept: one leg for each piece of which it is known here what entered it."""
        entered = [hidden_BTH, *(result.hidden_BTH for result in results[:-1])]
        starts = [index for index, tensor in enumerate(entered) if tensor is not None]
        legs = []
        for start, stop in zip(starts, [*starts[1:], len(hops)], strict=True):
            own = list(zip(hops[start:stop], results[start:stop], strict=True))
            parts = tuple(
                Part(hop.span, KeptGraph(hop.peer, result.handle, self._transport.generation(hop.peer))) for hop, result in own if result.handle
            )
            leg = Leg(BlockSpan(hops[start].span.start, hops[stop - 1].span.stop), _present(entered[start]), follows=start > 0)
            if len(own) == 1:
                legs.append(replace(leg, kept=parts[0].kept if parts else None))
            else:
                legs.append(replace(leg, parts=parts))
        return legs

    async def _backward_legs(self, work: _Work, legs: Sequence[Leg], grad_BTH: Tensor, input_grad: bool, found: PassGradients) -> Tensor | None:
        """Walk the legs back to front, as far as anything below still needs a gradient; the gradient by the input, where that is wanted.

        Legs that ran in one chain go back in one chain, where that can be done.
        """
        grad: Tensor | None = grad_BTH

        def below(block: int) -> bool:
            return input_grad or (block > 0 and work.batch.trains(BlockSpan(0, block)))

        for chain in reversed(chains(legs)):
            todo = self._runs(chain)
            while todo:
                run = todo.pop()
                leg = together(run)
                if not below(leg.span.stop):
                    return None
                work, deeper = replace(work, patience=self._patience()), below(leg.span.start)
                try:
                    back = await self._backward_chain(work, leg, _present(grad), deeper, found) if leg.parts else None
                except PeerFault as fault:
                    self._after(fault, work.patience)
                    # The last server had the gradient at once, so its graph is used up; those before it waited.
                    self.caller.release(run[-1].graphs())
                    run[-1], back = replace(run[-1], kept=None, parts=()), None
                    again = self._runs(run)
                else:
                    again = [[each] for each in run]
                if back is not None:
                    grad = back.hidden_BTH
                elif len(run) > 1:
                    todo += again
                else:
                    self.caller.release(part.kept for part in leg.parts)  # nobody goes back through several as one
                    grad = await self._backward_leg(work, run[0], _present(grad), deeper, found)
        return grad

    def _runs(self, chain: Sequence[Leg]) -> list[list[Leg]]:
        """The legs of one chain, in pieces that can go back as one: those whose graph is lost, or may be, stand alone."""
        found: list[list[Leg]] = []
        for leg in chain:
            if found and self._sound(leg) and self._sound(found[-1][-1]):
                found[-1].append(leg)
            else:
                found.append([leg])
        return found

    def _sound(self, leg: Leg) -> bool:
        parts = leg.all_parts()
        return sum(len(part.span) for part in parts) == len(leg.span) and not any(self._lost.get(part.kept.peer) == self._turn for part in parts)

    async def _backward_chain(self, work: _Work, leg: Leg, grad_BTH: Tensor, input_grad: bool, found: PassGradients) -> SpanResult | None:
        """Back through the graphs that the servers of ``leg`` have kept, from one to the next; ``None`` where that cannot be done any more.

        Raises:
            PeerFault: one of them failed; nothing of it counts.
        """
        needed, position = [], leg.span.stop
        for part in reversed(leg.parts):
            if part.span.stop == position and (input_grad or work.batch.trains(BlockSpan(leg.span.start, part.span.stop))):
                needed.append(part)
                position = part.span.start
        if position > leg.span.start and (input_grad or work.batch.trains(BlockSpan(leg.span.start, position))):
            return None  # somewhere a graph was not kept
        hops = [self._directory.holder(part.kept.peer, part.span) for part in needed if self.caller.is_open(part.kept)]
        route = [hop for hop in hops if hop is not None]
        if not work.chaining or len(route) < len(needed) or not self._directory.in_touch(route):
            return None
        model, calls = self._directory.model, []
        for part in needed:
            deeper = input_grad or (part.span.start > leg.span.start and work.batch.trains(BlockSpan(leg.span.start, part.span.start)))
            call = work.batch.call(part.span, leg.hidden_BTH, model, grad_BTH, deeper)
            sums = self._directory.has(part.kept.peer, SUMS_GRADIENTS)
            calls.append(replace(call, sum=found.wanted(work.batch.index, part.span) if sums else None))
        async with self._chains:
            results = await self.caller.pass_through(route, calls, work.purpose, [part.kept for part in needed])
        for part, result in zip(needed, results, strict=True):
            found.collect(work.batch, leg, grad_BTH, result, part.span)
        return results[-1]

    async def _backward_leg(self, work: _Work, leg: Leg, grad_BTH: Tensor, input_grad: bool, found: PassGradients) -> Tensor | None:
        kept = leg.kept
        while True:
            holder = self._directory.holder(kept.peer, leg.span) if kept is not None and self.caller.is_open(kept) else None
            if kept is not None and holder is None:
                self.caller.release([kept])
                kept = None
            route = [holder] if holder is not None else await self._route(leg.span, work.batch.tokens, work.patience, work.lane)
            if len(route) > 1:
                return await self._backward_pieces(work, leg, route[-1].span, grad_BTH, input_grad, found)
            call = work.batch.call(leg.span, leg.hidden_BTH, self._directory.model, grad_BTH, input_grad)
            if not work.replay and self._directory.has(route[0].peer, SUMS_GRADIENTS):
                call = replace(call, sum=found.wanted(work.batch.index, leg.span))
            try:
                result = await self.caller.call(route[0], call, work.purpose, kept)
            except PeerFault as fault:
                self._after(fault, work.patience)
                if kept is not None and not isinstance(fault, PeerBusy):
                    self.caller.release([kept])
                    kept = None
                continue
            found.collect(work.batch, leg, grad_BTH, result)
            return result.hidden_BTH

    async def _backward_pieces(
        self, work: _Work, leg: Leg, last: BlockSpan, grad_BTH: Tensor, input_grad: bool, found: PassGradients
    ) -> Tensor | None:
        """No single server holds the blocks of ``leg`` any more: run them forward again in the pieces that there are, then back through each."""
        again = replace(work, way="forward", patience=self._patience(), replay=True, input_grad=input_grad, chaining=False)
        legs, boundary_BTH = await self._forward_span(again, BlockSpan(leg.span.start, last.start), leg.hidden_BTH)
        grad: Tensor | None = grad_BTH
        for piece in reversed([*legs, Leg(last, boundary_BTH)]):
            if not (input_grad or work.batch.trains(BlockSpan(leg.span.start, piece.span.stop))):
                return None
            below = piece.span.start > leg.span.start and work.batch.trains(BlockSpan(leg.span.start, piece.span.start))
            grad = await self._backward_leg(replace(work, patience=self._patience()), piece, _present(grad), input_grad or below, found)
        return grad

    async def _route(self, span: BlockSpan, tokens: int, patience: Patience, lane: int = 0) -> list[Hop]:
        """A route for ``span`` now, or as soon as there is one, within the patience."""
        began, number = now(), None
        try:
            while True:
                try:
                    return self._directory.route(span.start, span.stop, tokens, lane)
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
            if isinstance(fault, GraphLost):
                self._tell_lost(fault.peer)
                self._lost[fault.peer] = self._turn
            over = patience.count(fault)  # it gets next what it lacks
        elif isinstance(fault, PeerDraining | PeerCutOff):
            if isinstance(fault, PeerDraining):
                self._directory.draining(fault.peer)
            over = patience.blame(fault)
        else:
            self.caller.totals(fault.peer).failures += 1
            over = patience.blame(fault)
            if isinstance(fault, PeerSlow):
                patience.slower()
            else:
                self._directory.failed(fault.peer)
        if over:
            raise SwarmError(f"no server did the work within {self.settings.patience_s:.0f} s of patience; last failure: {fault}") from fault
        expected = isinstance(fault, PeerBusy | PeerDraining | PeerCutOff | GraphLost | TensorsLost)
        logger.log(logging.INFO if expected else logging.WARNING, "%s; trying %s", fault, "again" if expected else "another server")


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "what was asked for is there"
    return tensor


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
