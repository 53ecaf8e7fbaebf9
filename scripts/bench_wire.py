"""``scripts/bench wire``: messages without a model: what the codec costs, then frames in this process, then a call through two p2p daemons."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from bench_child import child
from bench_model import per_call, thread_budget
from bench_peer import GIVE, TAKE, answer
from bench_report import Panel, Report, Row, say, setting

from swarmtune.transport.base import Transport
from swarmtune.transport.hivemind import HivemindNode
from swarmtune.transport.loopback import LoopbackTransport
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Budget, Encoded, FrameKind, Incoming, Prefix, WireLimits
from tests.netlab_namespaces import cpu_s

TOKENS = (1, 128, 1024, 4096)
CALL_S = 60.0
FRAMES, DAEMONS = "frames in this process", "p2p daemons"


@dataclass(frozen=True, slots=True)
class Cost:
    """One way of moving a tensor: seconds per call, and bytes beside the tensor's."""

    name: str
    tensor_bytes: int
    seconds: float
    beside: int = 0

    @property
    def mb_s(self) -> float:
        """Megabytes a second."""
        return self.tensor_bytes / 1e6 / self.seconds


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """All sizes, one after the other in each of the three ways."""
    dtype = getattr(torch, options.dtype)
    tensors = [torch.randn(1, tokens, options.hidden).to(dtype) for tokens in TOKENS]
    rows: list[Row] = []
    with thread_budget(options):
        costs = [cost for tensor in tensors for cost in of_codec(tensor, options.rounds)]
        rows += copies(tensors[-1])
        for way, opened in ((FRAMES, in_process), (DAEMONS, through_daemons)):
            found, shares = asyncio.run(of_calls(way, opened(directory), tensors, options.rounds))
            costs += found
            rows += shares
    copied = {cost.tensor_bytes: cost.seconds for cost in costs if cost.name == "a plain copy"}
    table = [row_of(cost, cost.seconds / copied[cost.tensor_bytes]) for cost in costs]
    series: dict[str, tuple[list[float], list[float]]] = {}
    for cost in costs:
        x, y = series.setdefault(cost.name, ([], []))
        x.append(cost.tensor_bytes)
        y.append(cost.mb_s)
    says = f"{setting(options)}, hidden states of {', '.join(map(str, TOKENS))} tokens"
    return Report("wire", "bench_wire", says, [*table, *rows], [Panel("how fast a tensor moves", series=series, x="bytes", y="MB/s", log=True)])


def row_of(cost: Cost, ratio: float) -> Row:
    """A line of the table; ``ratio`` is to a plain copy."""
    figure, value = (
        f"{cost.name}, {size_of(cost.tensor_bytes)}: ms, MB/s, times a plain copy",
        f"{cost.seconds * 1e3:.3f}, {cost.mb_s:.0f}, {ratio:.1f}",
    )
    if cost.beside:
        figure, value = f"{figure}, bytes beside the tensor", f"{value}, {cost.beside}"
    return {"figure": figure, "value": value, "ms": round(cost.seconds * 1e3, 4), "mb_s": round(cost.mb_s, 1), "ratio": round(ratio, 3)}


def size_of(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / (1 << 20):.4g} MiB" if count >= 1 << 20 else f"{count / 1024:.4g} KiB"


def calls_of(size: int, rounds: int) -> int:
    """How often a tensor of ``size`` bytes is moved: the small ones more often, as they say less each."""
    return rounds * (4 if size > 1 << 20 else 20)


def of_codec(tensor: torch.Tensor, rounds: int) -> list[Cost]:
    """Encoding, cutting into frames with checksums, and receiving, each alone."""
    encoded = encode(Message(TAKE, {}, {"hidden": tensor}))
    count = calls_of(tensor.nbytes, rounds)
    frames = [(prefix, bytes(payload)) for prefix, payload in encoded.frames(FrameKind.CALL, 1)]

    source = encoded.parts[0]
    place = memoryview(bytearray(len(source)))

    def timed(run: Callable[[], object]) -> float:
        return median(per_call(run, count, 5))

    def encoding() -> Encoded:
        return encode(Message(TAKE, {}, {"hidden": tensor}))

    return [
        Cost("a plain copy", tensor.nbytes, timed(lambda: place.__setitem__(slice(None), source))),
        Cost("encode", tensor.nbytes, timed(encoding)),
        Cost("encode and cut into frames", tensor.nbytes, timed(lambda: list(encoding().frames(FrameKind.CALL, 1)))),
        Cost("receive frames and decode", tensor.nbytes, timed(lambda: decode(received(frames)))),
    ]


def received(frames: Sequence[tuple[bytes, bytes]]) -> Incoming:
    """A whole message from the frames that carry it."""
    budget = Budget(1 << 40)
    incoming = Incoming.begin(Prefix.unpack(frames[0][0]), frames[0][1], WireLimits(), budget)
    for _, payload in frames[1:-1]:
        incoming.data(payload)
    incoming.end(frames[-1][1])
    return incoming


def copies(tensor: torch.Tensor) -> list[Row]:
    """How often the codec copies a tensor, seen by the addresses of what goes in and comes out."""
    encoded = encode(Message(TAKE, {}, {"hidden": tensor}))
    sent = torch.frombuffer(encoded.parts[0], dtype=torch.uint8)
    cut = [payload for prefix, payload in encoded.frames(FrameKind.CALL, 1) if Prefix.unpack(prefix).kind is FrameKind.DATA]
    first = torch.frombuffer(cut[0], dtype=torch.uint8)
    incoming = received([(prefix, bytes(payload)) for prefix, payload in encoded.frames(FrameKind.CALL, 1)])
    body = torch.frombuffer(incoming.body, dtype=torch.uint8)
    out = decode(incoming).tensors["hidden"]
    return [
        {"figure": "copies by encode", "value": int(sent.data_ptr() != tensor.data_ptr())},
        {"figure": "copies by cutting into frames", "value": int(first.data_ptr() != sent.data_ptr())},
        {"figure": "copies from frames to a message's body", "value": int(body.data_ptr() != first.data_ptr())},
        {"figure": "copies by decode", "value": int(out.data_ptr() != body.data_ptr())},
    ]


@dataclass(frozen=True, slots=True)
class Opened:
    """A way to the other end: the peer's name, and the processes that work for a call, by what they are."""

    transport: Transport
    peer: str
    processes: dict[str, int]


@contextlib.asynccontextmanager
async def in_process(directory: Path) -> AsyncIterator[Opened]:
    """Both ends on this loop, over a socket pair."""
    transport = LoopbackTransport({"peer": answer})
    try:
        yield Opened(transport, "peer", {"both ends": os.getpid()})
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def through_daemons(directory: Path) -> AsyncIterator[Opened]:
    """A node here, and one in another process, each with its daemon."""
    with child("bench_peer.py", (), directory) as other:
        said, node = other.read(), HivemindNode()
        try:
            await node.start()
            peer = await node.connect(said["address"])
            assert node.daemon_pid is not None
            own = {"this end": os.getpid(), "its daemon": node.daemon_pid, "other daemon": said["daemon_pid"], "other end": said["pid"]}
            yield Opened(node, peer, own)
        finally:
            await node.close()


async def of_calls(
    way: str, opening: contextlib.AbstractAsyncContextManager[Opened], tensors: Sequence[torch.Tensor], rounds: int
) -> tuple[list[Cost], list[Row]]:
    """Every tensor up in one call, then down in one; and whose processor time the largest took."""
    costs, rows = [], []
    async with opening as at:
        for tensor in tensors:
            count = calls_of(tensor.nbytes, rounds)
            taken = encode(Message(TAKE, {}, {"hidden": tensor}))
            given = encode(Message(GIVE, {"bytes": tensor.nbytes}))
            for direction, request in (("up", taken), ("down", given)):
                cost, used = await of_call(at, f"{way}, {direction}", request, tensor.nbytes, count)
                costs.append(cost)
                say("wire", what=cost.name, tensor_bytes=cost.tensor_bytes, ms=round(cost.seconds * 1e3, 4), mb_s=round(cost.mb_s, 1))
                if tensor is tensors[-1]:
                    shares = ", ".join(f"{who} {seconds / (count * tensor.nbytes / 1e9):.2f}" for who, seconds in used.items())
                    rows.append({"figure": f"{way}, {direction}: processor seconds per GB", "value": shares})
    return costs, rows


async def of_call(at: Opened, name: str, request: Encoded, tensor_bytes: int, count: int) -> tuple[Cost, dict[str, float]]:
    """Median seconds of a call, the bytes that it takes beside the tensor, and the processor time of each process in all of them."""
    await at.transport.call(at.peer, request, CALL_S)
    traffic, used = at.transport.traffic, {who: cpu_s(pid) for who, pid in at.processes.items()}
    times, before = [], traffic.bytes_up + traffic.bytes_down
    for _ in range(count):
        began = time.perf_counter()
        await at.transport.call(at.peer, request, CALL_S)
        times.append(time.perf_counter() - began)
    beside = (traffic.bytes_up + traffic.bytes_down - before) // count - tensor_bytes
    return Cost(name, tensor_bytes, median(times), beside), {who: cpu_s(pid) - used[who] for who, pid in at.processes.items()}
