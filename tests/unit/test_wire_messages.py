"""The messages of ``call`` with every field wrong in turn: only ``WireError`` comes out, and an answer must be exactly what was asked for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtune.errors import WireError
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Budget, FrameKind, Incoming, Prefix, WireLimits
from swarmtune.wire.messages import MAX_DETAIL, AdapterSpec, CallKind, CallKwarg, Fault, FaultCode, ServerInfo, SpanCall, SpanResult

HIDDEN = torch.arange(24.0).view(2, 3, 4)
ADAPTER = AdapterSpec.of({"peft_type": "LORA", "modules": ["a.b"], "ranks": [2]})
KWARGS = (
    CallKwarg("attention_mask", torch.ones(2, 3, dtype=torch.int64), {"batch": 0, "sequence": 1}, BlockSpan(2, 4), False),
    CallKwarg(f"peft.{ADAPTER.digest}.q.lora_A.weight", torch.ones(2, 4), {}, BlockSpan(2, 4), True),
    CallKwarg("prompt", torch.ones(1, 4, dtype=torch.bfloat16), {}, BlockSpan(3, 4), True),
)
FORWARD = SpanCall(BlockSpan(2, 4), "0123abcd", HIDDEN, (replace(KWARGS[0]), replace(KWARGS[1], requires_grad=False)), ADAPTER, remaining_ms=1500)
BACKWARD = SpanCall(BlockSpan(2, 4), "0123abcd", HIDDEN, KWARGS, ADAPTER, torch.ones_like(HIDDEN), True, 1500)
RESULT = SpanResult(HIDDEN + 1, {1: torch.ones(2, 2, 4), 2: torch.ones(1, 1, 4, dtype=torch.bfloat16)})
INFO = ServerInfo("0123", 8, BlockSpan(2, 4), ("aa", "bb"), "float32", "cafe", {"torch": "2.13"}, "0.1.0", "lab", 100, "ours")
WRONG: list[Any] = [
    None, True, False, -1, 0, 1, 1.5, 1 << 70, 10**400, "", "x" * 5000, "\n\x1b[2J", "\ud800", [], [[]], [0], [4, 2], [-1, 2], [1.0, 2.0],
    [0, 1 << 60], [None, None],
    {}, {"a": 1}, {"batch": 0}, {"batch": 9}, {"batch": -1}, {"batch": True}, {"rows": 0}, [{}], [["prompt"]], [1, 2, 3],
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def travel(message: Message) -> Message:
    frames = [(Prefix.unpack(head), bytes(payload)) for head, payload in encode(message).frames(FrameKind.CALL, 1)]
    incoming = Incoming.begin(*frames[0], WireLimits(), Budget(1 << 30))
    for _, payload in frames[1:-1]:
        incoming.data(payload)
    incoming.end(frames[-1][1])
    return decode(incoming)


def same_call(found: SpanCall, sent: SpanCall) -> bool:
    plain = all(getattr(found, name) == getattr(sent, name) for name in ("span", "model", "adapter", "input_grad", "remaining_ms"))
    grads = (found.grad_BTH is None and sent.grad_BTH is None) or torch.equal(found.grad_BTH, sent.grad_BTH)
    kwargs = [
        (a.name, dict(a.axes), a.blocks, a.requires_grad) == (b.name, dict(b.axes), b.blocks, b.requires_grad)
        and a.tensor.dtype == b.tensor.dtype
        and torch.equal(a.tensor, b.tensor)
        for a, b in zip(found.kwargs, sent.kwargs, strict=True)
    ]
    return plain and grads and all(kwargs) and torch.equal(found.hidden_BTH, sent.hidden_BTH)


@pytest.mark.parametrize("call", [FORWARD, BACKWARD, replace(FORWARD, adapter=None, kwargs=())], ids=["forward", "backward", "bare"])
def test_a_call_comes_back_as_it_was(call: SpanCall) -> None:
    message = travel(call.to_message())
    assert message.kind == (CallKind.FORWARD if call.grad_BTH is None else CallKind.BACKWARD)
    assert same_call(SpanCall.from_message(message), call)


def test_a_result_comes_back_as_it_was() -> None:
    found = SpanResult.from_message(travel(RESULT.to_message()), BACKWARD)
    assert torch.equal(found.hidden_BTH, RESULT.hidden_BTH)
    assert list(found.kwarg_grads) == [1, 2]
    assert all(torch.equal(found.kwarg_grads[index], RESULT.kwarg_grads[index]) for index in (1, 2))


def test_info_and_faults_come_back_as_they_were() -> None:
    assert ServerInfo.from_json(travel(INFO.to_message()).fields) == INFO
    for code in FaultCode:
        fault = Fault(code, "because", 7)
        assert Fault.from_message(travel(fault.to_message())) == fault
        assert "retry_ms" not in fault.to_message().fields, "absent where nothing is said, as from an older server"
    busy = Fault(FaultCode.BUSY, "no room", retry_ms=1500)
    assert Fault.from_message(travel(busy.to_message())) == busy
    assert ServerInfo.from_json(travel(replace(INFO, draining=True).to_message()).fields).draining is True
    assert ServerInfo.from_json({key: value for key, value in INFO.to_json().items() if key != "draining"}).draining is False


@pytest.mark.parametrize("value", [0, -1, 60_001, 1.5, True, "1", []])
def test_a_retry_time_that_is_none_is_a_wire_error(value: object) -> None:
    message = Fault(FaultCode.BUSY, "").to_message()
    with pytest.raises(WireError, match="retry_ms"):
        Fault.from_message(replace(message, fields={**message.fields, "retry_ms": value}))


@pytest.mark.parametrize("value", [None, 0, 1, "true", []])
def test_draining_that_is_neither_true_nor_false_is_a_wire_error(value: object) -> None:
    with pytest.raises(WireError, match="draining"):
        ServerInfo.from_json({**INFO.to_json(), "draining": value})


def test_the_digest_of_an_adapter_is_computed_and_does_not_depend_on_order() -> None:
    config = dict(ADAPTER.config)
    assert AdapterSpec.from_json(dict(reversed(config.items()))).digest == ADAPTER.digest
    assert AdapterSpec.from_json({**config, "ranks": [3]}).digest != ADAPTER.digest


def test_info_of_a_newer_server_may_hold_more() -> None:
    assert ServerInfo.from_json({**INFO.to_json(), "colour": "green"}) == INFO
    older = {key: value for key, value in INFO.to_json().items() if key != "family"}
    assert ServerInfo.from_json(older).family == ""


def test_a_call_of_a_newer_client_that_asks_for_more_is_refused_and_not_half_done() -> None:
    message = FORWARD.to_message()
    with pytest.raises(WireError, match="dropout_seed"):
        SpanCall.from_message(replace(message, fields={**message.fields, "dropout_seed": 1}))


FINE = {  # what may stand in these fields, besides what does
    "span": [], "model": ["", "x"], "kwargs": [], "remaining_ms": [1, 1500],
    "adapter": [None, {}, {"a": 1}, {"batch": 0}, {"batch": 9}, {"batch": -1}, {"rows": 0}],
    "input_grad": [True, False], "block": [None, 0, 1], "code": [""], "detail": ["", "\n\x1b[2J", "\ud800"],
    "num_blocks": [], "block_digests": [], "dtype": [""], "numeric_class": [""], "numeric": [{}], "version": [""], "name": [""], "rate_tok_s": [0, 1],
}  # fmt: skip


def fine(name: str, value: object) -> bool:
    return any(type(value) is type(other) and value == other for other in FINE[name])


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:14])
@pytest.mark.parametrize("name", ["span", "model", "kwargs", "remaining_ms", "adapter", "input_grad"])
def test_a_call_with_one_wrong_field_is_a_wire_error(name: str, value: object) -> None:
    message = BACKWARD.to_message()
    mutated = replace(message, fields={**message.fields, name: value})
    if fine(name, value) or (name == "adapter" and value == {"batch": True}):
        SpanCall.from_message(mutated)
        return
    with pytest.raises(WireError):
        SpanCall.from_message(mutated)


@pytest.mark.parametrize("name", ["span", "model", "kwargs", "remaining_ms"])
def test_a_call_without_one_of_its_fields_is_a_wire_error(name: str) -> None:
    message = BACKWARD.to_message()
    with pytest.raises(WireError):
        SpanCall.from_message(replace(message, fields={key: value for key, value in message.fields.items() if key != name}))


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:14])
@pytest.mark.parametrize("position", range(4))
def test_a_kwarg_entry_with_one_wrong_part_is_a_wire_error(position: int, value: object) -> None:
    message = BACKWARD.to_message()
    fields = copy.deepcopy(dict(message.fields))
    fields["kwargs"][1][position] = value
    allowed: list[list[object]] = [["", "\n"], [{}, {"batch": 0}], [], [True, False]]
    if any(type(value) is type(other) and value == other for other in allowed[position]):
        SpanCall.from_message(replace(message, fields=fields))
        return
    with pytest.raises(WireError):
        SpanCall.from_message(replace(message, fields=fields))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("hidden", None), ("hidden", torch.ones(2, 3)), ("hidden", torch.ones(2, 3, 4, dtype=torch.int64)), ("hidden", torch.ones(2, 0, 4)),
        ("hidden", torch.ones(())),
        ("grad", None), ("grad", torch.ones(2, 3, 5)), ("grad", torch.ones(2, 3, 4, dtype=torch.int32)), ("k0", None), ("k2", None),
        ("k3", torch.ones(1)), ("x", torch.ones(1)),
        ("k1", torch.ones(2, 4, dtype=torch.int64)), ("k0", torch.ones(3, dtype=torch.int64)),
    ],
    ids=str,
)  # fmt: skip
def test_a_call_with_a_tensor_missing_superfluous_or_wrong_is_a_wire_error(name: str, tensor: torch.Tensor | None) -> None:
    message = BACKWARD.to_message()
    tensors = {**message.tensors, name: tensor}
    with pytest.raises(WireError):
        SpanCall.from_message(replace(message, tensors={key: value for key, value in tensors.items() if value is not None}))


def test_a_gradient_in_a_forward_and_a_backward_without_one_are_wire_errors() -> None:
    for message in (replace(BACKWARD.to_message(), kind="forward"), replace(FORWARD.to_message(), kind="backward")):
        with pytest.raises(WireError, match="backward needs a tensor 'grad'"):
            SpanCall.from_message(message)


def test_a_call_whose_answer_could_not_be_sent_is_refused_before_it_is_computed() -> None:
    wide = replace(KWARGS[1], tensor=torch.empty(1 << 10, 1 << 10), blocks=BlockSpan(0, 1 << 9))
    with pytest.raises(WireError, match="the answer to this call would have"):
        SpanCall.from_message(replace(BACKWARD, kwargs=(wide,)).to_message())
    assert SpanCall.from_message(replace(FORWARD, kwargs=(replace(wide, requires_grad=False),)).to_message())


def test_an_adapter_configuration_that_is_a_nesting_bomb_or_not_finite_is_a_wire_error() -> None:
    bomb: Any = {}
    for _ in range(100_000):
        bomb = {"a": bomb}
    for config in (bomb, {"alpha": float("inf")}, {"alpha": float("nan")}):
        with pytest.raises(WireError):
            AdapterSpec.from_json(config)
    while bomb:  # take it apart link by link
        bomb = bomb.pop("a")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["span", "model", "kwargs", "remaining_ms", "adapter", "input_grad", "x"]), JSON), st.booleans())
def test_any_json_in_the_fields_of_a_call_gives_a_call_or_a_wire_error(fields: dict[str, Any], backward: bool) -> None:
    message = (BACKWARD if backward else FORWARD).to_message()
    try:
        SpanCall.from_message(replace(message, fields={**message.fields, **fields}))
    except WireError:
        pass


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:14])
@pytest.mark.parametrize("name", ["code", "detail", "block"])
def test_a_fault_with_one_wrong_field_is_a_wire_error(name: str, value: object) -> None:
    message = Message("fault", {"code": "busy", "detail": "later", "block": None, name: value})
    if fine(name, value):
        assert Fault.from_message(message).detail.isprintable()
        return
    with pytest.raises(WireError):
        Fault.from_message(message)


def test_a_fault_of_an_unknown_code_counts_as_internal_and_its_text_cannot_drive_a_terminal() -> None:
    fault = Fault.from_message(Message("fault", {"code": "melted", "detail": "a\x1b[2Jb\nc\u202e\ud800d"}))
    assert fault.code is FaultCode.INTERNAL
    assert fault.detail == "a [2Jb c  d"


def test_a_long_detail_is_cut_by_the_sender() -> None:
    assert len(Fault.from_message(Fault(FaultCode.INTERNAL, "x" * 9999).to_message()).detail) == MAX_DETAIL


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:14])
@pytest.mark.parametrize(
    "name", ["model", "num_blocks", "span", "block_digests", "dtype", "numeric_class", "numeric", "version", "name", "rate_tok_s"]
)
def test_a_description_with_one_wrong_field_is_a_wire_error(name: str, value: object) -> None:
    fields = {**INFO.to_json(), name: value}
    if fine(name, value):
        ServerInfo.from_json(fields)
        return
    with pytest.raises(WireError):
        ServerInfo.from_json(fields)


@pytest.mark.parametrize("name", ["model", "num_blocks", "span", "block_digests", "dtype", "numeric_class", "numeric", "version"])
def test_a_description_without_one_of_its_fields_is_a_wire_error(name: str) -> None:
    with pytest.raises(WireError):
        ServerInfo.from_json({key: value for key, value in INFO.to_json().items() if key != name})


@pytest.mark.parametrize(
    "changes",
    [{"span": [2, 5]}, {"span": [7, 9]}, {"num_blocks": 3}, {"block_digests": ["aa"]}, {"block_digests": ["aa", 1]},
     {"block_digests": ["aa", "b" * 65]},
     {"numeric": {"a": 1}}, {"numeric": {str(index): "" for index in range(33)}}, {"rate_tok_s": 1 << 50}, {"family": "x" * 129}],
    ids=str,
)  # fmt: skip
def test_a_description_that_does_not_fit_together_is_a_wire_error(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        ServerInfo.from_json({**INFO.to_json(), **changes})


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*INFO.to_json(), "code", "detail", "block"]), JSON))
def test_any_json_as_a_description_or_a_fault_gives_a_value_or_a_wire_error(fields: dict[str, Any]) -> None:
    for read in (lambda: ServerInfo.from_json({**INFO.to_json(), **fields}), lambda: Fault.from_message(Message("fault", fields))):
        try:
            read()
        except WireError:
            pass


def answer(**changes: torch.Tensor | None) -> Message:
    tensors = {**RESULT.to_message().tensors, **changes}
    return Message("result", {}, {name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    "message",
    [
        answer(hidden=None), answer(hidden=torch.ones(2, 3, 5)), answer(hidden=torch.ones(3, 2, 4)), answer(hidden=HIDDEN.double()),
        answer(hidden=HIDDEN.bfloat16()),
        answer(k1=None), answer(k2=None), answer(k0=torch.ones(2, 2, 3)), answer(k3=torch.ones(1)), answer(surprise=torch.ones(1)),
        answer(k1=torch.ones(1, 2, 4)),
        answer(k1=torch.ones(2, 4)), answer(k1=torch.ones(2, 2, 4, dtype=torch.float64)), answer(k2=torch.ones(1, 1, 4)),
        answer(k1=torch.ones(2, 2, 4, dtype=torch.int32)),
        Message("forward", {}, dict(answer().tensors)), Message("info", INFO.to_json()), Message("result"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_exactly_what_was_asked_for_is_a_wire_error(message: Message) -> None:
    SpanResult.from_message(answer(), BACKWARD)
    with pytest.raises(WireError):
        SpanResult.from_message(message, BACKWARD)


def test_gradients_in_the_answer_to_a_forward_are_a_wire_error() -> None:
    SpanResult.from_message(SpanResult(HIDDEN).to_message(), FORWARD)
    with pytest.raises(WireError, match="nobody asked for"):
        SpanResult.from_message(answer(), FORWARD)


def test_hidden_states_that_were_handed_on_come_as_a_copy_where_that_was_asked_for_and_only_there() -> None:
    sent, copied = SpanResult(None, sent=True).to_message(), SpanResult(HIDDEN, sent=True).to_message()
    assert SpanResult.from_message(sent, FORWARD, passes_on=True).sent
    found = SpanResult.from_message(copied, FORWARD, passes_on=True, copy=True)
    assert found.sent
    assert found.hidden_BTH is not None
    not_sent = SpanResult.from_message(SpanResult(HIDDEN).to_message(), FORWARD, passes_on=True, copy=True)
    assert not not_sent.sent
    for message, asked in ((sent, True), (copied, False)):
        with pytest.raises(WireError, match="where none was asked for, or lacks it"):
            SpanResult.from_message(message, FORWARD, passes_on=True, copy=asked)


def test_an_input_gradient_that_nobody_asked_for_is_a_wire_error() -> None:
    call = replace(BACKWARD, input_grad=False)
    SpanResult.from_message(answer(hidden=None), call)
    with pytest.raises(WireError):
        SpanResult.from_message(answer(), call)
