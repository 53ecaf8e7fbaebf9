"""Which server runs which blocks: what the client verified, measured and remembers of faults."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from swarmtune.errors import BlocksUnserved, SwarmMismatch, WireError
from swarmtune.remote.census import clashes_sentence, label, models_sentence, numeric_sentence
from swarmtune.transport.base import NodeLost, Transport, TransportError
from swarmtune.transport.clock import now
from swarmtune.types import BlockSpan, gaps
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.messages import CallKind, Fault, ServerInfo
from swarmtune.wire.relay import PASSES_ON

logger = logging.getLogger(__name__)

INFO_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 30.0
REMEMBERED_S = 900.0
"""A server that was used and is gone is asked for itself so long, whether anybody else still knows of it or not."""
FIRST_BAN_S, MAX_BAN_S = 2.0, 60.0
FORGIVEN_S = 10.0
"""A server that failed is put behind others so long for each fault in a row, or until it has done a call."""
HOP_COST_S = 1e-3
FAMILY_RTT_S = 1e-3
"""Round trip between servers of one family, which are on one LAN, where they have not measured it."""
SMOOTHING = 0.3
HALF_LIFE_S = 60.0
HALF_LIFE_CALLS = 50
"""A server that is not asked may have become faster, so what was measured of it fades: by half in a minute, or in the time of fifty such calls."""
SLOW_TIMES = 3.0
"""A server that takes so many times as long as the quickest for the same blocks is called slow."""
MUCH = 1.25
"""Two servers of which one takes so many times as long as the other are not as fast as each other."""
FIRST_APART_S, APART_S = 2.0, 60.0
"""After so long, two servers that could not reach each other are tried again; doubled each time in a row."""
MAX_SILENT = 32
"""So many servers that stopped answering are kept for the sentence that says why nobody serves a block."""
MIXED = "mixed"
"""Stands for the numeric class of a route that needs servers of several."""


class Discovery(Protocol):
    """Finds peers that say they serve a model, and makes them callable."""

    async def peers(self, model: str) -> set[str]:
        """Peer ids; a hint, never believed."""
        ...


@dataclass(slots=True)
class Peer:
    """A verified server and what was measured of it.

    Attributes:
        rtt_s: round trip of its last description.
        token_block_s: smoothed seconds per token and block, network included; 0 while unknown.
        measured_at: monotonic instant of the last call behind it.
        call_s: what that call took.
        banned_until: monotonic instant before which it is not asked again.
        busy_until: the same, because it said that it has no room.
        faults: in a row.
        doubted: it failed and has not described itself since.
        failed_at: monotonic instant of its last fault.
        generation: of the connection over which it described itself.
    """

    name: str
    info: ServerInfo
    rtt_s: float
    token_block_s: float = 0.0
    measured_at: float = 0.0
    call_s: float = 0.0
    banned_until: float = 0.0
    busy_until: float = 0.0
    faults: int = 0
    doubted: bool = False
    failed_at: float = 0.0
    generation: int = 0

    def usable(self) -> bool:
        """Whether it may be asked now."""
        return now() >= max(self.banned_until, self.busy_until) and not (self.doubted or self.info.draining)

    def pace_s(self) -> float:
        """Seconds per token and block to reckon with."""
        age_s = now() - self.measured_at
        return self.token_block_s * 0.5 ** (age_s / max(HALF_LIFE_S, HALF_LIFE_CALLS * self.call_s))

    def measured(self, sample: float, call_s: float) -> None:
        """Take a call into account."""
        self.token_block_s = sample if not self.token_block_s else (1 - SMOOTHING) * self.token_block_s + SMOOTHING * sample
        self.measured_at, self.call_s = now(), call_s


@dataclass(frozen=True, slots=True)
class Hop:
    """One server and the blocks that it runs on a route."""

    peer: str
    span: BlockSpan
    numeric_class: str


class Directory:
    """The servers of one model. Lives on the loop thread.

    Attributes:
        chained: servers hand on to each other, so routes prefer servers that are near each other.
    """

    def __init__(self, transport: Transport, discovery: Discovery, model: str, num_blocks: int) -> None:
        self._transport, self._discovery = transport, discovery
        self.model, self.num_blocks = model, num_blocks
        self.known: dict[str, Peer] = {}
        self._others: dict[str, ServerInfo] = {}
        self._left_out: dict[str, ServerInfo] = {}
        self._told_classes = False
        self._agreed: dict[int, str] = {}
        self._other_modes: dict[str, ServerInfo] = {}
        self._mode: str | None = None
        self._numeric_class: str | None = None
        self._refreshing = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        self._used_at: dict[str, float] = {}
        self._checking: dict[str, asyncio.Task[None]] = {}
        self._silent: dict[str, str] = {}
        self.chained = False
        self._apart: dict[tuple[str, str], tuple[float, float]] = {}

    @property
    def numeric_class(self) -> str | None:
        """Of the last route; ``mixed`` where it has several, ``None`` before the first."""
        return self._numeric_class

    def weights(self) -> str:
        """One digest of the weights that the servers agree on, block by block."""
        return hashlib.sha256("\n".join(f"{block} {digest}" for block, digest in sorted(self._agreed.items())).encode()).hexdigest()[:16]

    def digest_of(self, block: int) -> str | None:
        """What the servers agree that a block's weights are; ``None`` for a block that nobody has served so far."""
        return self._agreed.get(block)

    def holders(self) -> dict[str, ServerInfo]:
        """The servers in use now: peer to what it says of itself."""
        return {name: peer.info for name, peer in list(self.known.items())}

    async def refresh(self) -> None:
        """Ask discovery for peers, and each peer for itself.

        Raises:
            SwarmMismatch: two servers hold different weights for one block.
        """
        async with self._refreshing:
            if not self._agreed:  # which of two that differ is right nobody knows yet: hear all of them first
                names = sorted(await self._discovery.peers(self.model) | set(self.known))
                for name, answer in zip(names, await asyncio.gather(*(self._ask(name) for name in names)), strict=True):
                    self._learn(name, answer)
                self._settle()
                return
            await self._refresh_each()

    async def _refresh_each(self) -> None:
        """Ask those that are known, or were used, while discovery looks for others; each is taken in as soon as it has answered."""
        remembered = {name for name, used_at in self._used_at.items() if now() - used_at < REMEMBERED_S}
        banned = {name for name, peer in self.known.items() if now() < peer.banned_until}
        asking = {asyncio.create_task(self._ask(name)): name for name in sorted((remembered | set(self.known)) - banned)}
        finding: asyncio.Task[set[str]] | None = asyncio.create_task(self._discovery.peers(self.model))
        try:
            while asking or finding is not None:
                waited = {*asking, *([finding] if finding is not None else [])}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if finding is not None and finding.done():
                    found, finding = finding.result() - banned - remembered - set(self.known), None
                    asking |= {asyncio.create_task(self._ask(name)): name for name in sorted(found)}
                for task in [task for task in asking if task.done()]:
                    self._learn(asking.pop(task), task.result())
                self._settle()
        finally:
            for left in (*asking, *([finding] if finding is not None else [])):
                left.cancel()

    def _settle(self) -> None:
        self._leave_out_other_modes()
        self._check_weights()
        self._tell_classes()

    def keep_mode(self, mode: str) -> None:
        """From now on, use only servers that compute in ``mode`` (``ServerInfo.mode``): a failover must not change more than the last digits."""
        self._mode = mode
        self._leave_out_other_modes()
        self._tell_classes()

    def route(self, start: int, stop: int, tokens: int = 0, lane: int = 0) -> list[Hop]:
        """The cheapest usable servers for blocks ``start:stop``; within one numeric class where that is possible, else within one mode.

        Lanes stay away from each other: for lane 1, what the servers of lane 0 have to do counts twice, and so on.

        Raises:
            BlocksUnserved: nobody usable holds some of them.
        """
        usable = [peer for peer in self.known.values() if peer.usable()]
        # A peer that failed must describe itself before it is asked again, more often the more it failed, or when nobody else is there.
        for candidates in ([peer for peer in usable if not peer.faults], usable):
            hops = self._route_among(candidates, start, stop, tokens, lane)
            if hops is not None:
                return hops
        raise self._unserved(start, stop)

    def _route_among(self, candidates: list[Peer], start: int, stop: int, tokens: int, lane: int) -> list[Hop] | None:
        quantised = {peer.info.numeric_class: peer.info.quantisation != "none" for peer in candidates}
        classes = sorted(quantised, key=lambda name: (name != self._numeric_class, quantised[name], name))
        for numeric_class in classes:
            hops = self._of_lane([peer for peer in candidates if peer.info.numeric_class == numeric_class], start, stop, tokens, lane)
            if hops is not None:
                self._prefer(numeric_class)
                return hops
        modes = sorted({(peer.info.quantisation != "none", peer.info.mode) for peer in candidates})
        for among in (*([peer for peer in candidates if peer.info.mode == mode] for _, mode in modes), candidates):
            hops = self._of_lane(among, start, stop, tokens, lane)
            if hops is not None:
                self._prefer(MIXED)
                return hops
        return None

    def _of_lane(self, peers: list[Peer], start: int, stop: int, tokens: int, lane: int) -> list[Hop] | None:
        """The route of a lane, given those of the lanes before it."""
        crowd: Counter[str] = Counter()
        hops = _cheapest(peers, start, stop, tokens, self.chained, crowd)
        for _ in range(lane):
            crowd.update(hop.peer for hop in hops or ())
            hops = _cheapest(peers, start, stop, tokens, self.chained, crowd)
        return hops

    def usable(self, hops: Sequence[Hop]) -> bool:
        """Whether all of these may be asked now."""
        return all(self.holder(hop.peer, hop.span) is not None for hop in hops)

    def all_usable(self) -> bool:
        """Whether nobody who is known is left alone for a while."""
        return all(peer.usable() for peer in self.known.values())

    def holder(self, name: str, span: BlockSpan) -> Hop | None:
        """One server as the route of ``span``, if it may be asked for it now."""
        peer = self.known.get(name)
        return Hop(name, span, peer.info.numeric_class) if peer is not None and peer.usable() and peer.info.span.covers(span) else None

    def apart(self, name: str, other: str) -> None:
        """One server could not reach another one: what goes between them goes by way of us for a while."""
        until, seconds = self._apart.get((name, other), (-math.inf, FIRST_APART_S / 2))
        if now() >= until:  # of several calls that find it out at once, the first counts
            seconds = min(APART_S, 2 * seconds)
            self._apart[name, other] = now() + seconds, seconds

    def together(self, name: str, other: str) -> None:
        """One server has reached another one."""
        self._apart.pop((name, other), None)

    def in_touch(self, hops: Sequence[Hop]) -> bool:
        """Whether each of these can hand on to the next, as far as is known."""
        pairs = itertools.pairwise(hop.peer for hop in hops)
        return all(self.has(hop.peer, PASSES_ON) for hop in hops) and all(pair not in self._apart or now() >= self._apart[pair][0] for pair in pairs)

    def has(self, name: str, feature: str) -> bool:
        """Whether a server has said that it can do something that others cannot."""
        peer = self.known.get(name)
        return peer is not None and feature in peer.info.features

    def succeeded(self, hop: Hop, seconds: float, tokens: int) -> None:
        """Remember how long a call took; the peer is trusted again."""
        peer = self.known.get(hop.peer)
        if peer is not None:
            peer.faults, peer.banned_until = 0, 0.0
            peer.measured(seconds / (tokens * len(hop.span)), seconds)
            self._used_at[hop.peer] = now()

    def failed(self, name: str) -> None:
        """Leave a peer alone for a while, longer each time in a row."""
        peer = self.known.get(name)
        if peer is not None:
            peer.faults, peer.doubted, peer.failed_at = peer.faults + 1, True, now()
            peer.banned_until = now() + min(MAX_BAN_S, FIRST_BAN_S * 2 ** min(peer.faults - 1, 8))
        self.look()

    def slow(self, hop: Hop, seconds: float, tokens: int) -> None:
        """A call was given up after ``seconds``: it takes at least as long there; others go first for a while."""
        peer = self.known.get(hop.peer)
        if peer is not None:
            peer.measured(max(seconds / (tokens * len(hop.span)), peer.token_block_s), seconds)
            peer.banned_until = now() + FIRST_BAN_S

    def busy(self, name: str, retry_s: float) -> None:
        """Leave a server alone for as long as it asks; that is no fault of it."""
        if (peer := self.known.get(name)) is not None:
            peer.busy_until = now() + retry_s

    def draining(self, name: str) -> None:
        """A server takes no new work until it says otherwise."""
        if (peer := self.known.get(name)) is not None:
            peer.info = replace(peer.info, draining=True)

    def busy_s(self, span: BlockSpan) -> float | None:
        """Seconds until a busy server that holds some of ``span`` may be asked again; ``None`` where there is none."""
        waits = [peer.busy_until - now() for peer in self.known.values() if span.overlap(peer.info.span) and now() >= peer.banned_until]
        return min((seconds for seconds in waits if seconds > 0), default=None)

    def others_can(self, hop: Hop) -> bool:
        """Whether servers that may be asked now could do the work of ``hop`` without its own."""
        others = [peer for peer in self.known.values() if peer.name != hop.peer and peer.usable()]
        return _cheapest(others, hop.span.start, hop.span.stop, 0) is not None

    def times_slower(self, left: str, taken: str) -> float | None:
        """How many times as long a server that could be asked takes as another one, where that is why it was left."""
        slow, fast = self.known.get(left), self.known.get(taken)
        if slow is None or fast is None or slow.faults or not slow.usable() or not fast.token_block_s:
            return None
        times = slow.pace_s() / fast.token_block_s
        return times if times >= MUCH else None

    def slow_peers(self) -> list[str]:
        """Servers that take much longer than another one of the same blocks; from any thread."""
        measured = [peer for peer in list(self.known.values()) if peer.token_block_s]
        return [
            peer.name
            for peer in measured
            if any(
                other.info.span.overlap(peer.info.span) and peer.token_block_s >= SLOW_TIMES * other.token_block_s
                for other in measured
                if other is not peer
            )
        ]

    @property
    def blind(self) -> bool:
        """Whether our own way into the network is broken, so that a silence says nothing about a server."""
        return self._transport.repairing

    def same(self, name: str) -> bool:
        """Whether the connection to a server is still the one over which it described itself."""
        peer = self.known.get(name)
        return peer is not None and peer.generation == self._transport.generation(name) != 0

    def doubt(self, name: str) -> None:
        """A server has to describe itself before it is asked again; that is no fault of it."""
        if (peer := self.known.get(name)) is not None:
            peer.doubted = True
        self.look()

    def look(self) -> None:
        """Ask servers for themselves in the background: all, unless that goes on already, and each that has to say who it is first."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        for name, peer in self.known.items():
            if peer.doubted and now() >= peer.banned_until and name not in self._checking:
                self._checking[name] = asyncio.create_task(self._check(name))

    async def _check(self, name: str) -> None:
        try:
            answer = await self._ask(name)
        finally:
            self._checking.pop(name, None)
        self._learn(name, answer)
        try:
            self._settle()
        except SwarmMismatch as error:
            logger.warning("%s", error)

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self.refresh()
        except (SwarmMismatch, TimeoutError) as error:
            logger.warning("%s", error or "the swarm did not answer a look-out in time")

    def _prefer(self, numeric_class: str) -> None:
        if self._numeric_class == MIXED:
            return  # every step would go back and forth between its classes; that they differ has been said
        if self._numeric_class not in (None, numeric_class):
            logger.warning(
                "the numeric class of the route changed from %s to %s: results can differ in the last digits", self._numeric_class, numeric_class
            )
        self._numeric_class = numeric_class

    async def _ask(self, name: str) -> tuple[ServerInfo, float, int] | str | None:
        """What a server says of itself, the round trip, the connection's generation; why it says nothing; ``None`` where that is our fault."""
        began = now()
        try:
            reply = decode(await self._transport.call(name, encode(Message(CallKind.INFO), answer_bytes=0), INFO_TIMEOUT_S))
            if reply.kind == "fault":
                return Fault.from_message(reply).detail
            if reply.kind != "info":
                return f"peer {name} answered {reply.kind!r:.80} when asked to describe itself"
            return ServerInfo.from_json(reply.fields), now() - began, self._transport.generation(name)
        except NodeLost:
            return None
        except (TransportError, WireError) as error:
            return str(error)

    def _learn(self, name: str, answer: tuple[ServerInfo, float, int] | str | None) -> None:
        if answer is None:
            return
        self._others.pop(name, None)
        if isinstance(answer, str):
            logger.debug("peer %s did not describe itself: %s", name, answer)
            if self.known.pop(name, None) is not None or name in self._used_at:
                self._silent[name] = answer
            while len(self._silent) > MAX_SILENT:
                self._silent.pop(next(iter(self._silent)))
            return
        info, rtt_s, generation = answer
        self._silent.pop(name, None)
        if info.model != self.model or info.num_blocks != self.num_blocks:
            self.known.pop(name, None)
            self._others[name] = info
            return
        peer = self.known.get(name)
        if peer is None:
            self.known[name] = Peer(name, info, rtt_s, generation=generation)
        else:
            peer.info, peer.rtt_s, peer.doubted, peer.generation = info, rtt_s, False, generation
            if peer.faults and now() - peer.failed_at >= FORGIVEN_S * peer.faults:
                peer.faults -= 1  # to describe itself well is not enough: some do that and fail every call

    def _check_weights(self) -> None:
        """Servers of one block must hold the same weights. At first nobody knows which are right; later, a server that differs is left out."""
        if not self._agreed and (clashes := clashes_sentence(self.holders())):
            raise SwarmMismatch(
                f"servers of model {self.model} hold different weights for {clashes}: stop those with the wrong checkpoint, or connect to a swarm "
                "without them; swarmtune doctor --peer ADDRESS lists who holds what"
            )
        agreed = dict(self._agreed)
        for peer in sorted(self.known.values(), key=lambda peer: peer.name):
            held = dict(enumerate(peer.info.block_digests, peer.info.span.start))
            clash = next((block for block, digest in held.items() if agreed.get(block, digest) != digest), None)
            if clash is None:
                agreed.update(held)
                self._left_out.pop(peer.name, None)
                continue
            del self.known[peer.name]
            if peer.name not in self._left_out:
                logger.warning(
                    "server %s holds other weights for block %d than the servers so far: leaving it out", label(peer.name, peer.info), clash
                )
            self._left_out[peer.name] = peer.info
        self._agreed = agreed

    def _tell_classes(self) -> None:
        """Say once that failover between these servers can change the last digits, and why."""
        infos = self.holders()
        count = len({info.numeric_class for info in infos.values()})
        if self._mode is None or count < 2 or self._told_classes:
            return
        self._told_classes = True
        logger.warning(
            "the servers of this model compute in %d numeric classes (%s): the run goes on, but a call that moves from one class to another can "
            "differ in the last digits, so a repeated run need not give the same bits; start all servers alike to avoid it",
            count,
            numeric_sentence(infos),
        )

    def _leave_out_other_modes(self) -> None:
        """Once a run has begun in one mode, servers of another one are strangers."""
        for peer in [peer for peer in self.known.values() if self._mode not in (None, peer.info.mode)]:
            del self.known[peer.name]
            if peer.name not in self._other_modes or self._other_modes[peer.name].mode != peer.info.mode:
                logger.warning("server %s computes in %s, this run in %s: leaving it out", label(peer.name, peer.info), peer.info.mode, self._mode)
            self._other_modes[peer.name] = peer.info

    def _unserved(self, start: int, stop: int) -> BlocksUnserved:
        trusted = sorted((peer for peer in self.known.values() if not peer.faults), key=lambda peer: (peer.info.span, peer.name))
        missing = [hole for span in gaps([peer.info.span for peer in trusted], self.num_blocks) if (hole := span.overlap(BlockSpan(start, stop)))]
        served = "; ".join(f"{peer.info.span} by {peer.info.name or peer.name}" for peer in trusted)
        detail = f"nobody serves blocks {', '.join(map(str, missing or [BlockSpan(start, stop)]))} of 0:{self.num_blocks}; "
        detail += f"served: {served}" if served else "no server of this model answers"
        if self._silent:
            detail += f"; of those known before, {len(self._silent)} did not answer when asked again: {list(self._silent.values())[-1][:400]}"
        if self._others:
            detail += f" (the swarm holds other models: {models_sentence(self._others)}; this model is {self.model} with {self.num_blocks} blocks)"
        if self._left_out:
            detail += f" (left out for other weights: {', '.join(sorted(label(name, info) for name, info in self._left_out.items()))})"
        if self._other_modes:
            modes = sorted(f"{label(name, info)} in {info.mode}" for name, info in self._other_modes.items())
            detail += f" (this run computes in {self._mode}; left out: {', '.join(modes)})"
        if self._others or self._left_out or self._other_modes:
            detail += "; swarmtune doctor --peer ADDRESS lists who serves what"
        return BlocksUnserved(detail, tuple(missing))


def _cheapest(
    peers: list[Peer], start: int, stop: int, tokens: int, chained: bool = False, crowd: Mapping[str, int] | None = None
) -> list[Hop] | None:
    """Shortest path over block boundaries and the servers that end there; ties go to fewer hops, then to the peer's name.

    Args:
        peers: who may be asked.
        start: first block.
        stop: behind the last one.
        tokens: of a call; 0 counts only what the network takes.
        chained: servers hand on to each other, so what is between them counts, and of the way to us only that to the first and from the last one.
        crowd: by peer id, how many others have the same to do there; its work counts as many times more.
    """
    best: dict[int, dict[str, _Reached]] = {start: {"": _Reached(0.0, (), ())}}
    for position in range(start, stop):
        for peer in peers if position in best else ():
            if position not in peer.info.span:
                continue
            span = BlockSpan(position, min(stop, peer.info.span.stop))
            hop, share = Hop(peer.name, span, peer.info.numeric_class), 1 + (crowd or {}).get(peer.name, 0)
            work_s = HOP_COST_S + peer.pace_s() * tokens * len(span)
            for reached in best[position].values():
                total_s = reached.cost_s + share * (work_s + _way_s(reached.peers[-1] if reached.peers else None, peer, chained))
                candidate = _Reached(total_s, (*reached.peers, peer), (*reached.hops, hop))
                ends = best.setdefault(span.stop, {})
                if peer.name not in ends or candidate.order() < ends[peer.name].order():
                    ends[peer.name] = candidate
    if stop not in best:
        return None
    last_way_s = {name: reached.peers[-1].rtt_s / 2 if chained and reached.peers else 0.0 for name, reached in best[stop].items()}
    return list(min(best[stop].items(), key=lambda item: (item[1].cost_s + last_way_s[item[0]], *item[1].order()[1:]))[1].hops)


@dataclass(frozen=True, slots=True)
class _Reached:
    """A way to a block boundary."""

    cost_s: float
    peers: tuple[Peer, ...]
    hops: tuple[Hop, ...]

    def order(self) -> tuple[float, int, tuple[str, ...]]:
        return self.cost_s, len(self.hops), tuple(hop.peer for hop in self.hops)


def _way_s(before: Peer | None, peer: Peer, chained: bool) -> float:
    """Seconds for which hidden states travel before ``peer`` has them, and without chains until we have its output."""
    if not chained:
        return peer.rtt_s
    return (peer.rtt_s if before is None else _between_s(before, peer)) / 2


def _between_s(peer: Peer, other: Peer) -> float:
    """Round trip between two servers: as they say, else short within a family, else as if we were half-way."""
    said = peer.info.round_trips.get(other.name) or other.info.round_trips.get(peer.name)
    if said:
        return said / 1e6
    return FAMILY_RTT_S if peer.info.family and peer.info.family == other.info.family else (peer.rtt_s + other.rtt_s) / 2
