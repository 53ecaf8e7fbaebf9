"""Tensors as bytes: round trips of every type and layout, then hostile declarations."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarmtune.errors import WireError
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import CHUNK_BYTES, PREFIX, Budget, Encoded, FrameKind, Incoming, Prefix, WireLimits
from swarmtune.wire.tensors import ALIGNMENT, MAX_DIMENSION, TensorSpec, WireDtype, allocate, tensor_bytes, tensor_from

DTYPES = {
    WireDtype.FLOAT32: torch.float32,
    WireDtype.FLOAT64: torch.float64,
    WireDtype.FLOAT16: torch.float16,
    WireDtype.BFLOAT16: torch.bfloat16,
    WireDtype.INT64: torch.int64,
    WireDtype.INT32: torch.int32,
    WireDtype.INT8: torch.int8,
    WireDtype.UINT8: torch.uint8,
    WireDtype.BOOL: torch.bool,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def feed(encoded: Encoded, budget: Budget | None = None) -> Incoming:
    """Receive what was encoded, as the other side would."""
    incoming = None
    for head, payload in encoded.frames(FrameKind.CALL, 7):
        prefix = Prefix.unpack(head)
        assert prefix.payload_bytes == len(payload)
        assert prefix.request_id == 7
        assert len(head) == PREFIX.size
        if incoming is None:
            incoming = Incoming.begin(prefix, bytes(payload), WireLimits(), budget or Budget(1 << 40))
        elif prefix.kind is FrameKind.DATA:
            incoming.data(bytes(payload))
        else:
            incoming.end(bytes(payload))
    assert incoming is not None
    return incoming


def round_trip(**tensors: Tensor) -> dict[str, Tensor]:
    return dict(decode(feed(encode(Message("test", {"a": 1}, tensors)))).tensors)


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(shape, generator=generator) * 200 - 100).to(dtype) if dtype is not torch.bool else torch.rand(shape, generator=generator) > 0.5


def same(found: Tensor, sent: Tensor) -> bool:
    raw = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, sent))
    return found.dtype == sent.dtype and found.shape == sent.shape and torch.equal(*raw)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7, 5), (2, 3, 4, 1, 1, 2, 1, 1)], ids=str)
def test_every_type_and_shape_comes_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = values(dtype, *shape)
    assert same(round_trip(x=sent)["x"], sent)


def test_every_code_has_a_torch_type() -> None:
    assert set(DTYPES) == set(WireDtype)
    for code, dtype in DTYPES.items():
        assert TensorSpec.of("x", torch.empty(0, dtype=dtype)).dtype is code


def test_nan_payloads_infinities_and_negative_zero_keep_their_bits() -> None:
    sent = torch.tensor([0x7FC0DEAD, 0x7F800000, -0x80000000, -1], dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert same(round_trip(x=sent)["x"], sent)


@pytest.mark.parametrize(
    "make", [lambda x: x.T, lambda x: x[::2, 1:], lambda x: x[:1].expand(5, 6), lambda x: x.flip(0)], ids=["t", "slice", "expand", "flip"]
)
def test_non_contiguous_tensors_travel_as_their_values(make: Any) -> None:
    sent = make(values(torch.float32, 4, 6))
    assert same(round_trip(x=sent)["x"], sent)


def test_several_tensors_of_odd_sizes_keep_their_order_and_alignment() -> None:
    sent = {f"t{index}": values(dtype, index * 7 + 1) for index, dtype in enumerate(DTYPES.values())}
    found = round_trip(**sent)
    assert list(found) == list(sent)
    for name, tensor in found.items():
        assert same(tensor, sent[name])
        assert tensor.dtype is torch.bool or tensor.data_ptr() % ALIGNMENT == 0


def test_a_tensor_of_many_chunks_comes_back_whole() -> None:
    sent = values(torch.float64, 3 * CHUNK_BYTES // 8 + 17)
    encoded = encode(Message("test", {}, {"x": sent, "y": values(torch.bool, 3)}))
    kinds = [Prefix.unpack(head).kind for head, _ in encoded.frames(FrameKind.CALL, 7)]
    assert kinds[0] is FrameKind.CALL
    assert kinds[-1] is FrameKind.END
    assert kinds.count(FrameKind.DATA) >= 4
    assert same(decode(feed(encoded)).tensors["x"], sent)


def test_a_contiguous_tensor_is_sent_from_its_own_memory_and_history_is_dropped() -> None:
    sent = values(torch.float32, 1000).requires_grad_()
    tracemalloc.start()
    view = tensor_bytes(sent)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(view) == 4000
    assert peak < 4000
    with torch.no_grad():
        sent[0] = 42.0
    assert torch.frombuffer(view, dtype=torch.float32)[0] == 42.0
    assert not round_trip(x=sent)["x"].requires_grad


def test_a_stray_byte_in_a_bool_becomes_true_and_nothing_else() -> None:
    buffer = allocate(64)
    buffer[:4] = bytes([0, 1, 2, 255])
    found = tensor_from(TensorSpec("m", WireDtype.BOOL, (4,)), buffer, 0)
    assert found.dtype is torch.bool
    assert found.view(torch.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int16, torch.float8_e4m3fn, torch.uint16], ids=str)
def test_a_type_without_a_code_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(WireError, match=f"tensor x has dtype {dtype}, which does not travel"):
        encode(Message("test", {}, {"x": torch.zeros(2, dtype=dtype)}))


def test_a_tensor_of_nine_dimensions_or_a_bad_name_is_refused_by_the_sender() -> None:
    for name, tensor in (("x", torch.zeros((1,) * 9)), ("", torch.zeros(1)), ("n" * 513, torch.zeros(1))):
        with pytest.raises(WireError):
            encode(Message("test", {}, {name: tensor}))


@pytest.mark.parametrize(
    "entry",
    [
        None, "x", {}, [], ["x"], ["x", 1], ["x", 1, [1], 0], [1, 1, [1]], ["", 1, [1]], ["n" * 513, 1, [1]], [None, 1, [1]],
        ["x", 0, [1]], ["x", 10, [1]], ["x", -1, [1]], ["x", 1.0, [1]], ["x", True, [1]], ["x", "1", [1]], ["x", None, [1]], ["x", [], [1]],
        ["x", 10**400, [1]],
        ["x", 1, 1], ["x", 1, None], ["x", 1, {}], ["x", 1, [1] * 9], ["x", 1, [-1]], ["x", 1, [1.0]], ["x", 1, [True]], ["x", 1, ["1"]],
        ["x", 1, [None]],
        ["x", 1, [MAX_DIMENSION + 1]], ["x", 1, [10**400]], ["x", 1, [1 << 30, 1 << 30]], ["x", 1, [0, 1 << 40, 1 << 40]],
        ["x", 1, [1 << 40, 1 << 40, 0]],
    ],
    ids=lambda entry: repr(entry)[:40],
)  # fmt: skip
def test_a_malformed_tensor_entry_is_a_wire_error(entry: object) -> None:
    with pytest.raises(WireError):
        TensorSpec.from_json(entry)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 1 << 41), max_size=9), st.integers(-2, 12))
def test_every_declared_shape_is_refused_or_can_be_built_when_it_is_empty(shape: list[int], code: int) -> None:
    try:
        spec = TensorSpec.from_json(["x", code, shape])
    except WireError:
        return
    assert spec.payload_bytes <= MAX_DIMENSION * 8
    assert spec.padded_bytes % ALIGNMENT == 0
    if math.prod(shape) == 0:
        assert tensor_from(spec, allocate(0), 0).shape == torch.Size(shape)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_as_a_tensor_entry_gives_a_spec_or_a_wire_error(entry: object) -> None:
    try:
        TensorSpec.from_json(entry)
    except WireError:
        pass


@pytest.mark.parametrize("dimension", [1 << 28, 1 << 40, (1 << 30) // 4 + 1])
def test_a_huge_declared_size_is_refused_before_anything_is_allocated_or_reserved(dimension: int) -> None:
    head = encode(Message("test", {}, {"x": torch.zeros(1)})).header.replace(b"[1]]]", f"[{dimension}]]]".encode())
    assert str(dimension).encode() in head
    budget = Budget(1 << 20)
    tracemalloc.start()
    with pytest.raises(WireError, match=r"over the limit|does not fit"):
        Incoming.begin(Prefix(FrameKind.CALL, len(head), 1), head, WireLimits(), budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16
    assert budget.used_bytes == 0


def test_a_body_that_memory_cannot_hold_is_a_wire_error_and_gives_its_budget_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, dtype: torch.dtype) -> Tensor:
        raise RuntimeError("can't allocate memory")

    head, budget = encode(Message("test", {}, {"x": torch.zeros(1)})).header, Budget(1 << 30)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(WireError, match="no memory"):
        Incoming.begin(Prefix(FrameKind.CALL, len(head), 1), head, WireLimits(), budget)
    assert budget.used_bytes == 0
