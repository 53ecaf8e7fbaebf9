"""Asking a swarm: dial its peers, find all its servers, and measure each. Nothing is judged here, see ``judge.py``."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import torch

from swarmtune.discovery.dht import DirectoryNode
from swarmtune.discovery.records import Announcement, check_address
from swarmtune.errors import WireError
from swarmtune.transport.base import TransportError
from swarmtune.transport.hivemind import HivemindNode
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.messages import CallKind, Fault, ServerInfo, SpanCall, SpanResult

INFO_TIMEOUT_S = 5.0
REACH_TIMEOUT_S = 5.0
PROBE_TIMEOUT_S = 10.0
SURVEY_TIMEOUT_S = 60.0
MEASURE_TIMEOUT_S = 45.0
LATENCY_CALLS = 5
SMALL_BYTES, LARGE_BYTES = 1 << 18, 1 << 22
QUICK_S = 0.25
"""A link that takes the small body within this time is asked to take the large one."""
PROBE_TOKENS, PROBE_ROW_TOKENS = 1024, 128
MAX_SERVERS = 256
MAX_LOOKUPS = 3


@dataclass(frozen=True, slots=True)
class Server:
    """A server that described itself, and what was measured of it.

    Attributes:
        address: where it was reached, or where it says that it is.
        announced: whether its announcement was found in the DHT.
        ahead_s: by how much its clock is ahead of ours, by its word.
        ahead_error_s: how far that can be off.
        latency_s: median round trip of a small call.
        up_bytes_s: bytes per second that it took from us, the round trip included: no more than the line can do.
        down_bytes_s: bytes per second of an answer, with sending the same amount and computing one block included: a lower bound.
    """

    peer: str
    address: str
    info: ServerInfo
    announced: bool = False
    ahead_s: float | None = None
    ahead_error_s: float | None = None
    latency_s: float | None = None
    up_bytes_s: float | None = None
    down_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found.

    Attributes:
        refusals: by address of the user's, why it could not be reached.
        silent: by peer, why it did not describe itself.
        unmeasured: servers for whose measurement no time was left.
        cut_short: the servers could not all be found in time, or are too many.
    """

    servers: tuple[Server, ...] = ()
    reached: tuple[str, ...] = ()
    refusals: dict[str, str] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    unmeasured: int = 0
    cut_short: bool = False


@dataclass(slots=True)
class _Found:
    """The survey while it grows, so that a deadline keeps what there is."""

    infos: dict[str, ServerInfo] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    announcements: dict[str, Announcement] = field(default_factory=dict)
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


async def survey(addresses: Sequence[str], model: str | None, hidden: int | None) -> Survey:
    """Examine the swarm behind ``addresses``; ends within about two minutes, whatever the peers do.

    Args:
        addresses: of the user; malformed ones are among the refusals.
        model: digest of a model to look for too.
        hidden: width of that model, with which answers can be measured.

    Raises:
        ServerStartFailed: no daemon of our own can be started.
    """
    found, cut_short = _Found(), False
    async with _node() as node:
        reached = await _dial(node, addresses, found)
        if reached:
            try:
                async with asyncio.timeout(SURVEY_TIMEOUT_S), _directory(node, reached) as directory:
                    await _explore(node, directory, model, found)
            except (TimeoutError, TransportError):
                cut_short = True
        servers, unmeasured = await _measure_all(node, _servers(found), model, hidden)
    cut_short = cut_short or len(found.infos) >= MAX_SERVERS
    return Survey(tuple(servers), tuple(reached), found.refusals, found.silent, unmeasured, cut_short)


@asynccontextmanager
async def _node() -> AsyncIterator[HivemindNode]:
    node = HivemindNode()
    try:
        yield await node.start()
    finally:
        await node.close()


@asynccontextmanager
async def _directory(node: HivemindNode, addresses: list[str]) -> AsyncIterator[DirectoryNode]:
    directory = DirectoryNode()
    try:
        await directory.start(node.p2p, addresses, client=True)
        yield directory
    finally:
        await directory.close()


async def _dial(node: HivemindNode, addresses: Sequence[str], found: _Found) -> list[str]:
    """The addresses that can be reached."""

    async def dial(address: str) -> bool:
        try:
            peer = await node.connect(check_address(address))
        except (WireError, TransportError) as error:
            found.refusals[address] = str(error)
            return False
        found.addresses.setdefault(peer, address)
        return True

    unique = list(dict.fromkeys(addresses))
    return [address for address, answer in zip(unique, await asyncio.gather(*map(dial, unique)), strict=True) if answer]


async def _explore(node: HivemindNode, directory: DirectoryNode, model: str | None, found: _Found) -> None:
    """Ask who is there, look up what they hold in the DHT, ask whom that names: until nothing new comes up.

    The DHT is asked by model, so servers of a model that nobody has named stay unknown.
    """
    looked_up: set[str] = set()
    await _describe(node, found.addresses, found)
    while models := ({info.model for info in found.infos.values()} | ({model} if model else set())) - looked_up:
        for digest in sorted(models):
            looked_up.add(digest)
            await _look_up(node, directory, digest, found)
        await _describe(node, found.announcements, found)
    await asyncio.gather(*(_compare_clocks(directory, peer, found) for peer in found.infos))


async def _look_up(node: HivemindNode, directory: DirectoryNode, model: str, found: _Found) -> None:
    """Find the servers of a model and dial them; again where that led to new ones, who may know of more."""
    for _ in range(MAX_LOOKUPS):
        new = {each.peer: each for each in await directory.find(model) if each.peer not in found.announcements}
        found.announcements.update(new)
        await asyncio.gather(*(_reach(node, announcement, found) for announcement in new.values()))
        if not new:
            break


async def _compare_clocks(directory: DirectoryNode, peer: str, found: _Found) -> None:
    try:
        found.clocks[peer] = await directory.clock_ahead(peer)
    except TransportError:
        return  # it is among those whose clock is not known


async def _reach(node: HivemindNode, announcement: Announcement, found: _Found) -> None:
    """Dial all addresses of a server at once, unless it is known already."""
    if announcement.peer in found.infos:
        return
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            answers = await asyncio.gather(*map(node.connect, announcement.addresses), return_exceptions=True)
    except TimeoutError:
        return
    reached = [address for address, answer in zip(announcement.addresses, answers, strict=True) if isinstance(answer, str)]
    found.addresses.setdefault(announcement.peer, (reached or list(announcement.addresses))[0])


async def _describe(node: HivemindNode, peers: Iterable[str], found: _Found) -> None:
    async def describe(peer: str) -> None:
        try:
            found.infos[peer] = await ask_info(node, peer)
            found.silent.pop(peer, None)
        except (TransportError, WireError) as error:
            found.silent[peer] = str(error)

    waiting = sorted(set(peers) - found.infos.keys())[: max(0, MAX_SERVERS - len(found.infos))]
    await asyncio.gather(*map(describe, waiting))


async def ask_info(node: HivemindNode, peer: str, body: torch.Tensor | None = None, timeout_s: float = INFO_TIMEOUT_S) -> ServerInfo:
    """A server's description of itself; ``body`` is what travels to it along with the question.

    Raises:
        TransportError: no answer.
        WireError: an answer that is none.
    """
    question = Message(CallKind.INFO, {}, {} if body is None else {"probe": body})
    reply = decode(await node.call(peer, encode(question, answer_bytes=0), timeout_s))
    if reply.kind == "fault":
        raise WireError(f"it answered: {Fault.from_message(reply).detail}")
    if reply.kind != "info":
        raise WireError(f"it answered {reply.kind!r:.80} when asked to describe itself")
    return ServerInfo.from_json(reply.fields)


def _servers(found: _Found) -> list[Server]:
    servers = []
    for peer, info in found.infos.items():
        announcement = found.announcements.get(peer)
        address = found.addresses.get(peer) or (announcement.addresses[0] if announcement else "unknown")
        servers.append(Server(peer, address.partition("/p2p/")[0], info, announcement is not None, *found.clocks.get(peer, (None, None))))
    return sorted(servers, key=lambda server: (server.info.model, server.info.span, server.peer))


async def _measure_all(node: HivemindNode, servers: list[Server], model: str | None, hidden: int | None) -> tuple[list[Server], int]:
    """One after the other, so that they do not share our line; those for whom no time is left stay unmeasured."""
    done: list[Server] = []
    try:
        async with asyncio.timeout(MEASURE_TIMEOUT_S):
            for server in servers:
                done.append(await _measure(node, server, hidden if server.info.model == model else None))
    except TimeoutError:
        pass
    return [*done, *servers[len(done) :]], len(servers) - len(done)


async def _measure(node: HivemindNode, server: Server, hidden: int | None) -> Server:
    try:
        await ask_info(node, server.peer)  # the first call after a pause may have to open a stream
        times_s = [await _seconds(ask_info(node, server.peer)) for _ in range(LATENCY_CALLS)]
        server = replace(server, latency_s=statistics.median(times_s))
        server = replace(server, up_bytes_s=await _up(node, server.peer))
        if hidden is not None:
            server = replace(server, down_bytes_s=await _down(node, server, hidden))
    except (TransportError, WireError):
        pass  # what was measured before stays
    return server


async def _seconds(call: object) -> float:
    began = time.monotonic()
    await call  # type: ignore[misc]
    return time.monotonic() - began


async def _up(node: HivemindNode, peer: str) -> float:
    """Bytes per second of a question with a body."""
    for size in (SMALL_BYTES, LARGE_BYTES):
        seconds = await _seconds(ask_info(node, peer, torch.zeros(size // 4), PROBE_TIMEOUT_S))
        if seconds > QUICK_S:
            break
    return size / max(seconds, 1e-6)


async def _down(node: HivemindNode, server: Server, hidden: int) -> float:
    """Bytes per second of the answer to a forward through one block; the better of two, because the first may warm up the server."""
    tokens = max(1, min(PROBE_TOKENS, LARGE_BYTES // (4 * hidden)))
    rows = max(1, tokens // PROBE_ROW_TOKENS)
    hidden_BTH = torch.zeros(rows, tokens // rows, hidden)
    start = server.info.span.start
    call = SpanCall(BlockSpan(start, start + 1), server.info.model, hidden_BTH, remaining_ms=int(PROBE_TIMEOUT_S * 1000))
    best_s = PROBE_TIMEOUT_S
    for _ in range(2):
        began = time.monotonic()
        reply = decode(await node.call(server.peer, encode(call.to_message(), answer_bytes=call.answer_bytes), PROBE_TIMEOUT_S))
        if reply.kind == "fault":
            raise WireError(Fault.from_message(reply).detail)
        SpanResult.from_message(reply, call)
        best_s = min(best_s, time.monotonic() - began)
        if best_s > QUICK_S:
            break
    return hidden_BTH.nbytes / max(best_s, 1e-6)
