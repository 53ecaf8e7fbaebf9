"""The client's connection to a swarm: one loop thread, one daemon, one DHT node, and a directory of servers per model."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from swarmtune.errors import BlocksUnserved, PeersUnreachable, SwarmMismatch, UsageError, WireError
from swarmtune.remote.caller import Codecs
from swarmtune.remote.census import label
from swarmtune.remote.chain import Chain, ChainSettings
from swarmtune.remote.events import EventKind, EventLog, SwarmEvent, SwarmStatus, Tally
from swarmtune.remote.ledger import History, Ledger
from swarmtune.remote.route import Directory, Discovery
from swarmtune.remote.totals import ServerTotals
from swarmtune.transport.base import Traffic, Transport, TransportError
from swarmtune.transport.loop import LoopThread
from swarmtune.types import MAX_LANES, Copies, Pipeline
from swarmtune.wire.compression import Codec

if TYPE_CHECKING:
    from types import TracebackType

    from swarmtune.discovery.dht import DirectoryNode
    from swarmtune.transport.hivemind import HivemindNode
    from swarmtune.wire.messages import ServerInfo

logger = logging.getLogger(__name__)
Choice = TypeVar("Choice", bound=StrEnum)
REFRESH_EVERY_S = 10.0
RETRY_EVERY_S = 0.3
ONE_MODE_PATIENCE_S = 15.0
"""Servers are found one after the other, so a route of several modes may be the first one: so long a better one is looked for."""
GRACE_S = 1.0
"""Once a peer answers, the others have so long to do so too; after that they are waited for in the background."""
MAX_LOOKUPS = 3


@dataclass(frozen=True, slots=True)
class SwarmTraffic:
    """Running totals of a connection.

    Attributes:
        bytes_up: sent to servers, frames and headers included.
        bytes_down: received from servers.
        calls: forwards and backwards asked for.
        retries: calls that had to be asked again.
        wait_s: seconds that callers waited for the swarm.
        servers: what each server did, in the order in which they were first asked.
        payload: bytes of tensors in messages, by direction and kind (``up hidden``, ``down kwarg gradients``).
        events: how often something went wrong, and what it cost, by kind.
        compiled: forwards, and backwards that ran forward again, which compiled code has done.
    """

    bytes_up: int
    bytes_down: int
    calls: int
    retries: int
    wait_s: float
    servers: tuple[ServerTotals, ...]
    payload: Mapping[str, int] = field(default_factory=dict)
    events: Mapping[EventKind, Tally] = field(default_factory=dict)
    compiled: int = 0


@dataclass(frozen=True, slots=True)
class OpenModel:
    """One model on a swarm.

    Attributes:
        dtype: what its servers compute in.
        quantisation: ``none``, or what its servers hold the weights in.
        mode: both in words, see ``ServerInfo.mode``.
    """

    chain: Chain
    directory: Directory
    dtype: str
    quantisation: str = "none"
    mode: str = ""


class Swarm:
    """A connection; a context manager. ``connect`` makes one."""

    def __init__(self, loop: LoopThread, transport: Transport, discovery: Discovery, settings: ChainSettings, ledger: Ledger | None = None) -> None:
        self.loop, self.settings = loop, settings
        self._ledger = ledger or Ledger()
        self._own_events = EventLog()
        self._transport, self._discovery = transport, discovery
        self._models: dict[str, OpenModel] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def open_model(self, digest: str, num_blocks: int) -> OpenModel:
        """Find the servers of a model; all its blocks must be served within the patience.

        Raises:
            BlocksUnserved: some blocks have no server.
            SwarmMismatch: the servers hold different weights or compute in different types.
        """
        if digest not in self._models:
            self._models[digest] = self.loop.run(self._open(digest, num_blocks))
        return self._models[digest]

    def traffic(self) -> SwarmTraffic:
        """Bytes, calls and retries so far."""
        totals: Traffic = self._transport.traffic
        counters = [opened.chain.counters for opened in self._models.values()]
        return SwarmTraffic(
            bytes_up=totals.bytes_up,
            bytes_down=totals.bytes_down,
            calls=sum(each.calls for each in counters),
            retries=sum(each.retries for each in counters),
            wait_s=sum(each.wait_s for each in counters),
            servers=tuple(replace(server) for each in counters for server in list(each.servers.values())),
            payload=dict(sum((each.payload for each in counters), Counter())),
            events={kind: _sum(log.by_kind[kind] for log in self._logs()) for kind in EventKind},
            compiled=sum(each.compiled for each in counters),
        )

    def status(self) -> list[SwarmStatus]:
        """What goes on now, one for each model opened; from any thread, also while a call waits."""
        return [opened.chain.status() for opened in list(self._models.values())]

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside, nothing is compressed: to see what a codec does."""
        callers = [opened.chain.caller for opened in self._models.values()]
        before = [caller.codecs for caller in callers]
        try:
            for caller in callers:
                caller.codecs = Codecs()
            yield
        finally:
            for caller, codecs in zip(callers, before, strict=True):
                caller.codecs = codecs

    def events(self, after: float = 0.0) -> list[SwarmEvent]:
        """The latest things that went wrong, oldest first; those after a monotonic instant."""
        return sorted((event for log in self._logs() for event in list(log.latest) if event.at > after), key=lambda event: event.at)

    def _logs(self) -> list[EventLog]:
        return [self._own_events, *(opened.chain.events for opened in list(self._models.values()))]

    def daemon_replaced(self, sentence: str, seconds: float) -> None:
        """Remember that this process needed another p2p daemon."""
        logger.warning("%s", sentence)
        self._own_events.add(EventKind.DAEMON, sentence, lost_s=seconds)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the results of the models opened so far: digests of configurations and weights, and the servers' modes and numeric classes."""
        opened = sorted(self._models.items())
        return {
            "model": [digest for digest, _ in opened],
            "weights": [model.directory.weights() for _, model in opened],
            "mode": [model.mode for _, model in opened],
            "numeric": [model.directory.numeric_class or "unknown" for _, model in opened],
        }

    def close(self) -> None:
        """End the connection. Safe to repeat."""
        self.loop.close()
        self._ledger.close()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _open(self, digest: str, num_blocks: int) -> OpenModel:
        directory = Directory(self._transport, self._discovery, digest, num_blocks)
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self.settings.patience_s
        one_mode_by = min(ends_at, loop.time() + ONE_MODE_PATIENCE_S)
        while True:
            try:
                async with asyncio.timeout_at(ends_at):
                    await directory.refresh()
                infos = {hop.peer: directory.known[hop.peer].info for hop in directory.route(0, num_blocks)}
                if len({info.mode for info in infos.values()}) == 1:
                    break
                if loop.time() + RETRY_EVERY_S >= one_mode_by:
                    raise _mixed_modes(infos)
            except (BlocksUnserved, TimeoutError) as error:
                if loop.time() + RETRY_EVERY_S >= ends_at:
                    if isinstance(error, BlocksUnserved):
                        raise
                    raise PeersUnreachable(f"the peers did not answer within {self.settings.patience_s:.0f} s") from error
            await asyncio.sleep(RETRY_EVERY_S)
        first = next(iter(infos.values()))
        directory.keep_mode(first.mode)
        if first.quantisation != "none":
            logger.info("the servers compute in %s", first.mode)
        task = asyncio.create_task(self._keep_fresh(directory))
        self._tasks.add(task)
        return OpenModel(Chain(self._transport, directory, self.settings, self._ledger), directory, first.dtype, first.quantisation, first.mode)

    async def _keep_fresh(self, directory: Directory) -> None:
        while True:
            await asyncio.sleep(REFRESH_EVERY_S)
            try:
                async with asyncio.timeout(REFRESH_EVERY_S * 3):
                    await directory.refresh()
            except (SwarmMismatch, TimeoutError) as error:
                logger.warning("%s", error or "the swarm did not answer a refresh in time")


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.count, total.lost_s = total.count + tally.count, total.lost_s + tally.lost_s
    return total


def _mixed_modes(infos: Mapping[str, ServerInfo]) -> SwarmMismatch:
    modes = sorted({info.mode for info in infos.values()})
    who = "; ".join(f"{label(peer, info)} in {info.mode}" for peer, info in infos.items())
    return SwarmMismatch(f"the servers on the route compute in {' and '.join(modes)} ({who}): start them with one dtype and one quantize")


class HivemindDiscovery:
    """Peers from the DHT, and the initial peers themselves. Dials go on in the background, so that a dead address holds nobody up.

    Attributes:
        refusals: by initial address, why its peer could not be reached.
    """

    def __init__(self, node: HivemindNode, directory: DirectoryNode, initial_peers: Mapping[str, str]) -> None:
        """``initial_peers`` holds addresses, each with its peer id."""
        self._node, self._directory = node, directory
        self._initial = dict(initial_peers)
        self._dials: dict[str, asyncio.Task[str | None]] = {}
        self._joined = False
        self._told: set[str] = set()
        self.refusals: dict[str, str] = {}

    async def dial_initial(self) -> set[str]:
        """Reach for the initial peers that are not connected; returns those that are, once one is and the others had a moment to be.

        Where none answers, all dials are waited for; where one was connected before, none is.
        """
        connected = await self._node.connected() or set()
        dials = self._start_dials(self._initial, connected)
        reached = connected & set(self._initial.values())
        while dials and not reached:
            done, dials = await asyncio.wait(dials, return_when=asyncio.FIRST_COMPLETED)
            reached |= _reached(done)
            if reached and dials:
                done, dials = await asyncio.wait(dials, timeout=GRACE_S)
                reached |= _reached(done)
        return reached

    async def peers(self, model: str) -> set[str]:
        """See ``Discovery.peers``."""
        initial, announced = await asyncio.gather(self.dial_initial(), self._announced(model))
        return initial | announced

    def joined(self) -> None:
        """From now on, an initial peer that cannot be reached is left out with a warning."""
        self._joined = True
        for address in self._initial:
            self._tell(address)

    def close(self) -> None:
        """End the dials that are under way."""
        for dial in list(self._dials.values()):
            dial.cancel()

    async def _announced(self, model: str) -> set[str]:
        """Servers that are announced and connected. A look-up that led to new ones is repeated: they may know of more."""
        named: set[str] = set()
        await self._greet_initial()
        for _ in range(MAX_LOOKUPS):
            try:
                announcements = await self._directory.find(model)
            except TransportError as error:
                logger.debug("%s", error)
                break
            named |= {announcement.peer for announcement in announcements}
            addresses = {address: announcement.peer for announcement in announcements for address in announcement.addresses}
            dials = self._start_dials(addresses, await self._node.connected() or set())
            if not dials:
                break
            done, _ = await asyncio.wait(dials, timeout=GRACE_S)
            if not _reached(done):
                break
        return named & (await self._node.connected() or set())

    async def _greet_initial(self) -> None:
        """Without anybody to ask, this node's part of the DHT finds nothing: the first greeting may have met a peer that was not up yet."""
        connected = await self._node.connected() or set()
        strangers = [peer for peer in set(self._initial.values()) & connected if not self._directory.knows(peer)]
        for answer in await asyncio.gather(*(self._directory.greet(peer) for peer in strangers), return_exceptions=True):
            if isinstance(answer, TransportError):
                logger.debug("%s", answer)
            elif isinstance(answer, BaseException):
                raise answer

    def _start_dials(self, addresses: Mapping[str, str], connected: set[str]) -> set[asyncio.Task[str | None]]:
        """The dials under way to ``addresses``, those of peers that are neither connected nor being dialled started now."""
        for address, peer in addresses.items():
            if peer not in connected and address not in self._dials:
                self._dials[address] = asyncio.create_task(self._try(address, peer))
        return {self._dials[address] for address, peer in addresses.items() if address in self._dials and peer not in connected}

    async def _try(self, address: str, peer: str) -> str | None:
        """Dial an address; strangers' addresses may lead nowhere."""
        try:
            await self._node.connect(address)
        except TransportError as error:
            logger.debug("%s", error)
            if address in self._initial and peer not in (await self._node.connected() or ()):
                self.refusals[address] = str(error)
                if self._joined:
                    self._tell(address)
            return None
        finally:
            self._dials.pop(address, None)
        for known in self._initial:
            if self._initial[known] == peer:
                self.refusals.pop(known, None)
                self._told.discard(known)
        return peer

    def _tell(self, address: str) -> None:
        if address in self.refusals and address not in self._told:
            self._told.add(address)
            logger.warning("an initial peer is left out, the run goes on without it: %s", self.refusals[address])


def _reached(dials: Iterable[asyncio.Task[str | None]]) -> set[str]:
    """The peers that ended dials led to."""
    return {peer for dial in dials if (peer := dial.result()) is not None}


def _choice(name: str, kind: type[Choice], value: str) -> Choice:
    if value not in kind._value2member_map_:
        raise UsageError(f"{name} must be one of {', '.join(kind)}, got {value!r}")
    return kind(value)


def connect(
    initial_peers: Sequence[str],
    *,
    micro_batch_tokens: int = 4096,
    max_in_flight: int = 4,
    in_flight_gib: float = 1.0,
    pipeline: str = "1f1b",
    lanes: int = 1,
    compile: str = "none",
    patience_s: float = 30.0,
    call_timeout_s: float = 300.0,
    chaining: bool = True,
    copies: str = "auto",
    codec: str = "none",
    grad_codec: str | None = None,
    credentials: None = None,
    history: str | os.PathLike[str] | None = None,
) -> Swarm:
    """Connect to a swarm.

    Args:
        initial_peers: multiaddresses of some servers, such as ``/ip4/10.0.0.1/tcp/31337/p2p/12D3Koo...``; one that answers is enough.
        micro_batch_tokens: a batch is cut into micro-batches of at most this many tokens (at least one row each).
        max_in_flight: micro-batches under way at once.
        in_flight_gib: GiB of their hidden states, what goes and what comes; one micro-batch is under way in any case.
        pipeline: how the ``LightningModule`` overlaps micro-batches: ``"1f1b"`` or ``"gpipe"``. A call of the model is always ``"gpipe"``.
        patience_s: how long a call looks for a server before it raises ``SwarmError``.
        call_timeout_s: how long one call to a live server may take.
        chaining: servers hand hidden states and gradients on to each other where they can; the bits do not depend on it.
        copies: whether the client gets what they hand on, too, so that a backward whose graph was lost need not begin at the first server of the
            chain: ``"all"``, ``"none"``, or ``"auto"``, where a server of the chain has lately lost a graph or kept none. Same bits.
        lanes: micro-batches go in turns over so many routes, where there are replicas; gradients are added by lane, so the last digits depend on it.
        compile: ``"auto"`` lets servers run compiled blocks once they have compiled them, in the background; their last digits are others.
        codec: how hidden states travel: ``"none"`` (exact), ``"bf16"``, ``"fp16"`` or ``"int8"``.
        grad_codec: the same for their gradients; as ``codec`` if not given.
        credentials: must be ``None``; swarms with admission are not supported.
        history: a file to which every call is appended, asked and answered, as JSON lines that ``scripts/chaos judge`` reads.

    Raises:
        UsageError: an address or a setting is wrong.
        PeersUnreachable: none of the peers answered within the patience.
    """
    from swarmtune.discovery.records import check_address

    if isinstance(initial_peers, str) or not initial_peers:
        raise UsageError("initial_peers must be a list of at least one multiaddress, such as ['/ip4/10.0.0.1/tcp/31337/p2p/12D3Koo...']")
    try:
        addresses = list(dict.fromkeys(check_address(address) for address in initial_peers))
    except WireError as error:
        raise UsageError(f"initial_peers: {error}") from error
    if credentials is not None:
        raise UsageError("credentials must be None: swarms with admission are not supported")
    codecs = Codecs(_choice("codec", Codec, codec), _choice("grad_codec", Codec, codec if grad_codec is None else grad_codec))
    if not isinstance(lanes, int) or isinstance(lanes, bool) or not 1 <= lanes <= MAX_LANES:
        raise UsageError(f"lanes must be an integer from 1 to {MAX_LANES}, got {lanes!r}")
    for name, value in {"micro_batch_tokens": micro_batch_tokens, "max_in_flight": max_in_flight}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} must be a positive integer, got {value!r}")
    if not isinstance(chaining, bool):
        raise UsageError(f"chaining must be True or False, got {chaining!r}")
    if copies == Copies.ALL and not chaining:
        raise UsageError("copies='all' asks for what servers hand on to each other, and with chaining=False they hand on nothing: use one of the two")
    for name, seconds in {"patience_s": patience_s, "call_timeout_s": call_timeout_s}.items():
        if not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
            raise UsageError(f"{name} must be a number of seconds above 0 and below a million, got {seconds!r}")
    if not isinstance(in_flight_gib, int | float) or isinstance(in_flight_gib, bool) or not 0 < in_flight_gib < 1e6:
        raise UsageError(f"in_flight_gib must be a number above 0 and below a million, got {in_flight_gib!r}")
    if compile not in ("none", "auto"):
        raise UsageError(f"compile must be none or auto, got {compile!r}")
    settings = ChainSettings(
        micro_batch_tokens,
        max_in_flight,
        float(patience_s),
        float(call_timeout_s),
        chaining,
        codecs,
        in_flight_bytes=int(in_flight_gib * (1 << 30)),
        pipeline=_choice("pipeline", Pipeline, pipeline),
        lanes=lanes,
        compile=compile == "auto",
        copies=_choice("copies", Copies, copies),
    )
    ledger = Ledger(History(history) if history is not None else None)
    loop = HivemindLoop()
    loop.start()
    try:
        node, discovery = loop.run(loop.join(addresses, settings.patience_s))
    except BaseException:
        loop.close()
        ledger.close()
        raise
    swarm = Swarm(loop, node, discovery, settings, ledger)
    node.told = swarm.daemon_replaced
    return swarm


class HivemindLoop(LoopThread):
    """A loop thread that owns a daemon and a DHT node, and takes them along when it closes."""

    _node: HivemindNode | None = None
    _directory: DirectoryNode | None = None
    _discovery: HivemindDiscovery | None = None

    async def join(self, addresses: list[str], patience_s: float) -> tuple[HivemindNode, HivemindDiscovery]:
        """Start a client node and reach at least one of ``addresses``.

        Raises:
            PeersUnreachable: none answered.
        """
        from swarmtune.discovery.dht import DirectoryNode
        from swarmtune.discovery.records import peer_of
        from swarmtune.transport.hivemind import HivemindNode

        self._node, self._directory = HivemindNode(), DirectoryNode()
        await self._node.start()
        self._discovery = discovery = HivemindDiscovery(self._node, self._directory, {address: peer_of(address) for address in addresses})
        ends_at = self._loop.time() + patience_s
        reached: set[str] = set()
        try:
            async with asyncio.timeout_at(ends_at):
                while not (reached := await discovery.dial_initial()):
                    await asyncio.sleep(RETRY_EVERY_S)
        except TimeoutError as error:
            raise PeersUnreachable(
                f"none of the initial peers answered within {patience_s:.0f} s: {', '.join(addresses)}; swarmtune doctor --peer ADDRESS says why"
            ) from error
        discovery.joined()
        node, directory = self._node, self._directory
        await directory.start(node.p2p, [address for address in addresses if peer_of(address) in reached], client=True)
        node.rebuilt.append(lambda: directory.rebind(node.p2p))
        return node, discovery

    async def _cancel_all(self) -> None:
        try:
            if self._discovery is not None:
                self._discovery.close()
            if self._directory is not None:
                await self._directory.close()
            if self._node is not None:
                await self._node.close()
        finally:
            await super()._cancel_all()
