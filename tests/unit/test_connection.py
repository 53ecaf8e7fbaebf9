"""One stream between two peers: multiplexing, cuts at every byte, silence, hostile frames; afterwards no task and no byte of budget is left."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from swarmtune.errors import WireError
from swarmtune.transport import connection as module
from swarmtune.transport.base import Handler, TransportError
from swarmtune.transport.connection import Connection, agree
from swarmtune.transport.loopback import LoopbackTransport
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import MAX_PAYLOAD, PREFIX, Budget, Encoded, FrameKind, Incoming, Prefix, WireLimits, dump_json

HELLO = dump_json({"versions": [1], "features": []})
SMALL = encode(Message("ask", {"n": 1}, {"x": torch.arange(6.0)}))
BIG = encode(Message("ask", {"n": 2}, {"x": torch.arange(400_000.0)}))


async def echo(peer: str, incoming: Incoming) -> Encoded:
    message = decode(incoming)
    return encode(Message("told", message.fields, message.tensors))


def run(main: Awaitable[None]) -> None:
    """Run a test, and let no task of it survive."""

    async def checked() -> None:
        async with asyncio.timeout(8):
            await main
        for _ in range(100):
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"tasks are left: {left}")

    asyncio.run(checked())


async def streams() -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    left, right = socket.socketpair()
    return await asyncio.open_connection(sock=left), await asyncio.open_connection(sock=right)


@contextlib.asynccontextmanager
async def pair(handler: Handler = echo, limits: WireLimits | None = None) -> AsyncIterator[tuple[Connection, Connection]]:
    one, other = await streams()
    client, server = Connection(*one, peer="server", limits=limits), Connection(*other, peer="client", handler=handler, limits=limits)
    await asyncio.gather(client.open(), server.open())
    try:
        yield client, server
    finally:
        await client.close()
        await server.close()
        assert server._budget.used_bytes == client._budget.used_bytes == 0
        assert not server._answering
        assert not server._partial
        assert not client._waiting
        assert not client._partial


class Raw:
    """A peer that writes whatever it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, kind: int, payload: bytes = b"", request_id: int = 0) -> None:
        self.writer.write(struct.pack("<2sBBIQ", b"sw", 1, kind, len(payload), request_id) + payload)

    def send_message(self, message: Encoded, request_id: int, kind: FrameKind = FrameKind.CALL, without_end: bool = False) -> None:
        frames = list(message.frames(kind, request_id))
        for head, payload in frames[: -1 if without_end else None]:
            self.writer.write(head + payload)

    async def read(self) -> tuple[Prefix, bytes]:
        prefix = Prefix.unpack(await self.reader.readexactly(PREFIX.size))
        return prefix, await self.reader.readexactly(prefix.payload_bytes)

    async def goodbye(self) -> str:
        """Skip to the goodbye, and make sure that the stream ends after it."""
        while True:
            prefix, payload = await self.read()
            if prefix.kind is FrameKind.GOODBYE:
                assert await self.reader.read() == b""
                return payload.decode()


@contextlib.asynccontextmanager
async def against_raw(
    handler: Handler | None = echo, limits: WireLimits | None = None, budget: Budget | None = None
) -> AsyncIterator[tuple[Connection, Raw]]:
    """Our connection, its handshake done, and a raw peer."""
    one, other = await streams()
    raw = Raw(*other)
    ours = Connection(*one, peer="raw", handler=handler, limits=limits, budget=budget)
    raw.send(FrameKind.HELLO, HELLO)
    await ours.open()
    assert (await raw.read())[0].kind is FrameKind.HELLO
    try:
        yield ours, raw
    finally:
        raw.writer.close()
        await ours.close()
        await asyncio.sleep(0)
        assert ours._budget.used_bytes == 0
        assert not ours._answering
        assert not ours._partial
        assert not ours._waiting


async def settle(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(3):
        while not condition():
            await asyncio.sleep(0.002)


def test_many_requests_at_once_each_get_their_own_answer() -> None:
    async def main() -> None:
        async with pair() as (client, _):

            async def ask(n: int) -> None:
                sent = torch.full((n * 997 + 1,), float(n))
                found = decode(await client.request(encode(Message("ask", {"n": n}, {"x": sent})), 5))
                assert found.fields == {"n": n}
                assert torch.equal(found.tensors["x"], sent)

            await asyncio.gather(*map(ask, range(150)))  # more than the 64 that a peer keeps open

    run(main())


def test_a_slow_answer_does_not_hold_up_a_fast_one() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def handler(peer: str, incoming: Incoming) -> Encoded:
            if incoming.header["fields"]["n"] == 1:
                await gate.wait()
            return await echo(peer, incoming)

        async with pair(handler) as (client, _):
            slow = asyncio.create_task(client.request(SMALL, 5))
            await client.request(BIG, 5)
            assert not slow.done()
            gate.set()
            await slow

    run(main())


def test_large_answers_go_one_after_the_other_so_that_the_first_is_whole_soon() -> None:
    async def main() -> None:
        both = asyncio.Barrier(2)

        async def handler(peer: str, incoming: Incoming) -> Encoded:
            await both.wait()
            return await echo(peer, incoming)

        async with against_raw(handler) as (_, raw):
            raw.send_message(BIG, 1)
            raw.send_message(BIG, 2)
            order = []
            while [kind for kind, _ in order if kind is FrameKind.END] != [FrameKind.END, FrameKind.END]:
                prefix, _ = await raw.read()
                order.append((prefix.kind, prefix.request_id))
            data = [request_id for kind, request_id in order if kind is FrameKind.DATA]
            assert len(data) > 4
            assert data in (sorted(data), sorted(data, reverse=True))

    run(main())


@pytest.mark.parametrize("in_order", [True, False])
def test_a_message_that_refers_to_another_one_does_not_overtake_it(in_order: bool) -> None:
    """A small one goes between the frames of a large one, unless it must not."""
    arrived: list[int] = []

    async def noted(peer: str, incoming: Incoming) -> Encoded:
        arrived.append(decode(incoming).fields["n"])
        return encode(Message("told"))

    async def main() -> None:
        async with pair(noted) as (client, _):
            large = asyncio.create_task(client.request(BIG, 5.0))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.gather(large, client.request(replace(SMALL, in_order=in_order), 5.0))
        assert arrived == ([2, 1] if in_order else [1, 2])

    run(main())


class Relay:
    """Carries bytes between two peers; after ``limit`` bytes in one direction it cuts both streams."""

    def __init__(self, limit: int, from_server: bool) -> None:
        self.limit, self.from_server = limit, from_server
        self.carried = {True: 0, False: 0}

    async def __aenter__(self) -> Relay:
        self.client, near = await streams()
        far, self.server = await streams()
        self.writers = (near[1], far[1])
        self.tasks = [asyncio.create_task(self._carry(near[0], far[1], False)), asyncio.create_task(self._carry(far[0], near[1], True))]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cut()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _cut(self) -> None:
        for writer in self.writers:
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_server: bool) -> None:
        while data := await reader.read(1 << 16):
            if from_server == self.from_server:
                data = data[: self.limit - self.carried[from_server]]
            writer.write(data)
            self.carried[from_server] += len(data)
            if from_server == self.from_server and self.carried[from_server] >= self.limit:
                break
        self._cut()


async def through_relay(request: Encoded, limit: int, from_server: bool) -> tuple[str, dict[bool, int], int]:
    """Ask through a relay that cuts at ``limit``: ``whole`` or ``cut``, the bytes carried, and how often the handler ran."""
    asked = 0

    async def handler(peer: str, incoming: Incoming) -> Encoded:
        nonlocal asked
        asked += 1
        return await echo(peer, incoming)

    async with Relay(limit, from_server) as relay:
        client = Connection(*relay.client, peer="server")
        server = Connection(*relay.server, peer="client", handler=handler)
        opened = asyncio.ensure_future(server.open())
        try:
            await client.open()
            answer = decode(await client.request(request, 5))
            assert answer.tensors["x"].numel() * 4 <= request.body_bytes
            outcome = "whole"
        except TransportError:
            outcome = "cut"
        await asyncio.gather(opened, return_exceptions=True)
        await client.close()
        await server.close()
        assert server._budget.used_bytes == client._budget.used_bytes == 0
    return outcome, relay.carried, asked


@pytest.mark.parametrize("from_server", [True, False], ids=["answer", "request"])
def test_a_stream_cut_at_any_byte_is_a_failure_and_never_a_short_success(from_server: bool) -> None:
    async def main() -> None:
        outcome, carried, _ = await through_relay(SMALL, 1 << 40, from_server)
        assert outcome == "whole"
        total = carried[from_server]
        assert total > 100
        for limit in range(1, total):
            outcome, _, asked = await through_relay(SMALL, limit, from_server)
            assert outcome == "cut", f"a stream cut at byte {limit} of {total} gave an answer"
            assert from_server or asked == 0, f"the handler saw a request that was cut at byte {limit} of {total}"

    run(main())


@pytest.mark.parametrize("from_server", [True, False], ids=["answer", "request"])
def test_a_large_message_cut_anywhere_is_a_failure(from_server: bool) -> None:
    async def main() -> None:
        _, carried, _ = await through_relay(BIG, 1 << 40, from_server)
        total = carried[from_server]
        assert total > 1_600_000
        for limit in (total - 1, total - 12, total - 28, total - 29, total // 2, 1 << 18, (1 << 18) + 100, 1 << 16, 300):
            assert (await through_relay(BIG, limit, from_server))[0] == "cut"

    run(main())


def test_a_peer_that_goes_silent_fails_every_open_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_EVERY_S", 0.02)
    monkeypatch.setattr(module, "SILENCE_S", 0.15)

    async def main() -> None:
        async with against_raw() as (ours, _):
            answers = await asyncio.gather(*(ours.request(SMALL, 60) for _ in range(3)), return_exceptions=True)
            assert all(isinstance(answer, TransportError) and "silent" in str(answer) for answer in answers)
            with pytest.raises(TransportError, match="silent"):
                await ours.request(SMALL, 60)

    run(main())


def test_a_silent_peer_is_found_by_short_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends before the silence is long enough, as a question for a description does."""
    monkeypatch.setattr(module, "SILENCE_S", 1.0)
    monkeypatch.setattr(module, "PING_EVERY_S", 0.1)

    async def main() -> None:
        async with against_raw(None) as (client, _):
            began = time.monotonic()
            while not client.closed.is_set():
                with pytest.raises(TransportError):
                    await client.request(SMALL, 0.3)
                await asyncio.sleep(0.05)
                assert time.monotonic() - began < 5
            assert time.monotonic() - began > 1

    run(main())


def test_a_peer_that_answers_pings_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_EVERY_S", 0.02)
    monkeypatch.setattr(module, "SILENCE_S", 0.15)

    async def handler(peer: str, incoming: Incoming) -> Encoded:
        await asyncio.sleep(0.6)
        return await echo(peer, incoming)

    async def main() -> None:
        async with pair(handler) as (client, _):
            await client.request(SMALL, 5)

    run(main())


def test_a_request_ends_at_its_timeout_and_frees_the_task_of_the_server() -> None:
    async def main() -> None:
        async def handler(peer: str, incoming: Incoming) -> Encoded:
            await asyncio.sleep(60)
            raise AssertionError

        async with pair(handler) as (client, server):
            with pytest.raises(TransportError, match=r"did not answer within 0\.1 s"):
                await client.request(BIG, 0.1)
            await settle(lambda: not server._answering)
            assert server._budget.used_bytes == 0
            assert not client.closed.is_set()

    run(main())


def test_a_cancelled_request_frees_the_task_of_the_server_and_the_stream_goes_on() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def handler(peer: str, incoming: Incoming) -> Encoded:
            if incoming.header["fields"]["n"] == 2:
                try:
                    await asyncio.sleep(60)
                finally:
                    ended.set()
            return await echo(peer, incoming)

        async with pair(handler) as (client, server):
            asking = asyncio.create_task(client.request(BIG, 60))
            await settle(lambda: bool(server._answering))
            asking.cancel()
            await ended.wait()
            await settle(lambda: server._budget.used_bytes == 0)
            await client.request(SMALL, 5)

    run(main())


def test_requests_given_up_at_any_moment_leave_nothing_behind_and_others_stay_whole() -> None:
    async def main() -> None:
        async with pair() as (client, server):
            for delay in range(24):
                asking = asyncio.create_task(client.request(BIG, 5))
                for _ in range(delay):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            assert decode(await client.request(BIG, 5)).tensors["x"][-1] == 399_999
            await settle(lambda: server._budget.used_bytes == client._budget.used_bytes == 0)

    run(main())


def test_a_call_given_up_in_the_same_breath_leaves_no_task_and_no_budget() -> None:
    async def main() -> None:
        async with against_raw() as (ours, raw):
            for request_id in range(1, 200):  # more often than there are places for open calls
                raw.send_message(SMALL, request_id)
                raw.send(FrameKind.CANCEL, request_id=request_id)
            raw.send_message(SMALL, 500)
            await settle(lambda: not ours._answering and ours._budget.used_bytes == 0)
            while (await raw.read())[0].request_id != 500:
                pass
            assert not ours.closed.is_set()

    run(main())


def test_an_answer_that_comes_too_late_is_dropped_with_its_budget() -> None:
    async def main() -> None:
        async with against_raw() as (ours, raw):
            with pytest.raises(TransportError):
                await ours.request(SMALL, 0.02)
            raw.send_message(SMALL, 1, FrameKind.REPLY)
            asking = asyncio.create_task(ours.request(SMALL, 5))
            raw.send_message(SMALL, 2, FrameKind.REPLY)
            await asking
            assert ours._budget.used_bytes == 0

    run(main())


def test_a_peer_that_gives_up_its_answer_fails_that_request_only() -> None:
    async def main() -> None:
        async with against_raw() as (ours, raw):
            first, second = asyncio.create_task(ours.request(SMALL, 5)), asyncio.create_task(ours.request(SMALL, 5))
            await asyncio.sleep(0.01)
            raw.send_message(SMALL, 1, FrameKind.REPLY, without_end=True)
            raw.send(FrameKind.CANCEL, request_id=1)
            raw.send_message(SMALL, 2, FrameKind.REPLY)
            with pytest.raises(TransportError, match="gave up its answer"):
                await first
            await second

    run(main())


def test_a_handler_that_raises_ends_the_stream_and_not_the_patience_of_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(peer: str, incoming: Incoming) -> Encoded:
        raise RuntimeError("a defect")

    async def main() -> None:
        async with pair(handler) as (client, _):
            with pytest.raises(TransportError, match="ended"):
                await client.request(SMALL, 60)

    run(main())
    assert "without an answer" in caplog.text


async def refused(first: bytes, kind: int = FrameKind.HELLO) -> tuple[str, str]:
    """Begin with ``first``: what our side raises, and the goodbye that the peer reads."""
    one, other = await streams()
    raw = Raw(*other)
    raw.send(kind, first)
    ours = Connection(*one, peer="raw", handler=echo)
    with pytest.raises(TransportError) as caught:
        await ours.open()
    text = await raw.goodbye()
    raw.writer.close()
    assert ours.closed.is_set()
    with pytest.raises(TransportError):
        await ours.request(SMALL, 1)
    return str(caught.value), text


def test_an_unknown_protocol_version_is_refused_in_one_sentence_on_both_sides() -> None:
    async def main() -> None:
        for sentence in await refused(dump_json({"versions": [2, 3], "features": []})):
            assert "speaks protocol versions [2, 3], this side speaks [1]: update the older of the two" in sentence
            assert "\n" not in sentence

    run(main())


def another_build(versions: tuple[int, ...], features: tuple[str, ...] = ()) -> ModuleType:
    """A second copy of the module under test: the other end of a stream between two versions of swarmtune."""
    spec = importlib.util.spec_from_file_location("swarmtune.transport.another_connection", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    vars(build).update(PROTOCOL_VERSIONS=versions, FEATURES=features)
    return build


async def meet(client: ModuleType, server: ModuleType) -> list[Connection | BaseException]:
    """A client and a server of two builds shake hands: each one's connection, or why it has none. Where both have one, a call goes through."""
    one, other = await streams()
    ends = [client.Connection(*one, peer="server"), server.Connection(*other, peer="client", handler=echo)]
    outcomes = await asyncio.gather(*(end.open() for end in ends), return_exceptions=True)
    if not any(isinstance(outcome, BaseException) for outcome in outcomes):
        assert decode(await ends[0].request(SMALL, 5)).fields == {"n": 1}
    for end in ends:
        assert end.closed.is_set() == any(isinstance(outcome, BaseException) for outcome in outcomes)
        await end.close()
    return outcomes


@pytest.mark.parametrize(
    ("client", "server"),
    [((1,), (2,)), ((2,), (1,)), ((1, 2), (3,)), ((3, 4), (1, 2))],
    ids=["older client", "newer client", "far server", "far client"],
)
def test_two_builds_without_a_common_version_each_say_so_in_one_sentence(client: tuple[int, ...], server: tuple[int, ...]) -> None:
    async def main() -> None:
        outcomes = await meet(another_build(client), another_build(server))
        for outcome, peer, ours, theirs in zip(outcomes, ("server", "client"), (client, server), (server, client), strict=True):
            assert type(outcome) is TransportError
            assert str(outcome) == (
                f"no connection to peer {peer}: the peer speaks protocol versions {list(theirs)}, this side speaks {list(ours)}: "
                "update the older of the two"
            )

    run(main())


@pytest.mark.parametrize(
    ("client", "server", "agreed"),
    [((1,), (1,), 1), ((1,), (1, 2), 1), ((1, 2), (1,), 1), ((1, 2), (2, 3), 2), ((3, 2, 1), (1, 2), 2)],
    ids=["one build", "newer server", "newer client", "overlap", "any order"],
)
def test_two_builds_with_a_common_version_use_the_largest(client: tuple[int, ...], server: tuple[int, ...], agreed: int) -> None:
    async def main() -> None:
        for end in await meet(another_build(client), another_build(server)):
            assert getattr(end, "version", end) == agreed

    run(main())


@pytest.mark.parametrize(
    ("client", "server", "both"),
    [((), ("teleport",), set()), (("teleport",), (), set()), (("teleport", "zip"), ("zip", "sing"), {"zip"}), (("zip",), ("zip",), {"zip"})],
    ids=["newer server", "newer client", "some", "all"],
)
def test_features_that_one_side_does_not_know_are_ignored(client: tuple[str, ...], server: tuple[str, ...], both: set[str]) -> None:
    async def main() -> None:
        for end in await meet(another_build((1,), client), another_build((1,), server)):
            assert getattr(end, "features", end) == both

    run(main())


@pytest.mark.parametrize(
    "more", [{"mood": "good"}, {"versions": [1, 99], "features": ["x"], "limits": {"bytes": 1}}, {"features": [None, 1, {}, "x" * 1000]}], ids=str
)
def test_keys_of_a_hello_that_nobody_knows_are_ignored(more: dict[str, Any]) -> None:
    async def main() -> None:
        one, other = await streams()
        raw = Raw(*other)
        raw.send(FrameKind.HELLO, dump_json({"versions": [1], "features": [], **more}))
        ours = Connection(*one, peer="raw", handler=echo)
        await ours.open()
        assert (ours.version, ours.features) == (1, frozenset())
        assert (await raw.read())[0].kind is FrameKind.HELLO
        raw.send_message(SMALL, 1)
        assert (await raw.read())[0].kind is FrameKind.REPLY
        await ours.close()
        raw.writer.close()

    run(main())


def test_the_goodbye_of_a_peer_that_refuses_us_is_told() -> None:
    async def main() -> None:
        one, other = await streams()
        raw = Raw(*other)
        raw.send(FrameKind.GOODBYE, b"I speak version 9\x1b[2J only")
        with pytest.raises(TransportError, match=r"the peer refused: I speak version 9 \[2J only"):
            await Connection(*one, peer="raw").open()
        raw.writer.close()

    run(main())


def test_a_goodbye_in_the_middle_is_told_to_every_open_request() -> None:
    async def main() -> None:
        async with against_raw() as (ours, raw):
            asking = asyncio.create_task(ours.request(SMALL, 5))
            await asyncio.sleep(0.01)
            raw.send(FrameKind.GOODBYE, b"too much at once")
            with pytest.raises(TransportError, match="too much at once"):
                await asking

    run(main())


@pytest.mark.parametrize(
    "hello",
    [b"", b"\xff", b"[]", b"{}", b'{"versions":1,"features":[]}', b'{"versions":[1],"features":{}}', b'{"versions":[]}',
     b'{"versions":["\\ud800","\\u001b[2J"]}',
     b'{"versions":[null,{},[[]]]}', b"[" * 100_000, json.dumps({"versions": [1], "features": ["x"] * 65}).encode()],
    ids=lambda hello: repr(hello)[:30],
)  # fmt: skip
def test_a_malformed_hello_is_refused_with_a_printable_goodbye(hello: bytes) -> None:
    async def main() -> None:
        _, text = await refused(hello)
        assert text.isprintable()

    run(main())


@pytest.mark.parametrize("kind", [FrameKind.CALL, FrameKind.DATA, FrameKind.PING, FrameKind.END], ids=str)
def test_a_peer_that_does_not_begin_with_a_hello_is_refused(kind: FrameKind) -> None:
    run(_no_hello(kind))


async def _no_hello(kind: FrameKind) -> None:
    assert "did not begin with a hello" in (await refused(HELLO, kind))[0]


def test_unknown_features_and_further_versions_are_ignored() -> None:
    assert agree({"versions": [7, 1, "x"], "features": ["teleport", 3, None], "more": 1}) == (1, frozenset())

    async def main() -> None:
        one, other = await streams()
        raw = Raw(*other)
        raw.send(FrameKind.HELLO, dump_json({"versions": [2, 1], "features": ["teleport"], "mood": "good"}))
        ours = await Connection(*one, peer="raw").open()
        await ours.close()
        raw.writer.close()

    run(main())


def test_a_peer_that_never_says_hello_fails_at_the_handshake_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def main() -> None:
        one, other = await streams()
        with pytest.raises(TransportError, match="no handshake in time"):
            await Connection(*one, peer="raw").open()
        other[1].close()

    run(main())


def test_a_handshake_that_is_cancelled_closes_its_stream() -> None:
    async def main() -> None:
        one, other = await streams()
        opening = asyncio.create_task(Connection(*one, peer="raw").open())
        await asyncio.sleep(0.01)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await other[0].read()
        other[1].close()

    run(main())


HEAD = SMALL.header
LIMITS = WireLimits(open_messages=3)
BREACHES: dict[str, tuple[str, Callable[[Raw], Any]]] = {
    "a second hello": ("a second hello", lambda raw: raw.send(FrameKind.HELLO, HELLO)),
    "data for no message": ("belong to no message", lambda raw: raw.send(FrameKind.DATA, b"x", 5)),
    "an end for no message": ("belong to no message", lambda raw: raw.send(FrameKind.END, bytes(12), 5)),
    "an answer to no call": ("never made", lambda raw: raw.send_message(SMALL, 5, FrameKind.REPLY)),
    "a message begun twice": ("begun twice", lambda raw: [raw.send(FrameKind.CALL, HEAD, 5) for _ in range(2)]),
    "too many messages begun": ("too many unfinished", lambda raw: [raw.send(FrameKind.CALL, HEAD, n) for n in range(4)]),
    "too many calls open": ("more than 3 open calls", lambda raw: [raw.send_message(SMALL, n) for n in range(4)]),
    "an id in use": ("a request id in use", lambda raw: [raw.send_message(SMALL, 1) for _ in range(2)]),
    "a header that is no JSON": ("not JSON", lambda raw: raw.send(FrameKind.CALL, b"\x00", 5)),
    "damaged data": (
        "damaged",
        lambda raw: [raw.send_message(SMALL, 1, without_end=True), raw.send(FrameKind.END, struct.pack("<QI", SMALL.body_bytes, 1), 1)],
    ),
    "missing data": ("was cut", lambda raw: [raw.send(FrameKind.CALL, HEAD, 1), raw.send(FrameKind.END, bytes(12), 1)]),
    "too much data": ("carries more", lambda raw: [raw.send(FrameKind.CALL, HEAD, 1), raw.send(FrameKind.DATA, bytes(65), 1)]),
    "data of no length": ("carries nothing", lambda raw: [raw.send(FrameKind.CALL, HEAD, 1), raw.send(FrameKind.DATA, b"", 1)]),
    "an unknown kind": ("unknown frame kind", lambda raw: raw.send(77)),
    "another protocol": ("wrong magic", lambda raw: raw.writer.write(b"GET / HTTP/1.1\r\n\r\n")),
    "a frame over the limit": ("over the limit", lambda raw: raw.writer.write(struct.pack("<2sBBIQ", b"sw", 1, 4, MAX_PAYLOAD + 1, 1))),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_the_protocol_ends_the_stream_with_its_reason(breach: str) -> None:
    async def main() -> None:
        async def never(peer: str, incoming: Incoming) -> Encoded:
            await asyncio.sleep(60)
            raise AssertionError

        sentence, act = BREACHES[breach]
        async with against_raw(never, LIMITS) as (ours, raw):
            act(raw)
            assert sentence in await raw.goodbye()
            await ours.closed.wait()

    run(main())


def test_a_side_without_a_handler_takes_no_calls() -> None:
    async def main() -> None:
        async with against_raw(None) as (_, raw):
            raw.send_message(SMALL, 1)
            assert "takes no calls" in await raw.goodbye()

    run(main())


def test_a_call_that_does_not_fit_into_the_budget_now_is_answered_busy_and_the_others_go_on() -> None:
    async def main() -> None:
        budget = Budget(10_000)
        async with against_raw(budget=budget) as (_, raw):
            raw.send_message(SMALL, 1, without_end=True)
            await settle(lambda: budget.used_bytes > 0)
            raw.send_message(BIG, 2)
            answer = (await raw.read())[1]
            assert b"busy" in answer
            assert b'"retry_ms":500' in answer
            assert (await raw.read())[0].kind is FrameKind.END
            raw.send(FrameKind.END, list(SMALL.frames(FrameKind.CALL, 1))[-1][1].tobytes(), 1)
            prefix, payload = await raw.read()
            assert (prefix.kind, prefix.request_id) == (FrameKind.REPLY, 1)
            assert b"told" in payload
            await settle(lambda: budget.used_bytes == 0)

    run(main())


def test_a_peer_that_is_busy_for_long_keeps_its_stream() -> None:
    async def main() -> None:
        async with pair() as (client, server):
            server._budget.limit_bytes = 100_000
            huge = encode(Message("ask", {"n": 2}, {"x": torch.zeros(1_000_000)}))  # answered before it is sent whole
            for _ in range(70):
                assert decode(await client.request(huge, 5)).kind == "fault"
            await client.request(SMALL, 5)
            await settle(lambda: not server._dropping)

    run(main())


def test_refusals_that_a_peer_does_not_read_end_its_stream_before_they_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.05)

    async def main() -> None:
        async with against_raw(budget=Budget(10_000)) as (ours, raw):
            ours._writer.transport.set_write_buffer_limits(high=1 << 10)
            for number in range(20_000):
                raw.send(FrameKind.CALL, BIG.header, number)
                raw.send(FrameKind.CANCEL, request_id=number)
                if number % 100 == 0:
                    await asyncio.sleep(0)
                    assert len(asyncio.all_tasks()) < 100
                if ours.closed.is_set():
                    return
            raise AssertionError("the stream goes on")

    run(main())


def test_an_answer_that_does_not_fit_fails_its_call_only() -> None:
    async def main() -> None:
        one, other = await streams()
        client = Connection(*one, peer="server", budget=Budget(100_000))
        server = Connection(*other, peer="client", handler=echo)
        await asyncio.gather(client.open(), server.open())
        try:
            with pytest.raises(TransportError, match="does not fit here now"):
                await client.request(BIG, 5)
            assert decode(await client.request(SMALL, 5)).kind == "told"
        finally:
            await client.close()
            await server.close()

    run(main())


def test_a_peer_that_takes_a_message_slowly_is_not_taken_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PING_EVERY_S": 0.05, "PONG_EVERY_S": 0.05, "SILENCE_S": 0.4, "WRITE_BUFFER_BYTES": 1 << 22}.items():
        monkeypatch.setattr(module, name, value)

    async def main() -> None:
        one, middle = await streams()
        onward, other = await streams()
        client, server = Connection(*one, peer="server"), Connection(*other, peer="client", handler=echo)

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pause_s: float) -> None:
            while data := await reader.read(1 << 16):
                await asyncio.sleep(pause_s)
                writer.write(data)
                await writer.drain()

        pumps = [asyncio.create_task(pump(middle[0], onward[1], 0.06)), asyncio.create_task(pump(onward[0], middle[1], 0.0))]
        try:
            await asyncio.gather(client.open(), server.open())
            began = asyncio.get_running_loop().time()
            assert decode(await client.request(BIG, 7)).kind == "told"
            assert asyncio.get_running_loop().time() - began > 3 * 0.4
        finally:
            await client.close()
            await server.close()
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (middle, onward):
                end[1].close()

    run(main())


@pytest.mark.parametrize("kind", [FrameKind.PING, FrameKind.CANCEL], ids=str)
def test_a_flood_of_control_frames_from_a_peer_that_reads_nothing_piles_nothing_up(kind: FrameKind) -> None:
    async def main() -> None:
        async with against_raw() as (ours, raw):
            for number in range(50_000):
                raw.send(kind, request_id=number)
                if number % 500 == 0:  # from Python 3.12 on, a write takes as long as there are writes that wait
                    await raw.writer.drain()
            await raw.writer.drain()
            raw.send_message(SMALL, 1 << 50)
            before = len(asyncio.all_tasks())
            assert before < 10
            assert len(ours._control) < 10
            while (await raw.read())[0].kind is not FrameKind.END:
                assert len(asyncio.all_tasks()) < 10

    run(main())


def test_calls_given_up_by_a_peer_that_reads_nothing_end_its_stream_before_they_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONTROL", 8)
    monkeypatch.setattr(module, "FLUSH_S", 0.05)

    async def main() -> None:
        large = encode(Message("told", {}, {"x": torch.zeros(1_000_000)}))

        async def handler(peer: str, incoming: Incoming) -> Encoded:
            return large

        async with against_raw(handler) as (ours, raw):
            for request_id in range(100):
                raw.send_message(SMALL, request_id)
                await asyncio.sleep(0.002)
                raw.send(FrameKind.CANCEL, request_id=request_id)
                if ours.closed.is_set():
                    break
            await asyncio.wait_for(ours.closed.wait(), 3)
            assert "takes nothing" in str(ours._failure)

    run(main())


def test_a_message_that_stops_in_the_middle_ends_the_stream_even_when_pings_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_EVERY_S", 0.02)
    monkeypatch.setattr(module, "STALL_S", 0.1)

    async def main() -> None:
        async with against_raw() as (ours, raw):
            raw.send(FrameKind.CALL, BIG.header, 1)
            while not ours.closed.is_set():
                raw.send(FrameKind.PING)
                await asyncio.sleep(0.01)
            assert "stopped in the middle" in str(ours._failure)

    run(main())


def test_a_peer_that_takes_no_answer_ends_its_stream_and_frees_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.1)
    monkeypatch.setattr(module, "FLUSH_S", 0.05)

    async def main() -> None:
        large = encode(Message("told", {}, {"x": torch.zeros(4_000_000)}))

        async def handler(peer: str, incoming: Incoming) -> Encoded:
            return large

        async with against_raw(handler) as (ours, raw):
            raw.send_message(SMALL, 1)
            await asyncio.wait_for(ours.closed.wait(), 3)
            assert "has taken no data" in str(ours._failure)
            await settle(lambda: not ours._answering and ours._budget.used_bytes == 0)
            await asyncio.sleep(0.1)
            assert ours._writer.transport.get_write_buffer_size() == 0

    run(main())


def test_a_peer_that_disappears_leaves_no_task_at_either_end() -> None:
    async def main() -> None:
        one, other = await streams()
        client, server = Connection(*one, peer="server"), Connection(*other, peer="client", handler=echo)
        await asyncio.gather(client.open(), server.open())
        one[1].transport.abort()
        await asyncio.gather(client.closed.wait(), server.closed.wait())
        assert not client._answering
        assert not server._answering

    run(main())


def test_closing_twice_and_closing_under_load_are_fine() -> None:
    async def main() -> None:
        async with pair() as (client, server):
            asking = [asyncio.create_task(client.request(BIG, 5)) for _ in range(8)]
            await asyncio.sleep(0.005)
            await server.close()
            await server.close()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert all(isinstance(answer, Incoming | TransportError) for answer in answers)
            assert any(isinstance(answer, TransportError) for answer in answers)

    run(main())


def test_bytes_are_counted_alike_at_both_ends() -> None:
    async def main() -> None:
        async with pair() as (client, server):
            await client.request(BIG, 5)
            assert client._traffic.bytes_up == server._traffic.bytes_down > 1_600_000
            assert client._traffic.bytes_down == server._traffic.bytes_up > 1_600_000

    run(main())


def test_loopback_calls_by_name_counts_and_reconnects_after_a_cut() -> None:
    async def main() -> None:
        transport = LoopbackTransport({"a": echo})
        assert decode(await transport.call("a", SMALL, 5)).fields == {"n": 1}
        await transport._pairs["client", "a"][1].close()
        await asyncio.sleep(0.01)
        assert decode(await transport.call("a", SMALL, 5)).fields == {"n": 1}
        assert transport.traffic.bytes_up > 2 * SMALL.body_bytes
        await transport.close()

    run(main())


def test_loopback_to_a_peer_that_is_dead_or_unknown_is_a_transport_error() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def never(peer: str, incoming: Incoming) -> Encoded:
            gate.set()
            await asyncio.sleep(60)
            raise AssertionError

        transport = LoopbackTransport({"a": never})
        asking = asyncio.create_task(transport.call("a", SMALL, 60))
        await gate.wait()
        await transport.kill("a")
        with pytest.raises(TransportError):
            await asking
        for name in ("a", "b"):
            with pytest.raises(TransportError, match="is not there"):
                await transport.call(name, SMALL, 60)
        await transport.close()

    run(main())


def test_agree_refuses_in_words_what_it_does_not_share() -> None:
    with pytest.raises(WireError, match=r"\[99\], this side speaks \[1\]"):
        agree({"versions": [99]})


def test_an_answer_larger_than_an_honest_one_is_refused_before_it_is_allocated() -> None:
    async def main() -> None:
        async with pair() as (client, _):
            request = encode(Message("ask", {}, {"x": torch.arange(400_000.0)}), answer_bytes=64)
            with pytest.raises(TransportError, match="over the limit of 64"):
                await client.request(request, 5)

    run(main())
