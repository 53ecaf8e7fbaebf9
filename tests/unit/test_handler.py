"""A hostile client against doors 7 to 9: every bad call is a typed fault of one sentence, none costs a traceback, honest calls keep their bits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import Tensor

from servers.executor import Executor
from servers.handler import CallHandler
from swarmtune.adapters.tuners import _FIELDS, injected_skeleton, rebuild
from swarmtune.errors import WireError
from swarmtune.skeleton import load_config
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Budget, FrameKind, Incoming, Prefix, WireLimits
from swarmtune.wire.messages import AdapterSpec, CallKwarg, Fault, FaultCode, SpanCall, SpanResult
from tests.harness import make_handler

MODULES = ["transformer.h.0.self_attention.query_key_value", "transformer.h.1.self_attention.query_key_value"]
LORA: dict[str, Any] = {"peft_type": "LORA", "modules": MODULES, "ranks": [2, 3], "alphas": [4.0, 8.0], "rslora": False, "fan_in_fan_out": False}
IA3: dict[str, Any] = {"peft_type": "IA3", "modules": MODULES, "feedforward": [False, True], "fan_in_fan_out": False}
SPAN = BlockSpan(0, 2)
WRONG: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    1 << 40,
    10**30,
    "",
    "LORA ",
    "x" * 300,
    "(a+)+$",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    ["(a+)+$"],
    ["transformer.h.0"],
    ["nowhere"],
    MODULES[::-1],
    [MODULES[0]] * 2,
]


@pytest.fixture(scope="module")
def handler(bloom: Path) -> Iterator[CallHandler]:
    executor = Executor().start()
    yield make_handler(bloom, "0:2", executor=executor)
    executor.close()


def hidden(rows: int = 2, tokens: int = 5) -> Tensor:
    return torch.randn(rows, tokens, 48, generator=torch.Generator().manual_seed(0))


def ask(handler: CallHandler, message: Message) -> Message:
    async def main() -> Message:
        frames = [(Prefix.unpack(head), bytes(payload)) for head, payload in encode(message).frames(FrameKind.CALL, 1)]
        incoming = Incoming.begin(*frames[0], WireLimits(), Budget(1 << 30))
        for _, payload in frames[1:-1]:
            incoming.data(payload)
        incoming.end(frames[-1][1])
        answer = [(Prefix.unpack(head), bytes(payload)) for head, payload in (await handler("client", incoming)).frames(FrameKind.REPLY, 1)]
        reply = Incoming.begin(*answer[0], WireLimits(), Budget(1 << 30))
        for _, payload in answer[1:-1]:
            reply.data(payload)
        reply.end(answer[-1][1])
        return decode(reply)

    return asyncio.run(main())


def call(handler: CallHandler, **changes: Any) -> SpanCall:
    return SpanCall(**{"span": SPAN, "model": handler.info.model, "hidden_BTH": hidden(), **changes})


def lora_kwargs(digest: str, ranks: tuple[int, int] = (2, 3)) -> tuple[CallKwarg, ...]:
    found = []
    for block, rank in enumerate(ranks):
        for name, shape in (("lora_A", (rank, 48)), ("lora_B", (144, rank))):
            tensor = torch.full(shape, 0.01 * (block + 1))
            found.append(CallKwarg(f"peft.{digest}.self_attention.query_key_value.{name}.weight", tensor, {}, BlockSpan(block, block + 1), True))
    return tuple(found)


def refusal(handler: CallHandler, message: Message, caplog: pytest.LogCaptureFixture) -> Fault:
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        fault = Fault.from_message(ask(handler, message))
    assert not caplog.records, "a bad call cost a traceback"
    assert "\n" not in fault.detail
    return fault


def test_an_honest_call_is_answered(handler: CallHandler) -> None:
    forward = call(handler)
    result = SpanResult.from_message(ask(handler, forward.to_message()), forward)
    assert torch.isfinite(result.hidden_BTH).all()
    spec = AdapterSpec.of(LORA)
    backward = call(handler, adapter=spec, kwargs=lora_kwargs(spec.digest), grad_BTH=hidden(), input_grad=True)
    result = SpanResult.from_message(ask(handler, backward.to_message()), backward)
    assert set(result.kwarg_grads) == {0, 1, 2, 3}
    assert all(grad.abs().sum() > 0 for grad in result.kwarg_grads.values())


def prompt(block: int = 0, **changes: Any) -> CallKwarg:
    return CallKwarg(
        **{"name": "prompt", "tensor": torch.ones(1, 48), "axes": {}, "blocks": BlockSpan(block, block + 1), "requires_grad": False, **changes}
    )


def mask(**changes: Any) -> CallKwarg:
    return CallKwarg(
        **{"name": "attention_mask", "tensor": torch.ones(2, 5, dtype=torch.int64), "axes": {}, "blocks": SPAN, "requires_grad": False, **changes}
    )


BAD_KWARGS: dict[str, tuple[CallKwarg, ...]] = {
    "a prompt given twice": (prompt(), prompt(blocks=SPAN)),
    "a prompt of another width": (prompt(tensor=torch.ones(1, 47)),),
    "a prompt longer than the text": (prompt(tensor=torch.ones(6, 48)),),
    "a prompt of other rows": (prompt(tensor=torch.ones(3, 1, 48), axes={"batch": 0}),),
    "a prompt of integers": (prompt(tensor=torch.ones(1, 48, dtype=torch.int64)),),
    "a prompt outside the span": (prompt(5),),
    "a mask given twice": (mask(), mask()),
    "a mask of other rows": (mask(tensor=torch.ones(3, 5)),),
    "a mask of other tokens": (mask(tensor=torch.ones(2, 4)),),
    "a mask of four dimensions": (mask(tensor=torch.ones(2, 1, 5, 5)),),
    "a mask for one block": (mask(blocks=BlockSpan(0, 1)),),
    "a mask that learns": (mask(tensor=torch.ones(2, 5), requires_grad=True),),
    "positions of a model that takes none": (mask(name="position_ids"),),
    "an argument that is none": (mask(name="past_key_values"),),
    "a private argument": (mask(name="use_cache"),),
    "a parameter that is none": (prompt(name="param.nothing"),),
    "a parameter that leads out of the block": (prompt(name="param...mlp"),),
    "a parameter of another shape": (prompt(name="param.input_layernorm.weight"),),
    "a parameter of integers": (prompt(name="param.input_layernorm.weight", tensor=torch.ones(48, dtype=torch.int64)),),
    "a parameter given twice": (prompt(name="param.input_layernorm.weight", tensor=torch.ones(48)),) * 2,
    "a tuner that the call does not bring": (prompt(name="peft.0123456789abcdef.x"),),
    "a name without a family": (prompt(name=""),),
}


@pytest.mark.parametrize("case", BAD_KWARGS)
def test_a_kwarg_that_fits_nothing_is_a_bad_request(handler: CallHandler, caplog: pytest.LogCaptureFixture, case: str) -> None:
    fault = refusal(handler, call(handler, kwargs=BAD_KWARGS[case]).to_message(), caplog)
    assert fault.code is FaultCode.BAD_REQUEST, fault


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:16])
@pytest.mark.parametrize("name", sorted({*_FIELDS["LORA"], *_FIELDS["IA3"], "loftq_config"}))
def test_an_adapter_configuration_with_one_wrong_field_is_a_bad_request(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, name: str, value: object
) -> None:
    for config in (LORA, IA3):
        if name not in config and name != "loftq_config":
            continue
        if name in ("rslora", "fan_in_fan_out") and value is True:
            continue
        spec = AdapterSpec.of({**config, name: value})
        fault = refusal(handler, call(handler, adapter=spec, kwargs=lora_kwargs(spec.digest)).to_message(), caplog)
        assert fault.code is FaultCode.BAD_REQUEST, fault


@pytest.mark.parametrize("name", _FIELDS["LORA"])
def test_an_adapter_configuration_without_one_field_is_a_wire_error(name: str) -> None:
    with pytest.raises(WireError):
        rebuild(AdapterSpec.of({key: value for key, value in LORA.items() if key != name}))


@pytest.mark.parametrize("ranks", [[0, 1], [1], [1, 2, 3], [1 << 15, 1], [1.0, 2.0], [True, True], ["1", "2"], [[1], [2]]], ids=str)
def test_ranks_that_are_none_are_a_wire_error(ranks: list[Any]) -> None:
    with pytest.raises(WireError):
        rebuild(AdapterSpec.of({**LORA, "ranks": ranks}))


def test_a_configuration_means_the_ranks_and_scalings_that_it_lists(bloom: Path) -> None:
    skeleton = injected_skeleton(load_config(str(bloom)), AdapterSpec.of({**LORA, "modules": MODULES, "ranks": [2, 3], "alphas": [4.0, 9.0]}))
    for name, rank, scaling in zip(MODULES, (2, 3), (2.0, 3.0), strict=True):
        layer = skeleton.get_submodule(name)
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == scaling
        assert layer.lora_A["default"].weight.shape == (rank, 48)
        assert layer.lora_A["default"].weight.is_meta
    assert not hasattr(skeleton.get_submodule(MODULES[0].replace("h.0", "h.2")), "lora_A")


def test_what_rebuild_gives_is_a_plain_configuration_without_patterns_to_spare() -> None:
    lora, ia3 = rebuild(AdapterSpec.of({**LORA, "ranks": [2, 2], "alphas": [4.0, 4.0]})), rebuild(AdapterSpec.of(IA3))
    assert isinstance(lora, LoraConfig)
    assert isinstance(ia3, IA3Config)
    assert not lora.rank_pattern
    assert not lora.alpha_pattern
    assert lora.r == 2
    assert lora.lora_alpha == 4.0


def test_a_tuner_without_one_of_its_tensors_is_a_bad_request(handler: CallHandler, caplog: pytest.LogCaptureFixture) -> None:
    spec = AdapterSpec.of(LORA)
    for index in range(4):
        kwargs = lora_kwargs(spec.digest)
        fault = refusal(handler, call(handler, adapter=spec, kwargs=kwargs[:index] + kwargs[index + 1 :]).to_message(), caplog)
        assert fault.code is FaultCode.BAD_REQUEST
        assert "not its tensor" in fault.detail


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"model": "ffff"}, FaultCode.NOT_HERE), ({"span": BlockSpan(0, 3)}, FaultCode.NOT_HERE), ({"span": BlockSpan(2, 3)}, FaultCode.NOT_HERE),
     ({"hidden_BTH": torch.ones(1, 2, 47)}, FaultCode.BAD_REQUEST), ({"hidden_BTH": torch.full((1, 2, 48), float("nan"))}, FaultCode.NON_FINITE)],
    ids=str,
)  # fmt: skip
def test_a_call_for_others_or_of_another_shape_is_refused_by_its_code(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], code: FaultCode
) -> None:
    assert refusal(handler, call(handler, **changes).to_message(), caplog).code is code


@pytest.mark.parametrize(
    "message",
    [Message("shutdown"), Message("forward"), Message("backward", {"span": [0, 2]}), Message("x" * 64), Message("result")],
    ids=lambda message: message.kind[:9],
)
def test_a_message_that_is_no_call_is_refused(handler: CallHandler, caplog: pytest.LogCaptureFixture, message: Message) -> None:
    assert refusal(handler, message, caplog).code in (FaultCode.BAD_REQUEST, FaultCode.UNSUPPORTED)


def test_a_draining_server_refuses_work_and_still_describes_itself(handler: CallHandler, caplog: pytest.LogCaptureFixture) -> None:
    handler.draining = True
    try:
        assert refusal(handler, call(handler).to_message(), caplog).code is FaultCode.DRAINING
        assert ask(handler, Message("info")).kind == "info"
    finally:
        handler.draining = False


def test_a_description_is_the_same_with_a_body_that_measures_the_line(handler: CallHandler) -> None:
    plain, measured = ask(handler, Message("info")), ask(handler, Message("info", {}, {"probe": torch.zeros(1 << 16)}))
    assert measured.kind == "info"
    assert measured.fields == plain.fields
    assert not measured.tensors


def test_hostile_calls_leave_no_trace_in_the_bits_of_honest_ones(handler: CallHandler) -> None:
    spec = AdapterSpec.of(LORA)
    honest = call(handler, adapter=spec, kwargs=lora_kwargs(spec.digest), grad_BTH=hidden(), input_grad=True)
    before = ask(handler, honest.to_message())
    kwargs = lora_kwargs(spec.digest)
    evil = tuple(replace(kwarg, tensor=torch.full_like(kwarg.tensor, 1e30)) for kwarg in kwargs)
    for hostile in (
        call(handler, adapter=spec, kwargs=evil),
        call(handler, adapter=spec, kwargs=(*evil, prompt(name="param.input_layernorm.weight", tensor=torch.full((48,), float("nan"))))),
        call(handler, adapter=spec, kwargs=(*kwargs, prompt(tensor=torch.full((1, 48), float("inf"))))),
        call(handler, adapter=spec, kwargs=(*kwargs, mask(tensor=torch.full((2, 5), float("nan"))))),
        call(handler, adapter=spec, kwargs=evil[:-1]),
    ):
        ask(handler, hostile.to_message())
    after = ask(handler, honest.to_message())
    assert list(after.tensors) == list(before.tensors)
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())


def test_a_caller_who_leaves_frees_its_place_in_flight(handler: CallHandler) -> None:
    async def main() -> None:
        message = call(handler).to_message()
        frames = [(Prefix.unpack(head), bytes(payload)) for head, payload in encode(message).frames(FrameKind.CALL, 1)]
        incoming = Incoming.begin(*frames[0], WireLimits(), Budget(1 << 30))
        for _, payload in frames[1:-1]:
            incoming.data(payload)
        asking = asyncio.ensure_future(handler("client", incoming))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert handler.in_flight == 0

    asyncio.run(main())
