"""Hidden states and gradients in fewer bytes: negotiated, the same after a failure, and never unless asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from servers.handler import CallHandler
from swarmtune.errors import UsageError, WireError
from swarmtune.remote.caller import Codecs
from swarmtune.swarm import Swarm, connect
from swarmtune.wire.codec import Message
from swarmtune.wire.compression import Codec, codec_of, expand, squeeze
from swarmtune.wire.messages import ServerInfo
from tests.harness import Faults, batch, loopback, lora, remote, same_bits, set_values, step, worst_difference

LOSSY = [codec for codec in Codec if codec is not Codec.NONE]
ERROR = {Codec.BF16: 4e-3, Codec.FP16: 5e-4, Codec.INT8: 2e-2}
"""Of the norm, of one tensor of random numbers."""
SHARE = {Codec.BF16: 0.5, Codec.FP16: 0.5, Codec.INT8: 65 / 256}
HIDDEN_BYTES = 4 * 10 * 48 * 4


def through(tensor: Tensor, codec: Codec) -> Tensor:
    return expand(squeeze(Message("forward", {}, {"hidden": tensor}), {"hidden": codec})).tensors["hidden"]


def prepared(path: Path, swarm: Swarm) -> torch.nn.Module:
    model = remote(path, swarm, lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    return model


def both(codec: Codec) -> Codecs:
    return Codecs(codec, codec)


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(LOSSY),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 130)),
    power=st.integers(-100, 100),
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_tensor_comes_back_nearly_and_a_second_time_exactly(codec: Codec, shape: Any, power: int, seed: int, dtype: torch.dtype) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**power).to(dtype)
    once = through(tensor, codec)
    assert (once.shape, once.dtype) == (tensor.shape, dtype)
    assert torch.equal(once, through(once, codec))
    if tensor.numel():
        assert float((once.double() - tensor.double()).norm()) <= ERROR[codec] * float(tensor.double().norm()) + 1e-42


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(codec: Codec, bad: float) -> None:
    tensor = torch.ones(2, 3, 70)
    tensor[1, 1, 5] = bad
    assert not torch.isfinite(through(tensor, codec)).all()
    assert torch.isfinite(through(torch.zeros(2, 3, 70), codec)).all()


@pytest.mark.parametrize(
    "codecs",
    [
        5,
        {},
        {"hidden": "int8"},
        {"hidden": ["zip", "float32"]},
        {"hidden": ["int8", "int64", [1, 1, 64]]},
        {"hidden": ["int8", "float32"]},
        {"hidden": ["int8", "float32", [1, 1, 65]]},
        {"hidden": ["int8", "float32", [-1, -1, 64]]},
        {"hidden": ["int8", "float32", [1 << 30, 1 << 30, 1 << 30]]},
        {"hidden": ["bf16", "float32"]},
        {"other": ["int8", "float32", [1, 1, 64]]},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(codecs: object) -> None:
    tensors = {"hidden": torch.zeros(64, dtype=torch.int8), "hidden.scale": torch.zeros(1, dtype=torch.int8)}
    with pytest.raises(WireError):
        expand(Message("forward", {"codecs": codecs}, tensors))


@pytest.mark.parametrize("chaining", [True, False], ids=["chain", "one by one"])
@pytest.mark.parametrize("codec", LOSSY)
def test_a_step_moves_fewer_bytes_and_gives_nearly_the_same(bloom: Path, codec: Codec, chaining: bool) -> None:
    with loopback(bloom, ["0:1", "1:2", "2:3", "3:4"], chaining=chaining) as swarm:
        exact = step(prepared(bloom, swarm), batch())
        plain = swarm.traffic().payload
    with loopback(bloom, ["0:1", "1:2", "2:3", "3:4"], chaining=chaining, codecs=both(codec)) as swarm:
        found = step(prepared(bloom, swarm), batch())
        moved = swarm.traffic().payload
        for kind in ("up hidden", "down hidden", "up gradient"):
            assert moved[kind] / plain[kind] == pytest.approx(SHARE[codec], rel=0.01)
        assert moved["up kwargs"] == plain["up kwargs"]
    assert abs(found[1] - exact[1]) / exact[1] < 0.005
    assert 0 < worst_difference(exact[2], found[2]) < 0.2


@pytest.mark.parametrize("codec", LOSSY)
def test_what_a_codec_gives_does_not_depend_on_chains_or_failures(bloom: Path, codec: Codec) -> None:
    spans = ["0:2", "2:4", "0:2", "2:4"]
    found = []
    for faults, chaining in [(Faults(), True), (Faults(), False), *((Faults(after={call}), True) for call in range(4))]:
        with loopback(bloom, spans, chaining=chaining, codecs=both(codec), faults=faults, micro_batch_tokens=20) as swarm:
            found.append(step(prepared(bloom, swarm), batch())[2])
    assert all(same_bits(found[0], other) for other in found[1:])


def test_gradients_may_have_a_codec_of_their_own(bloom: Path) -> None:
    with loopback(bloom, ["0:2", "2:4"], codecs=Codecs(Codec.NONE, Codec.BF16)) as swarm:
        step(prepared(bloom, swarm), batch())
        payload = swarm.traffic().payload
        assert (payload["up hidden"], payload["up gradient"]) == (HIDDEN_BYTES, HIDDEN_BYTES // 2)


def test_inside_exactly_nothing_is_compressed(bloom: Path) -> None:
    with loopback(bloom, ["0:4"]) as swarm:
        expected = prepared(bloom, swarm)(**batch()).loss
    with loopback(bloom, ["0:4"], codecs=both(Codec.INT8)) as swarm:
        model = prepared(bloom, swarm)
        with swarm.exactly():
            assert torch.equal(model(**batch()).loss, expected)
        assert not torch.equal(model(**batch()).loss, expected)


def test_a_server_that_does_not_know_the_codec_is_named(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = CallHandler.info.fget

    def described(handler: CallHandler) -> ServerInfo:
        return dataclasses.replace(info(handler), features=("keeps_graphs",))

    monkeypatch.setattr(CallHandler, "info", property(described))
    with loopback(bloom, ["0:4"], codecs=both(Codec.INT8)) as swarm, pytest.raises(UsageError, match="does not know the codec int8: update it"):
        prepared(bloom, swarm)(**batch())


def test_an_unknown_codec_is_refused_before_anything_is_dialled() -> None:
    with pytest.raises(UsageError, match="codec must be one of none, bf16, fp16, int8, got 'zip'"):
        connect(["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWRrSjFPGEaTFq72zTGtzHP4GHAbLmxqmtvX9zGByuhko7"], codec="zip")


@pytest.mark.parametrize("shape", [[(1 << 31) - 1] * 7 + [0], [0] + [(1 << 31) - 1] * 7, [1 << 20, 1 << 20, 0]])
def test_shapes_whose_strides_overflow_are_refused(shape: list[int]) -> None:
    tensors = {"hidden": torch.zeros(0, dtype=torch.int8), "hidden.scale": torch.zeros(0, dtype=torch.int8)}
    with pytest.raises(WireError):
        expand(Message("result", {"codecs": {"hidden": ["int8", "float32", shape]}}, tensors))


def test_only_hidden_states_and_gradients_by_them_are_expanded() -> None:
    tensors = {"k0": torch.zeros(64, dtype=torch.bfloat16)}
    with pytest.raises(WireError):
        expand(Message("forward", {"codecs": {"k0": ["bf16", "float32"]}}, tensors))


@pytest.mark.parametrize("value", [[], {}, None, 5, "zip"])
def test_what_is_no_codec_is_refused(value: object) -> None:
    with pytest.raises(WireError):
        codec_of(value)


@pytest.mark.parametrize(("dtype", "peak"), [(torch.float16, 65504.0), (torch.float16, 65100.0), (torch.float32, 3.4e38), (torch.bfloat16, 3.38e38)])
def test_int8_stays_finite_at_the_end_of_the_range(dtype: torch.dtype, peak: float) -> None:
    tensor = torch.tensor([[[peak, -peak, 1.0]]]).to(dtype)
    found = through(tensor, Codec.INT8)
    assert torch.isfinite(found).all()
    assert torch.equal(through(found, Codec.INT8), found)


def test_what_is_not_finite_does_not_spoil_the_others_in_fp16() -> None:
    tensor = torch.tensor([[[float("nan"), 3e-8, 1e-7, float("inf")]]])
    found = through(tensor, Codec.FP16)
    assert torch.allclose(found[0, 0, 1:3], tensor[0, 0, 1:3], rtol=1e-3, atol=0)
    assert not torch.isfinite(found[0, 0, [0, 3]]).any()


def test_an_answer_that_is_compressed_though_nobody_asked_is_malformed(bloom: Path) -> None:
    with loopback(bloom, ["0:4", "0:4"]) as swarm:
        model = prepared(bloom, swarm)
        liar = next(iter(swarm._transport.handlers.values()))  # type: ignore[attr-defined]
        execute = liar._execute

        async def compressed(peer: str, call: Any) -> Any:
            result = await execute(peer, call)
            to_message = result.to_message

            class Squeezed:
                hidden_BTH = result.hidden_BTH

                def to_message(self) -> Message:
                    return squeeze(to_message(), {"hidden": Codec.BF16})

            return Squeezed()

        liar._execute = compressed
        expected = None
        for _ in range(2):
            loss = model(**batch()).loss
            expected = loss if expected is None else expected
            assert torch.equal(loss, expected)
        assert swarm.traffic().retries >= 1
