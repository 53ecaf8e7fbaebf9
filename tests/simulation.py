"""A deterministic simulation of a client's steps: real frames, chain, handlers and tensors, on a clock that jumps, with a fault at any write.

Everything runs on one thread. A *point* is one write on any connection, by either side, counted from the moment at which faults are armed: so each
send, and each receipt on the other side, of a step has its number, and ``Fault(7, "kill", "middle")`` is the same event in every run.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from servers.gradients import Graph
from servers.graphs import Graphs
from servers.handler import CallHandler
from servers.span import GRAPH_BYTES, Span
from swarmtune.errors import SwarmtuneError
from swarmtune.remote.chain import Chain, ChainSettings
from swarmtune.remote.ledger import Ledger
from swarmtune.remote.pipeline import Pipelined
from swarmtune.remote.route import Directory
from swarmtune.remote.verdict import Verdict, judge_lines
from swarmtune.transport.loopback import CLIENT, LoopbackTransport, Streams
from swarmtune.types import Copies
from tests.harness import HandlerDiscovery, batch, loopback, lora, make_handler, remote, set_values, step

LATENCY_S = 0.005
COMPUTE_S = 0.05
RESTART_S = 4.0
STALL_S = 45.0
FREEZE_S = 20.0
"""Below the patience, so that a step goes on when both replicas of a span freeze."""
LATE_S = 3.0
STEP_LIMIT_S = 150.0
"""No step with one or two faults may take longer than this on the simulated clock."""

PHASES = {
    "kill": ("before", "middle", "after"),
    "cut": ("before", "middle", "after"),
    "stall": ("before", "middle", "after"),
    "freeze": ("before", "after"),
    "late": ("before", "middle"),
    "duplicate": ("after",),
}
"""Kinds of faults, and the part of a write that gets through when each strikes: nothing, half of its bytes, all."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at one point."""

    point: int
    kind: str
    phase: str


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever nothing is left to do."""

    def __init__(self) -> None:
        self._virtual_s = 1000.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._virtual_s

    def jump(self, seconds: float | None) -> None:
        if seconds is None:
            raise RuntimeError("the simulation hangs: nothing is left that could ever happen")
        self._virtual_s += max(0.0, seconds)


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._owner = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            self._owner.jump(timeout)
        return ready


class InlineLoop:
    """Stands in for ``LoopThread``: what is asked of it runs here, on the virtual clock."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def wait(self, *futures: Future[Any]) -> None:
        async def one_is_done() -> None:
            done = asyncio.Event()
            for future in futures:
                future.add_done_callback(lambda _: done.set())
            await done.wait()

        self.loop.run_until_complete(one_is_done())

    def post(self, callback: Callable[[], object]) -> None:
        callback()

    def close(self) -> list[str]:
        """End the loop; the names of tasks that nobody had ended."""
        left = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
        for task in left:
            task.cancel()
        if left:
            self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.loop.close()
        return [repr(task.get_coro()) for task in left]


class InlineExecutor:
    """Stands in for the device worker: a job takes simulated time, and then runs at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def submit(self, run: Callable[[], Any], **_: Any) -> Any:
        await asyncio.sleep(self.seconds)
        return run()

    def after_this(self, run: Callable[[], None]) -> None:
        run()


class World(LoopbackTransport):
    """Servers by name, their links, and the faults that strike them."""

    def __init__(self, spans: Mapping[str, CallHandler], faults: Sequence[Fault], restart_s: float | None) -> None:
        super().__init__(spans)
        self._all = dict(spans)
        self._faults = {fault.point: [each for each in faults if each.point == fault.point] for fault in faults}
        self._restart_s = restart_s
        self._links: dict[str, list[Link]] = {name: [] for name in spans}
        self._frozen_until: dict[str, float] = {}
        self.armed, self.points, self.struck = False, 0, 0
        self.senders: list[str] = []

    async def _streams(self, caller: str, peer: str) -> tuple[Streams, Streams]:
        link = Link(self, caller, peer)
        for end in {caller, peer} & set(self._links):
            self._links[end].append(link)
        return link.ends[0].streams(), link.ends[1].streams()

    def faults_of(self, end: End) -> list[Fault]:
        """Count one write; what strikes it."""
        if not self.armed:
            return []
        found = self._faults.pop(self.points, [])
        self.points += 1
        self.senders.append(f"{end.link.peer} {'server' if end.number else end.link.caller}")
        self.struck += len(found)
        return found

    def frozen_until(self, peer: str) -> float:
        return self._frozen_until.get(peer, 0.0)

    def freeze(self, peer: str, until: float) -> None:
        self._frozen_until[peer] = until

    def die(self, peer: str) -> None:
        """SIGKILL: all links of a server end, and it comes back later as if it had just been started."""
        self.handlers.pop(peer, None)
        for link in self._links[peer]:
            link.cut()
        self._links[peer].clear()
        if self._restart_s is not None:
            asyncio.get_running_loop().call_later(self._restart_s, self.handlers.__setitem__, peer, self._all[peer])


class Link:
    """One connection: what one end writes arrives at the other, in order, a little later."""

    def __init__(self, world: World, caller: str, peer: str) -> None:
        self.world, self.caller, self.peer, self.stalled_until = world, caller, peer, 0.0
        self.ends = (End(self, 0), End(self, 1))

    def held_until(self) -> float:
        """When what is on the way may arrive, where a frozen end or a stall holds it."""
        return max(self.stalled_until, self.world.frozen_until(self.peer), self.world.frozen_until(self.caller))

    def struck(self, writer: int) -> str:
        """The server that a fault at a write meets: between two servers the one that is to read."""
        return self.caller if writer and self.caller != CLIENT else self.peer

    def cut(self) -> None:
        for end in self.ends:
            end.lose()


class End(asyncio.Transport):
    """One side of a link, as asyncio's streams want it."""

    def __init__(self, link: Link, number: int) -> None:
        super().__init__()
        self.link, self.number = link, number
        self._loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(limit=1 << 22)
        self.protocol = asyncio.StreamReaderProtocol(self.reader)
        self._arriving: deque[tuple[float, bytes]] = deque()
        self._gone = False
        self._delivering = False

    def streams(self) -> Streams:
        self.protocol.connection_made(self)
        return self.reader, asyncio.StreamWriter(self, self.protocol, self.reader, self._loop)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._gone:
            return
        data, other, late_s = bytes(data), self.link.ends[1 - self.number], 0.0
        for fault in self.link.world.faults_of(self):
            passed = {"before": 0, "middle": len(data) // 2, "after": len(data)}[fault.phase]
            other.arrive(data[:passed], late_s)
            data = data[passed:]
            late_s = self._strike(fault, other, late_s, bytes(data))
        other.arrive(data, late_s)

    def _strike(self, fault: Fault, other: End, late_s: float, rest: bytes) -> float:
        world, at = self.link.world, self._loop.time()
        match fault.kind:
            case "kill":
                self._loop.call_later(LATENCY_S, world.die, self.link.struck(self.number))
                return 1e9  # what was not sent before never is
            case "cut":
                self._loop.call_later(LATENCY_S, self.link.cut)
                return 1e9
            case "stall":
                self.link.stalled_until = at + STALL_S
            case "freeze":
                world.freeze(self.link.struck(self.number), at + FREEZE_S)
            case "late":
                return late_s + LATE_S
            case "duplicate":
                other.arrive(other.last, late_s)
        return late_s

    last = b""

    def arrive(self, data: bytes, late_s: float) -> None:
        if not data or late_s >= 1e9:
            return
        self.last = data
        self._arriving.append((self._loop.time() + LATENCY_S + late_s, data))
        self._pump()

    def _pump(self) -> None:
        if self._delivering or not self._arriving or self._gone:
            return
        self._delivering = True
        due = max(self._arriving[0][0], self.link.held_until())
        self._loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        self._delivering = False
        held_until = self.link.held_until()
        if self._arriving and not self._gone and self._loop.time() >= held_until:
            _, data = self._arriving.popleft()
            self.protocol.data_received(data)
        self._pump()

    def lose(self) -> None:
        """The connection ends on this side; what was on its way is lost."""
        if not self._gone:
            self._gone = True
            self._loop.call_soon(self.protocol.connection_lost, ConnectionResetError("the connection was cut"))

    def is_closing(self) -> bool:
        return self._gone

    def close(self) -> None:
        if not self._gone:
            other = self.link.ends[1 - self.number]
            self._loop.call_later(LATENCY_S, other.lose)
        self.lose()

    def abort(self) -> None:
        self.close()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Lines:
    """A history in memory."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._clock = clock

    def write(self, fields: dict[str, Any]) -> None:
        self.lines.append({"t": self._clock(), **fields})

    def close(self) -> None:
        self.write({"event": "close"})


@dataclass(slots=True)
class Outcome:
    """What became of a run of steps."""

    pipelined: bool = False
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    errors: list[SwarmtuneError] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    points: int = 0
    struck: int = 0
    retries: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    left: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    senders: list[str] = field(default_factory=list)


class Simulator:
    """A model and its spans, loaded once; each run is a new world, chain and clock."""

    def __init__(self, path: Path, spans: Sequence[str] = ("0:2", "2:4", "0:2", "2:4"), micro_batch_tokens: int = 20) -> None:
        self._settings = ChainSettings(micro_batch_tokens=micro_batch_tokens, patience_s=30.0)
        with loopback(path, spans, micro_batch_tokens=micro_batch_tokens) as swarm:
            self._model: PreTrainedModel = remote(path, swarm, lora("bloom"))
            set_values([dict(self._model.adapter.named_parameters())])
            self._pipelined = Pipelined(self._model)
            self._one_f_one_b()  # looks, this once, whether the loss can be taken in parts
            (digest,) = swarm._models
        self._digest, self._blocks = digest, self._model.body.num_blocks
        held: dict[str, Span] = {}
        self._parts = []
        for number, span in enumerate(spans):
            handler = make_handler(path, span, executor=_never())
            held.setdefault(span, handler._span)
            self._parts.append((f"peer{number}", handler._info, held[span]))
        self._one_graph_bytes = self._largest_graph()
        self.quiet = self.run([])
        self.expected = {False: self.quiet.grads[0], True: self.run([], pipelined=True).grads[0]}
        self.points = self.quiet.points

    def run(
        self,
        faults: Sequence[Fault],
        *,
        steps: int = 2,
        warm: bool = False,
        cold: bool = False,
        pipelined: bool = False,
        copies: bool = False,
        poor: bool = False,
        tight: bool = False,
        restart_s: float | None = RESTART_S,
        slow: Mapping[str, float] | None = None,
        prepare: Callable[[World, Chain], None] | None = None,
    ) -> Outcome:
        """Steps of which the first begins with the faults armed; with ``warm``, after three that fill what the client knows of call times.

        Args:
            faults: at which points of the steps what happens.
            steps: how many, the first one with armed faults.
            warm: run three steps before.
            cold: cut all connections before, so that they are opened again with the faults armed.
            pipelined: train as the ``LightningModule`` does, 1F1B.
            copies: the client gets what servers hand on to each other, too.
            poor: servers have no room for graphs.
            tight: servers have room for one, so the graphs of other micro-batches are evicted.
            restart_s: when a killed server is back; ``None`` for never.
            slow: how many times as long as the others a server takes from then on, by name.
            prepare: called before the armed steps.
        """
        loop, outcome = InlineLoop(), Outcome(pipelined)
        executors = {name: InlineExecutor(COMPUTE_S) for name, _, _ in self._parts}
        handlers = {name: CallHandler(info, span, executors[name]) for name, info, span in self._parts}  # type: ignore[arg-type]
        for handler in handlers.values():
            handler.clock = loop.loop.time
            handler.graphs.budget_bytes = 0 if poor else self._one_graph_bytes if tight else GRAPH_BYTES
        world, lines = World(handlers, faults, restart_s), Lines(loop.loop.time)
        try:
            directory = Directory(world, HandlerDiscovery(world), self._digest, self._blocks)
            loop.run(directory.refresh())
            settings = replace(self._settings, copies=Copies.ALL) if copies else self._settings
            chain = Chain(world, directory, settings, Ledger(lines))  # type: ignore[arg-type]
            body = self._model.body
            body._loop, body._chain = loop, chain
            one_step = self._one_f_one_b if pipelined else self._all_then_all
            for _ in range(3 * warm):
                one_step()
            if cold:
                loop.run(_quietly(world))
            for name, times in (slow or {}).items():
                executors[name].seconds *= times
            if prepare is not None:
                prepare(world, chain)
            world.armed = True
            for _ in range(steps):
                began = loop.loop.time()
                try:
                    outcome.grads.append(one_step())
                except SwarmtuneError as error:
                    outcome.errors.append(error)
                outcome.seconds.append(loop.loop.time() - began)
            outcome.points, outcome.struck, outcome.retries = world.points, world.struck, chain.counters.retries
            outcome.events = [f"{event.kind} {event.server} {event.span}: {event.detail}" for event in chain.events.latest]
            outcome.senders = world.senders
            loop.run(_quietly(world))
        finally:
            outcome.left = loop.close()
        lines.close()
        outcome.verdict = judge_lines(lines.lines)
        return outcome

    def _largest_graph(self) -> int:
        """Bytes of the largest graph that a micro-batch leaves on a server."""
        sizes: list[int] = []
        stores = [span.graphs for _, _, span in self._parts]
        for store in stores:

            def keep(client: str, graph: Graph, store: Graphs = store) -> int:
                sizes.append(graph.held_bytes)
                return Graphs.keep(store, client, graph)

            store.keep = keep  # type: ignore[method-assign]
        assert not self.run([], steps=1).errors
        for store in stores:
            vars(store).pop("keep", None)
        return max(sizes)

    def _all_then_all(self) -> dict[str, Tensor]:
        return step(self._model, batch())[2]

    def _one_f_one_b(self) -> dict[str, Tensor]:
        self._model.zero_grad()
        loss = self._pipelined(batch())
        assert loss is not None
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in self._model.adapter.named_parameters() if parameter.grad is not None}

    def wrong(self, outcome: Outcome) -> str:
        """What is wrong with an outcome of faults that a step must survive; empty where nothing is."""
        if outcome.errors:
            return f"a step failed: {outcome.errors[0]}"
        for number, grads in enumerate(outcome.grads):
            expected = self.expected[outcome.pipelined]
            bad = [name for name in expected if not torch.equal(grads[name], expected[name])]
            if bad:
                return f"step {number}: {len(bad)} gradients differ, first {bad[0]}"
        if not outcome.verdict.clean:
            return f"the history shows {outcome.verdict}"
        if max(outcome.seconds) > STEP_LIMIT_S:
            return f"a step took {max(outcome.seconds):.0f} simulated seconds"
        return f"tasks were left behind: {outcome.left}" if outcome.left else ""

    def every_fault(self, **how: Any) -> list[Fault]:
        """One of each kind and phase at each point of the first step, which begins as ``how`` says to ``run``."""
        return self._each(range(self.run([], steps=1, **how).points))

    def every_second_fault(self, first: Fault, **how: Any) -> list[Fault]:
        """After ``first``: one of each kind and phase at each later point, those of the retry included."""
        return self._each(range(first.point + 1, self.run([first], steps=1, **how).points))

    @staticmethod
    def _each(points: range) -> list[Fault]:
        return [Fault(point, kind, phase) for point in points for kind, phases in PHASES.items() for phase in phases]

    def random_faults(self, seed: int) -> tuple[list[Fault], dict[str, bool]]:
        """One to four faults of a seed, anywhere in two steps; and how the run begins, for ``run``."""
        source = random.Random(seed)
        points = source.sample(range(self.points + self.points // 2), source.randint(1, 4))
        kinds = sorted(PHASES) + ["kill"] * (len(PHASES) - 1)  # every second one
        faults = [Fault(point, kind := source.choice(kinds), source.choice(PHASES[kind])) for point in sorted(points)]
        chances = {"warm": 0.5, "cold": 0.25, "pipelined": 0.5, "copies": 0.25, "poor": 0.25, "tight": 0.25}
        return faults, {name: source.random() < chance for name, chance in chances.items()}


def _never() -> Any:
    """An executor for a handler that is only taken apart."""
    return InlineExecutor(0.0)


async def _quietly(world: World) -> None:
    """No look-outs that the chain no longer needs, no connections."""
    ours = ("_look", "_check", "_ask", "peers")
    others = asyncio.all_tasks() - {asyncio.current_task()}
    tasks = [task for task in others if any(name in repr(task.get_coro()) for name in ours)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for peer in list(world._pairs):
        for end in world._pairs.pop(peer):
            await end.close()
    await asyncio.sleep(1.0)
