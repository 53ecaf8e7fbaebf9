"""Frames from a hostile peer: only ``WireError`` comes out, sizes are refused before memory is taken, and nothing cut or damaged passes for whole."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtune.errors import WireError
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import (
    HEADER_WEIGHT,
    MAX_PAYLOAD,
    PREFIX,
    TRAILER,
    Budget,
    BudgetFull,
    FrameKind,
    Incoming,
    Prefix,
    Share,
    WireLimits,
    dump_json,
    parse_json,
)

LIMITS = WireLimits(header_bytes=1 << 16, tensors=8, message_bytes=1 << 16, open_bytes=1 << 24)
MESSAGE = Message(
    "forward", {"span": [0, 4], "model": "abc"}, {"hidden": torch.arange(24.0).view(2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.int64)}
)
FRAMES = [(bytes(head), bytes(payload)) for head, payload in encode(MESSAGE).frames(FrameKind.CALL, 3)]
HEADER = json.loads(FRAMES[0][1])
WRONG: list[Any] = [None, True, -1, 0, 1.5, 10**30, "", "x" * 5000, [], [[]], {}, {"a": 1}, [None], "\ud800", "NaN"]


def receive(frames: list[tuple[bytes, bytes]], budget: Budget | None = None) -> Message:
    """Decode frames as a connection does; ``WireError`` where they end too soon."""
    incoming, ended = None, False
    for head, payload in frames:
        prefix = Prefix.unpack(head)
        if prefix.kind in (FrameKind.CALL, FrameKind.REPLY):
            incoming = Incoming.begin(prefix, payload, LIMITS, budget or Budget(LIMITS.open_bytes))
        elif incoming is None:
            raise WireError("no head")
        elif prefix.kind is FrameKind.DATA:
            incoming.data(payload)
        elif prefix.kind is FrameKind.END:
            incoming.end(payload)
            ended = True
    if incoming is None or not ended:
        raise WireError("no trailer")
    return decode(incoming)


def with_header(header: object) -> list[tuple[bytes, bytes]]:
    """The message under another header, with the checksum that belongs to it."""
    raw = json.dumps(header).encode()
    checksum = zlib.crc32(raw)
    for _, payload in FRAMES[1:-1]:
        checksum = zlib.crc32(payload, checksum)
    size, _ = TRAILER.unpack(FRAMES[-1][1])
    return [(Prefix(FrameKind.CALL, len(raw), 3).pack(), raw), *FRAMES[1:-1], (FRAMES[-1][0], TRAILER.pack(size, checksum))]


def begin(raw: bytes, budget: Budget | None = None) -> Incoming:
    return Incoming.begin(Prefix(FrameKind.CALL, len(raw), 1), raw, LIMITS, budget or Budget(LIMITS.open_bytes))


def test_a_whole_message_comes_back() -> None:
    found = receive(FRAMES)
    assert (found.kind, found.fields) == (MESSAGE.kind, MESSAGE.fields)
    assert torch.equal(found.tensors["hidden"], MESSAGE.tensors["hidden"])


@pytest.mark.parametrize("kind", FrameKind)
def test_a_prefix_comes_back(kind: FrameKind) -> None:
    prefix = Prefix(kind, MAX_PAYLOAD, (1 << 64) - 1)
    assert Prefix.unpack(prefix.pack()) == prefix


@pytest.mark.parametrize(
    ("offset", "value", "sentence"),
    [(0, b"http", "does not speak"), (2, b"\x02", "speaks frame version 2, this side speaks 1"), (2, b"\x00", "frame version 0"),
     (3, b"\x00", "unknown frame kind 0"), (3, b"\x0a", "unknown frame kind 10"), (3, b"\xff", "unknown frame kind 255"),
     (4, struct.pack("<I", MAX_PAYLOAD + 1), "over the limit"), (4, b"\xff\xff\xff\xff", "over the limit")],
)  # fmt: skip
def test_another_magic_version_kind_or_size_is_refused_in_one_sentence(offset: int, value: bytes, sentence: str) -> None:
    raw = bytearray(Prefix(FrameKind.CALL, 5, 1).pack())
    raw[offset : offset + len(value)] = value
    with pytest.raises(WireError, match=sentence) as caught:
        Prefix.unpack(bytes(raw))
    assert "\n" not in str(caught.value)


@settings(max_examples=500, deadline=None)
@given(st.binary(min_size=PREFIX.size, max_size=PREFIX.size))
def test_random_bytes_as_a_prefix_give_a_wire_error(raw: bytes) -> None:
    try:
        assert Prefix.unpack(raw).pack() == raw
    except WireError:
        pass


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_random_bytes_as_a_header_give_a_wire_error(raw: bytes) -> None:
    try:
        decode(begin(raw))
    except WireError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_random_bytes_as_a_trailer_give_a_wire_error(raw: bytes) -> None:
    incoming = begin(FRAMES[0][1])
    for _, payload in FRAMES[1:-1]:
        incoming.data(payload)
    if raw == FRAMES[-1][1]:
        return
    with pytest.raises(WireError):
        incoming.end(raw)


@pytest.mark.parametrize(
    "text",
    ['{"a":NaN}', '{"a":Infinity}', '{"a":-Infinity}', '{"a":1e999}', '{"a":-1e999}', '{"a":1,"a":2}', '{"x":{"a":1,"a":1}}', "[]",
     "1", "null", '"x"', "",
     "{", '{"a":1}x', "{'a':1}", '{"a":' + "1" * 5000 + "}", "\ufeff{}", "[" * 100_000, '{"a":' * 20_000, '{"a":' * 900 + "1" + "}" * 900 + "x"],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_json_that_means_nothing_or_two_things_is_refused(text: str) -> None:
    with pytest.raises(WireError):
        parse_json(text.encode())


@pytest.mark.parametrize("raw", [b"\xff\xfe{}", b'{"a":"\xc3"}', b"\x00", "{}".encode("utf-16")])
def test_a_header_that_is_not_utf_8_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        parse_json(raw)


def test_canonical_json_reads_back_and_never_writes_nan() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": "\u2028"}}
    assert parse_json(dump_json(value)) == value
    assert dump_json(value).startswith(b'{"a":')
    with pytest.raises(ValueError):
        dump_json({"a": float("nan")})


@pytest.mark.parametrize("key", ["kind", "fields", "tensors"])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_a_header_with_one_wrong_part_is_refused(key: str, value: object) -> None:
    if (key, value) in [("fields", {}), ("fields", {"a": 1}), ("kind", "NaN"), ("kind", "\ud800")]:
        return  # these are fine
    with pytest.raises(WireError):
        receive(with_header({**HEADER, key: value}))


@pytest.mark.parametrize("key", ["kind", "fields", "tensors"])
def test_a_header_without_one_of_its_parts_is_refused(key: str) -> None:
    with pytest.raises(WireError):
        receive(with_header({name: value for name, value in HEADER.items() if name != key}))


def test_a_header_with_a_part_that_we_do_not_know_is_refused() -> None:
    with pytest.raises(WireError, match="nothing else"):
        receive(with_header({**HEADER, "codec": "int8"}))


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_a_tensor_entry_with_one_wrong_part_is_refused(position: int, value: object) -> None:
    if position == 0 and value in ("NaN", "\ud800"):
        return  # a name may be anything
    entry = list(HEADER["tensors"][0])
    entry[position] = value
    with pytest.raises(WireError):
        receive(with_header({**HEADER, "tensors": [entry, HEADER["tensors"][1]]}))


def test_a_tensor_named_twice_is_refused() -> None:
    with pytest.raises(WireError, match="twice"):
        begin(dump_json({**HEADER, "tensors": [HEADER["tensors"][0]] * 2}))


def test_more_tensors_than_the_limit_are_refused() -> None:
    with pytest.raises(WireError, match="at most 8 tensors"):
        begin(dump_json({**HEADER, "tensors": [[f"t{index}", 1, [1]] for index in range(9)]}))


def test_a_header_over_its_limit_is_refused_without_being_read() -> None:
    with pytest.raises(WireError, match="header of"):
        begin(b"[" * (LIMITS.header_bytes + 1))


def test_sizes_that_add_up_over_the_limit_are_refused() -> None:
    with pytest.raises(WireError, match="over the limit"):
        begin(dump_json({**HEADER, "tensors": [["a", 8, [40_000]], ["b", 8, [40_000]]]}))


def test_unfinished_messages_share_one_budget_and_headers_count() -> None:
    budget = Budget(10_000)
    first = begin(dump_json({"kind": "x", "fields": {}, "tensors": [["a", 8, [6400]]]}), budget)
    assert budget.used_bytes == first.held_bytes > 6400
    with pytest.raises(WireError, match="does not fit now"):
        begin(dump_json({"kind": "x", "fields": {}, "tensors": [["a", 8, [6400]]]}), budget)
    with pytest.raises(WireError, match="does not fit now"):
        begin(dump_json({"kind": "x", "fields": {"a": "y" * (4000 // HEADER_WEIGHT)}, "tensors": []}), budget)
    budget.release(first.held_bytes)
    assert budget.used_bytes == 0


def test_one_peer_holds_at_most_half_of_the_budget_and_one_message_always_fits() -> None:
    budget = Budget(10_000)
    stranger, other = Share(budget, "stranger"), Share(budget, "other")
    stranger.reserve(4000)
    Share(budget, "stranger").reserve(900)  # another stream of the same peer
    with pytest.raises(BudgetFull, match="this peer holds 4900 of at most 5000"):
        stranger.reserve(200)
    other.reserve(5000)
    with pytest.raises(BudgetFull, match="9900 of 10000"):
        Share(budget, "third").reserve(200)
    stranger.release(4000)
    stranger.release(900)
    assert (budget.used_bytes, budget.by_peer) == (5000, {"other": 5000})
    other.release(5000)
    other.reserve(9000)
    other.release(9000)
    assert (budget.used_bytes, budget.by_peer) == (0, {})


def test_a_parsed_header_holds_no_more_memory_than_the_budget_was_charged() -> None:
    for filling in ("{},", "[],", '{"":0},', "1.5,", '"ab",', "[[]],", "-999,"):
        raw = ('{"fields":{"a":[' + filling * (60_000 // len(filling)) + '0]},"kind":"x","tensors":[]}').encode()
        tracemalloc.start()
        incoming = begin(raw)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held <= incoming.held_bytes, filling


def test_a_message_cut_at_any_byte_is_never_a_message() -> None:
    stream = b"".join(head + payload for head, payload in FRAMES)
    for length in range(len(stream)):
        with pytest.raises(WireError):
            receive(_split(stream[:length]))
    receive(_split(stream))


def _split(stream: bytes) -> list[tuple[bytes, bytes]]:
    frames, position = [], 0
    while position < len(stream):
        head = stream[position : position + PREFIX.size]
        if len(head) < PREFIX.size:
            raise WireError("cut in a prefix")
        size = Prefix.unpack(head).payload_bytes
        payload = stream[position + PREFIX.size : position + PREFIX.size + size]
        if len(payload) < size:
            raise WireError("cut in a payload")
        frames.append((head, payload))
        position += PREFIX.size + size
    return frames


def test_any_flipped_bit_of_a_message_is_noticed() -> None:
    stream = b"".join(head + payload for head, payload in FRAMES)
    request_ids = {position + offset for position in _starts() for offset in range(8, 16)}
    for position in range(len(stream)):
        damaged = bytearray(stream)
        damaged[position] ^= 1 << (position % 8)
        if position in request_ids or _still_head(position, damaged):
            continue  # who a frame belongs to, and whether it is a call or a reply, is the connection's to check
        with pytest.raises(WireError):
            receive(_split(bytes(damaged)))


def _starts() -> list[int]:
    starts, position = [], 0
    for head, payload in FRAMES:
        starts.append(position)
        position += len(head) + len(payload)
    return starts


def _still_head(position: int, damaged: bytearray) -> bool:
    return position == 3 and damaged[3] in (FrameKind.CALL, FrameKind.REPLY)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_mutated_stream_gives_the_message_or_a_wire_error(data: st.DataObject) -> None:
    stream = bytearray(b"".join(head + payload for head, payload in FRAMES))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(stream) - 1))
        stream[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    try:
        found = receive(_split(bytes(stream)))
    except WireError:
        return
    assert found.fields == MESSAGE.fields
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in MESSAGE.tensors.items())


def too_much(incoming: Incoming) -> None:
    incoming.data(bytes(len(incoming.body)))
    incoming.data(b"x")


MISFITS: dict[str, Callable[[Incoming], None]] = {
    "more data than declared": lambda incoming: incoming.data(b"x" * (len(incoming.body) + 1)),
    "one byte too many at the end": too_much,
    "an empty data frame": lambda incoming: incoming.data(b""),
    "a trailer before the data": lambda incoming: incoming.end(FRAMES[-1][1]),
    "an empty trailer": lambda incoming: incoming.end(b""),
    "a trailer of another size": lambda incoming: incoming.end(FRAMES[-1][1] + b"x"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_data_and_trailer_must_be_what_was_declared(misfit: str) -> None:
    incoming = begin(FRAMES[0][1])
    with pytest.raises(WireError):
        MISFITS[misfit](incoming)


def test_other_data_of_the_right_size_fail_the_checksum() -> None:
    incoming = begin(FRAMES[0][1])
    incoming.data(bytes(len(incoming.body)))
    with pytest.raises(WireError, match="checksum"):
        incoming.end(FRAMES[-1][1])


def test_the_sender_refuses_what_no_receiver_would_take() -> None:
    with pytest.raises(WireError, match="micro_batch_tokens"):
        encode(Message("x", {}, {"a": torch.zeros(1 << 15)}), LIMITS)
    with pytest.raises(WireError):
        encode(Message("x", {}, {f"t{index}": torch.zeros(1) for index in range(9)}), LIMITS)
    with pytest.raises(WireError):
        encode(Message("x", {"a": "y" * (LIMITS.header_bytes + 1)}), LIMITS)
