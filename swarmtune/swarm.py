"""The client's connection to a swarm: one loop thread, one daemon, one DHT node, and a directory of servers per model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from swarmtune.errors import BlocksUnserved, PeersUnreachable, SwarmMismatch, UsageError, WireError
from swarmtune.remote.census import label
from swarmtune.remote.chain import Chain, ChainSettings, ServerTotals
from swarmtune.remote.route import Directory, Discovery
from swarmtune.transport.base import Traffic, Transport, TransportError
from swarmtune.transport.loop import LoopThread

if TYPE_CHECKING:
    from types import TracebackType

    from swarmtune.discovery.dht import DirectoryNode
    from swarmtune.discovery.records import Announcement
    from swarmtune.transport.hivemind import HivemindNode

logger = logging.getLogger(__name__)
REFRESH_EVERY_S = 10.0
REACH_TIMEOUT_S = 5.0
RETRY_EVERY_S = 0.3


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
    """

    bytes_up: int
    bytes_down: int
    calls: int
    retries: int
    wait_s: float
    servers: tuple[ServerTotals, ...]


@dataclass(frozen=True, slots=True)
class OpenModel:
    """One model on a swarm.

    Attributes:
        dtype: what its servers compute in.
        quantisation: ``none``, or what its servers hold the weights in.
    """

    chain: Chain
    directory: Directory
    dtype: str
    quantisation: str = "none"


class Swarm:
    """A connection; a context manager. ``connect`` makes one."""

    def __init__(self, loop: LoopThread, transport: Transport, discovery: Discovery, settings: ChainSettings) -> None:
        self.loop, self.settings = loop, settings
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
        )

    def fingerprint(self) -> dict[str, Any]:
        """What decides the results of the models opened so far: digests of configurations and weights, and the servers' numeric classes."""
        opened = sorted(self._models.items())
        return {
            "model": [digest for digest, _ in opened],
            "weights": [model.directory.weights() for _, model in opened],
            "numeric": [model.directory.numeric_class or "unknown" for _, model in opened],
        }

    def close(self) -> None:
        """End the connection. Safe to repeat."""
        self.loop.close()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _open(self, digest: str, num_blocks: int) -> OpenModel:
        directory = Directory(self._transport, self._discovery, digest, num_blocks)
        ends_at = asyncio.get_running_loop().time() + self.settings.patience_s
        while True:
            try:
                async with asyncio.timeout_at(ends_at):
                    await directory.refresh()
                hops = directory.route(0, num_blocks)
                break
            except (BlocksUnserved, TimeoutError) as error:
                if asyncio.get_running_loop().time() + RETRY_EVERY_S >= ends_at:
                    if isinstance(error, BlocksUnserved):
                        raise
                    raise PeersUnreachable(f"the peers did not answer within {self.settings.patience_s:.0f} s") from error
            await asyncio.sleep(RETRY_EVERY_S)
        infos = {hop.peer: directory.known[hop.peer].info for hop in hops}
        first, modes = infos[hops[0].peer], sorted({info.mode for info in infos.values()})
        if len(modes) > 1:
            who = "; ".join(f"{label(peer, info)} in {info.mode}" for peer, info in infos.items())
            raise SwarmMismatch(f"the servers on the route compute in {' and '.join(modes)} ({who}): start them with one dtype and one quantize")
        directory.keep_mode(first.mode)
        if first.quantisation != "none":
            logger.info("the servers compute in %s", first.mode)
        task = asyncio.create_task(self._keep_fresh(directory))
        self._tasks.add(task)
        return OpenModel(Chain(self._transport, directory, self.settings), directory, first.dtype, first.quantisation)

    async def _keep_fresh(self, directory: Directory) -> None:
        while True:
            await asyncio.sleep(REFRESH_EVERY_S)
            try:
                async with asyncio.timeout(REFRESH_EVERY_S * 3):
                    await directory.refresh()
            except (SwarmMismatch, TimeoutError) as error:
                logger.warning("%s", error or "the swarm did not answer a refresh in time")


class HivemindDiscovery:
    """Peers from the DHT, and the initial peers themselves."""

    def __init__(self, node: HivemindNode, directory: DirectoryNode, initial_peers: Sequence[str]) -> None:
        self._node, self._directory = node, directory
        self._initial = {address: None for address in initial_peers}
        self._dialled: dict[str, tuple[str, ...]] = {}
        self.refusals: dict[str, str] = {}

    async def dial_initial(self) -> set[str]:
        """Reach for all initial peers at once; returns those that answered, and keeps in ``refusals`` why the others could not be reached."""
        answers = await asyncio.gather(*(self._node.connect(address) for address in self._initial), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, TransportError):
                raise answer
        self.refusals = {address: str(answer) for address, answer in zip(self._initial, answers, strict=True) if isinstance(answer, TransportError)}
        return {answer for answer in answers if isinstance(answer, str)}

    async def peers(self, model: str) -> set[str]:
        """See ``Discovery.peers``."""
        initial, announced = await asyncio.gather(self.dial_initial(), self._announced(model))
        return initial | announced

    async def _announced(self, model: str) -> set[str]:
        try:
            announcements = await self._directory.find(model)
        except TransportError as error:
            logger.debug("%s", error)
            return set()
        await asyncio.gather(*(self._reach(announcement) for announcement in announcements))
        return {announcement.peer for announcement in announcements}

    async def _reach(self, announcement: Announcement) -> None:
        """Dial all addresses of a peer at once, unless that has been done; strangers' addresses may lead nowhere."""
        if self._dialled.get(announcement.peer) == announcement.addresses:
            return
        try:
            async with asyncio.timeout(REACH_TIMEOUT_S):
                answers = await asyncio.gather(*map(self._node.connect, announcement.addresses), return_exceptions=True)
        except TimeoutError:
            return
        if any(isinstance(answer, str) for answer in answers):
            self._dialled[announcement.peer] = announcement.addresses


def connect(
    initial_peers: Sequence[str],
    *,
    micro_batch_tokens: int = 4096,
    max_in_flight: int = 4,
    patience_s: float = 30.0,
    call_timeout_s: float = 300.0,
    codec: str = "none",
    credentials: None = None,
) -> Swarm:
    """Connect to a swarm.

    Args:
        initial_peers: multiaddresses of some servers, such as ``/ip4/10.0.0.1/tcp/31337/p2p/12D3Koo...``; one that answers is enough.
        micro_batch_tokens: a batch is cut into micro-batches of at most this many tokens (at least one row each).
        max_in_flight: micro-batches under way at once.
        patience_s: how long a call looks for a server before it raises ``SwarmError``.
        call_timeout_s: how long one call to a live server may take.
        codec: how tensors are compressed on the way; only ``"none"``.
        credentials: must be ``None``; swarms with admission are not supported.

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
    if codec != "none" or credentials is not None:
        raise UsageError("codec must be 'none' and credentials must be None: nothing else is supported")
    for name, value in {"micro_batch_tokens": micro_batch_tokens, "max_in_flight": max_in_flight}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} must be a positive integer, got {value!r}")
    for name, seconds in {"patience_s": patience_s, "call_timeout_s": call_timeout_s}.items():
        if not isinstance(seconds, int | float) or not 0 < seconds < 1e6:
            raise UsageError(f"{name} must be a positive number of seconds, got {seconds!r}")
    settings = ChainSettings(micro_batch_tokens, max_in_flight, float(patience_s), float(call_timeout_s))
    loop = HivemindLoop()
    loop.start()
    try:
        node, discovery = loop.run(loop.join(addresses, settings.patience_s))
    except BaseException:
        loop.close()
        raise
    return Swarm(loop, node, discovery, settings)


class HivemindLoop(LoopThread):
    """A loop thread that owns a daemon and a DHT node, and takes them along when it closes."""

    _node: HivemindNode | None = None
    _directory: DirectoryNode | None = None

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
        discovery = HivemindDiscovery(self._node, self._directory, addresses)
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
        for address, refusal in discovery.refusals.items():
            if peer_of(address) not in reached:
                logger.warning("an initial peer is left out, the run goes on without it: %s", refusal)
        await self._directory.start(self._node.p2p, [address for address in addresses if peer_of(address) in reached], client=True)
        return self._node, discovery

    async def _cancel_all(self) -> None:
        try:
            if self._directory is not None:
                await self._directory.close()
            if self._node is not None:
                await self._node.close()
        finally:
            await super()._cancel_all()
