"""A hostile client against doors 7 to 9: every bad call is a typed fault of one sentence, none costs a traceback, honest calls keep their bits."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import Tensor
from transformers import LlamaConfig

from servers import program, span
from servers.executor import Busy, Executor
from servers.handler import CallHandler
from swarmtune.adapters import tuners
from swarmtune.adapters.injection import fresh, inject_plain, spec_of
from swarmtune.adapters.tuners import MAX_COUNT, TUNERS, rebuild
from swarmtune.errors import KwargError, WireError
from swarmtune.skeleton import build_skeleton, check_identity, load_config
from swarmtune.types import BlockSpan
from swarmtune.wire import messages
from swarmtune.wire.codec import Message, decode, encode
from swarmtune.wire.frames import Budget, FrameKind, Incoming, Prefix, WireLimits
from swarmtune.wire.initial import MAX_INITIAL, InitialCall, InitialResult
from swarmtune.wire.messages import AdapterSpec, CallKwarg, Fault, FaultCode, ServerInfo, SpanCall, SpanResult
from tests.corridor.test_adapters import CASES, pytestmark  # noqa: F401  # what PEFT warns of is the same here
from tests.harness import make_handler

PREFIX = "transformer.h."
MODULES = ["0.self_attention.query_key_value", "1.self_attention.query_key_value"]
LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "modules": MODULES,
    "fields": {"r": 2, "lora_alpha": 4.0, "use_rslora": False, "use_dora": False, "lora_bias": False, "fan_in_fan_out": False},
    "patterns": {"rank_pattern": {MODULES[1]: 3}, "alpha_pattern": {MODULES[1]: 9.0}},
}
IA3: dict[str, Any] = {"peft_type": "IA3", "modules": MODULES, "fields": {"fan_in_fan_out": False}, "patterns": {}, "feedforward": [MODULES[1]]}
ELSEWHERE = {"TRAINABLE_TOKENS", "ADAPTION_PROMPT"}
"""Types of which nothing is in the blocks, or that PEFT does not put into a BLOOM."""
SPAN = BlockSpan(0, 2)
NO_NAMES: list[Any] = [
    None,
    True,
    1 << 40,
    "LORA",
    "(a+)+$",
    [[]],
    [None],
    {"a": 1},
    ["(a+)+$"],
    ["0.(a|a)*b"],
    ["0"],
    ["0."],
    ["transformer.h.0"],
    ["0.nowhere"],
    ["0.self_attention..query_key_value"],
    ["9.self_attention.query_key_value"],
    ["1e3.self_attention.query_key_value"],
    MODULES[::-1],
    [MODULES[0]] * 2,
    [f"{number}.x" for number in range(10**5)],
]
"""What is no list of modules."""
VALUES: list[Any] = [None, True, -1, 0, 1, 1.5, -1e6, MAX_COUNT, 10**30, -(1 << 62), "", "x", "(a+)+$", [], {"a": 1}]
"""For every field of every type: some are wrong, some right, some absurd."""
GROWTH_KB = 600 << 10
"""How much memory this process may take more, whatever a configuration says of a model of 4 blocks of width 48."""
SECONDS = 20.0
"""How long one call may take, on a machine that does other things too."""


@pytest.fixture(scope="module")
def handler(bloom: Path) -> Iterator[CallHandler]:
    executor = Executor().start()
    yield make_handler(bloom, "0:2", executor=executor)
    executor.close()


@pytest.fixture(scope="module")
def configurations(bloom: Path) -> dict[str, dict[str, Any]]:
    """An honest configuration of every type, as it travels."""
    config = load_config(str(bloom))
    site = check_identity(config)
    found: dict[str, dict[str, Any]] = {}
    for case in CASES.values():
        if case.kind in TUNERS and "bloom" in case.families and case.kind not in found:
            wanted = case.config("bloom")
            spec = spec_of(fresh(config, wanted), wanted, site)
            if spec is not None:
                found[case.kind] = json.loads(json.dumps(dict(spec.config)))
    return found


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


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tuner_kwargs(handler: CallHandler, spec: AdapterSpec, fill: float = 0.01, learn: bool = True) -> list[CallKwarg]:
    """Every tensor that the program of ``SPAN`` wants for a tuner, each block's for itself."""
    program = handler._span.programs.get(SPAN, spec)
    found, size = [], 0
    for block, names in program.tuner.items():
        for name, places in names.items():
            if not places:
                continue
            owner, _, leaf = places[0].rpartition(".")
            expected = dict(program.parent.get_submodule(owner).named_parameters(recurse=False)) | dict(
                program.parent.get_submodule(owner).named_buffers(recurse=False)
            )
            floating = expected[leaf].is_floating_point()
            size += expected[leaf].nbytes
            if size > 64 << 20:
                raise KwargError("a client pays for what it sends")
            tensor = torch.full(expected[leaf].shape, fill) if floating else torch.zeros(expected[leaf].shape, dtype=torch.int64)
            found.append(CallKwarg(f"peft.{spec.digest}.{name}", tensor, {}, BlockSpan(block, block + 1), learn and floating))
    return found


def with_field(config: Mapping[str, Any], name: str, value: object) -> AdapterSpec:
    return AdapterSpec.of({**config, "fields": {**config["fields"], name: value}})


def refused(handler: CallHandler, spec: AdapterSpec, caplog: pytest.LogCaptureFixture) -> Fault:
    """Both kinds of work that begin with a configuration, without any of its tensors: each must end in a fault, soon."""
    began = time.monotonic()
    fault = refusal(handler, call(handler, adapter=spec).to_message(), caplog)
    assert fault.code is FaultCode.BAD_REQUEST, (spec.config, fault)
    asked = InitialCall(SPAN, handler.info.model, ((0, "nothing"),), spec)
    assert refusal(handler, asked.to_message(), caplog).code is FaultCode.BAD_REQUEST
    assert time.monotonic() - began < SECONDS, spec.config
    return fault


def test_every_type_that_puts_tensors_into_blocks_is_attacked(configurations: dict[str, dict[str, Any]]) -> None:
    assert set(configurations) == set(TUNERS) - ELSEWHERE


def test_every_configuration_of_these_tests_runs_with_its_tensors(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for config in configurations.values():
        spec = AdapterSpec.of(config)
        backward = call(handler, adapter=spec, kwargs=tuple(tuner_kwargs(handler, spec)), grad_BTH=hidden(), input_grad=True)
        result = SpanResult.from_message(ask(handler, backward.to_message()), backward)
        assert result.kwarg_grads
        assert "not its tensor" in refused(handler, spec, caplog).detail


@pytest.mark.parametrize("kind", sorted(set(TUNERS) - ELSEWHERE))
def test_any_value_of_any_field_of_any_type_is_a_bad_request_soon_and_in_little_memory(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    tuner, config, before_kb = TUNERS[kind], configurations[kind], peak_kb()
    for name in (*tuner.fields, *((tuner.dropout,) if tuner.dropout else ())):
        for value in VALUES:
            fault = refused(handler, with_field(config, name, value), caplog)
            if not isinstance(value, bool | int | float | str | None) or (isinstance(value, str) and value != "x"):
                assert f"{name} of an adapter configuration must be" in fault.detail
    for name in tuner.patterns:
        for value in VALUES:
            refused(handler, AdapterSpec.of({**config, "patterns": {**config["patterns"], name: {config["modules"][0]: value}}}), caplog)
    assert peak_kb() - before_kb < GROWTH_KB


@pytest.mark.parametrize("kind", sorted(set(TUNERS) - ELSEWHERE))
def test_counts_at_their_limits_run_soon_or_not_at_all(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    tuner, before_kb = TUNERS[kind], peak_kb()
    for name in tuner.fields:
        limit = tuner.bounds.get(name, MAX_COUNT)
        with pytest.raises(WireError):
            rebuild(with_field(configurations[kind], name, limit + 1 if "seed" not in name else 1 << 63), PREFIX)
        for value in (limit, 1e6):
            began = time.monotonic()
            spec = with_field(configurations[kind], name, value)
            try:
                kwargs = tuple(tuner_kwargs(handler, spec))
            except (WireError, KwargError):
                continue
            backward = call(handler, adapter=spec, kwargs=kwargs, grad_BTH=hidden(), input_grad=True)
            caplog.clear()
            answer = ask(handler, backward.to_message())
            assert answer.kind == "result" or Fault.from_message(answer).code in (FaultCode.BAD_REQUEST, FaultCode.NON_FINITE)
            assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
            assert time.monotonic() - began < SECONDS, (name, value)
    assert peak_kb() - before_kb < 2 * GROWTH_KB


@pytest.mark.parametrize("field", ["modules", "copied", "feedforward"])
@pytest.mark.parametrize("names", NO_NAMES, ids=lambda value: repr(value)[:24])
def test_modules_that_are_no_modules_of_the_model_are_a_bad_request(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, field: str, names: object
) -> None:
    refused(handler, AdapterSpec.of({**IA3, field: names}), caplog)


SHAPES: dict[str, dict[str, Any]] = {
    "no type": {"peft_type": None},
    "an unknown type": {"peft_type": "LORA\nBUSY"},
    "a type that cannot be right": {"peft_type": "XLORA"},
    "a list of types": {"peft_type": ["LORA"]},
    "no modules": {"modules": []},
    "no fields": {"fields": None},
    "fields in a list": {"fields": ["r"]},
    "an unknown field": {"fields": {"r": 2, "loftq_config": {}}},
    "a field that only a client knows": {"fields": {"r": 2, "init_lora_weights": "pissa"}},
    "a field that runs code": {"fields": {"r": 2, "auto_mapping": {"parent_library": "os"}}},
    "no patterns": {"patterns": None},
    "a pattern field that is none": {"patterns": {"r": {}}},
    "a pattern of another type": {"patterns": {"lambda_pattern": {}}},
    "a pattern for a module that is no target": {"patterns": {"rank_pattern": {"0.mlp": 3}}},
    "a pattern that is one": {"patterns": {"rank_pattern": {".*": 3}}},
    "a rank of half": {"patterns": {"rank_pattern": {MODULES[0]: 2.5}}},
    "a rank of nothing": {"patterns": {"rank_pattern": {MODULES[0]: 0}}},
    "an alpha in words": {"patterns": {"alpha_pattern": {MODULES[0]: "4"}}},
    "an unknown key": {"code": "import os"},
    "the ranks of another type": {"ranks": {MODULES[0]: 2}},
    "the ends of another type": {"suffixes": ["dense"]},
    "the feedforward of another type": {"feedforward": []},
    "a module inside of a copied one": {"copied": ["0.self_attention"]},
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_configuration_of_another_shape_is_a_bad_request(handler: CallHandler, caplog: pytest.LogCaptureFixture, case: str) -> None:
    refused(handler, AdapterSpec.of({**LORA, **SHAPES[case]}), caplog)


@pytest.mark.parametrize("ranks", [None, [], {"0.nowhere": 2}, {"x": 2}, {"0.mlp": 2}, "first", {"": 1}], ids=str)
def test_ranks_that_adalora_cannot_have_are_a_bad_request(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture, ranks: Any
) -> None:
    config = configurations["ADALORA"]
    for given in [{config["modules"][0]: value} for value in (-1, 1.0, True, None, MAX_COUNT + 1)] if ranks == "first" else [ranks]:
        assert "ranks" in refused(handler, AdapterSpec.of({**config, "ranks": given}), caplog).detail


@pytest.mark.parametrize("suffixes", [None, [], ["(a+)+$"], ["x" * 129], ["dense"], ["nothing"], [1], ["h"], ["query_key_value"] * 65], ids=str)
def test_ends_of_names_that_lead_elsewhere_are_a_bad_request(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture, suffixes: Any
) -> None:
    refused(handler, AdapterSpec.of({**configurations["LILY"], "suffixes": suffixes}), caplog)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e7], ids=str)
def test_numbers_that_are_none_reach_no_field(value: float) -> None:
    with pytest.raises(WireError):
        rebuild(AdapterSpec({**LORA, "fields": {"lora_alpha": value}}, "x"), PREFIX)
    with pytest.raises(WireError):
        rebuild(AdapterSpec({**LORA, "patterns": {"alpha_pattern": {MODULES[0]: value}}}, "x"), PREFIX)
    if value != 1e7:
        with pytest.raises(WireError):
            AdapterSpec.from_json({**LORA, "fields": {"lora_alpha": value}})


def test_only_words_reach_the_fields_of_peft_that_take_strings(configurations: dict[str, dict[str, Any]]) -> None:
    seen = 0
    for config in configurations.values():
        for name, honest in config["fields"].items():
            for value in ("../etc", "a b", "a\n", "__import__('os')", "x" * 33, "é"):
                with pytest.raises(WireError, match=name):
                    rebuild(with_field(config, name, value), PREFIX)
            seen += isinstance(honest, str)
    assert seen > 5


def test_the_names_of_a_configuration_are_no_patterns_for_peft() -> None:
    """A dot of a name would match any character, and one pattern per module and field costs minutes on a deep model."""
    config = rebuild(AdapterSpec.of({**LORA, "copied": ["1.input_layernorm"]}), PREFIX)
    for name in (*config.rank_pattern, *config.alpha_pattern, *config.modules_to_save):
        assert re.match(rf"(^|.*\.)({name})($|\..*)", str(name)) is None
    assert config.rank_pattern[PREFIX + MODULES[1]] == 3


def test_a_configuration_that_says_something_of_each_module_of_a_deep_model_is_read_soon() -> None:
    config = LlamaConfig(num_hidden_layers=64, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, vocab_size=9)
    site = check_identity(config)
    leaves = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    names = sorted(f"{block}.{leaf}" for block in range(64) for leaf in leaves)
    ranks = {name: 1 + number % 7 for number, name in enumerate(names)}
    spec = AdapterSpec.of(
        {
            **{"peft_type": "LORA", "modules": names, "fields": {"r": 9}, "patterns": {"rank_pattern": ranks}},
            "copied": sorted(f"{block}.{leaf}" for block in range(64) for leaf in ("input_layernorm", "post_attention_layernorm")),
        }
    )
    began = time.monotonic()
    model = inject_plain(build_skeleton(config), spec, site, None, meta=True).model
    assert time.monotonic() - began < SECONDS
    assert {name: model.get_submodule(site.prefix + name).r["default"] for name in names} == ranks


def test_a_configuration_means_the_ranks_and_scalings_that_it_lists(bloom: Path) -> None:
    config = load_config(str(bloom))
    skeleton = inject_plain(build_skeleton(config), AdapterSpec.of(LORA), check_identity(config), None, meta=True).model
    for name, rank, scaling in zip(MODULES, (2, 3), (2.0, 3.0), strict=True):
        layer: Any = skeleton.get_submodule(PREFIX + name)
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == scaling
        assert layer.lora_A["default"].weight.shape == (rank, 48)
        assert layer.lora_A["default"].weight.is_meta
    assert not hasattr(skeleton.get_submodule(PREFIX + "2.self_attention.query_key_value"), "lora_A")


@pytest.mark.parametrize(
    ("kind", "field", "value"), [("FOURIERFT", "n_frequency_pattern", 5), ("WAVEFT", "n_frequency_pattern", 5), ("C3A", "block_size_pattern", 8)]
)
def test_a_pattern_of_a_type_with_its_own_way_to_match_reaches_its_module(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], kind: str, field: str, value: int
) -> None:
    config = configurations[kind]
    plain, changed = (
        [tuple(kwarg.tensor.shape) for kwarg in tuner_kwargs(handler, AdapterSpec.of({**config, "patterns": {field: given}}))]
        for given in ({}, {config["modules"][0]: value})
    )
    assert plain != changed
    assert plain[1:] == changed[1:] or plain[:1] + plain[2:] == changed[:1] + changed[2:]


def test_what_rebuild_gives_is_a_plain_configuration() -> None:
    lora, ia3 = rebuild(AdapterSpec.of(LORA), PREFIX), rebuild(AdapterSpec.of(IA3), PREFIX)
    assert isinstance(lora, LoraConfig)
    assert isinstance(ia3, IA3Config)
    assert set(lora.target_modules) == {PREFIX + name for name in MODULES}
    assert set(ia3.feedforward_modules) == {PREFIX + MODULES[1]}
    assert lora.r == 2
    assert lora.lora_alpha == 4.0
    assert set(rebuild(AdapterSpec.of(LORA), PREFIX, range(1)).target_modules) == {PREFIX + MODULES[0]}


def initial(handler: CallHandler, **changes: Any) -> InitialCall:
    names = ((0, "param.input_layernorm.weight"), (1, "param.mlp.dense_h_to_4h.bias"))
    return InitialCall(**{"span": SPAN, "model": handler.info.model, "names": names, "shapes": ((48,), (192,)), **changes})


def test_first_values_are_what_the_blocks_hold(handler: CallHandler, configurations: dict[str, dict[str, Any]]) -> None:
    asked = initial(handler)
    values = InitialResult.from_message(ask(handler, asked.to_message()), asked).values
    assert torch.equal(values[0], handler._span.weights.blocks[0].get_parameter("input_layernorm.weight"))
    spec = AdapterSpec.of(with_field(LORA, "use_dora", True).config)
    asked = initial(handler, adapter=spec, names=((0, "self_attention.query_key_value.lora_magnitude_vector.weight"),), shapes=((144,),))
    magnitude = InitialResult.from_message(ask(handler, asked.to_message()), asked).values[0]
    assert torch.allclose(magnitude, handler._span.weights.blocks[0].get_parameter("self_attention.query_key_value.weight").norm(dim=1))


DORA = with_field(LORA, "use_dora", True)
BAD_INITIAL: dict[str, dict[str, Any]] = {
    "no parameter": {"names": ((0, "param.nothing"),)},
    "a parameter's module": {"names": ((0, "param.input_layernorm"),)},
    "a parameter outside of the block": {"names": ((0, "param...word_embeddings.weight"),)},
    "an unknown family": {"names": ((0, "file./etc/passwd"),)},
    "no name": {"names": ((0, ""),)},
    "an attribute": {"names": ((0, "param.input_layernorm.__class__"),)},
    "a tensor without its tuner": {"names": ((0, "self_attention.query_key_value.lora_A.weight"),)},
    "a tensor that the tuner has not": {"names": ((0, "self_attention.dense.lora_magnitude_vector.weight"),), "adapter": DORA},
    "a tuner of which nothing starts from weights": {"names": ((0, "self_attention.query_key_value.lora_A.weight"),), "adapter": AdapterSpec.of(IA3)},
    "no state of a generator": {"rng": torch.zeros(0, dtype=torch.uint8), "adapter": DORA},
    "half a state of a generator": {"rng": torch.get_rng_state()[:2528], "adapter": DORA},
    "random bytes as a state": {"rng": torch.randint(0, 256, torch.get_rng_state().shape, dtype=torch.uint8), "adapter": DORA},
    "a state of zeros": {"rng": torch.zeros_like(torch.get_rng_state()), "adapter": DORA},
    "too long a state": {"rng": torch.zeros(1 << 15, dtype=torch.uint8)},
    "a state of numbers": {"rng": torch.zeros(5056)},
    "a block outside of the span": {"names": ((2, "param.input_layernorm.weight"),)},
    "a block before all": {"names": ((-1, "param.input_layernorm.weight"),)},
    "no names": {"names": ()},
    "more names than there may be": {"names": tuple((0, f"param.{number}") for number in range(MAX_INITIAL + 1))},
    "as many names as there may be, all wrong": {"names": tuple((0, f"param.{number}") for number in range(MAX_INITIAL))},
    "one name twice": {"names": ((0, "param.input_layernorm.weight"),) * 2},
}


@pytest.mark.parametrize("case", BAD_INITIAL)
def test_a_call_for_first_values_that_do_not_exist_is_a_bad_request(handler: CallHandler, caplog: pytest.LogCaptureFixture, case: str) -> None:
    state = torch.get_rng_state()
    fault = refusal(handler, initial(handler, **BAD_INITIAL[case]).to_message(), caplog)
    assert fault.code is FaultCode.BAD_REQUEST, fault
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "value", [None, True, "names", [], [["0", "x"]], [[0]], [[0, 1]], [0], [[0, "x", 1]], [[True, "x"]], [[0, "x" * 513]], {"0": "x"}], ids=str
)
def test_names_of_first_values_that_are_none_are_a_bad_request(handler: CallHandler, caplog: pytest.LogCaptureFixture, value: Any) -> None:
    message = initial(handler).to_message()
    assert refusal(handler, Message(message.kind, {**message.fields, "names": value}), caplog).code is FaultCode.BAD_REQUEST


@pytest.mark.parametrize(("changes", "code"), [({"model": "ffff"}, FaultCode.NOT_HERE), ({"span": BlockSpan(0, 3)}, FaultCode.NOT_HERE)], ids=str)
def test_a_call_for_first_values_of_others_is_refused_by_its_code(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], code: FaultCode
) -> None:
    assert refusal(handler, initial(handler, **changes).to_message(), caplog).code is code


def test_first_values_too_large_for_one_answer_are_refused_before_they_are_copied(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "WireLimits", lambda: WireLimits(message_bytes=500))
    fault = refusal(handler, initial(handler).to_message(), caplog)
    assert fault.code is FaultCode.BAD_REQUEST
    assert "ask for fewer" in fault.detail


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("PSOFT", {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 64, "r": 48}),
        ("PSOFT", {"psoft_svd": "full", "r": 48, "use_cayley_neumann": True, "num_cayley_neumann_terms": 64}),
        ("PSOFT", {"psoft_alpha": 0.0}),
        ("TINYLORA", {"r": 48, "u": MAX_COUNT}),
        ("TINYLORA", {"r": MAX_COUNT, "u": MAX_COUNT}),
        ("DEFT", {"r": MAX_COUNT}),
        ("DELORA", {"r": MAX_COUNT}),
        ("SUPERTUNING", {"r": MAX_COUNT, "sparsity": 1.0}),
        ("LORA", {"use_dora": True, "r": MAX_COUNT}),
    ],
    ids=str,
)
@pytest.mark.parametrize("draws", [False, True], ids=["plain", "drawn"])
def test_first_values_that_cost_much_end_soon_and_in_little_memory(
    handler: CallHandler,
    configurations: dict[str, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changes: dict[str, Any],
    draws: bool,
) -> None:
    monkeypatch.setattr(program, "MAX_INJECTED_BYTES", GROWTH_KB << 9)
    config, before_kb, began = configurations[kind], peak_kb(), time.monotonic()
    spec = AdapterSpec.of({**config, "fields": {**config["fields"], **changes}})
    asked = initial(handler, adapter=spec, names=((0, "nothing"),), rng=torch.get_rng_state() if draws else None)
    assert refusal(handler, asked.to_message(), caplog).code is FaultCode.BAD_REQUEST
    assert time.monotonic() - began < SECONDS
    assert peak_kb() - before_kb < GROWTH_KB


def test_an_adapter_over_its_budget_is_refused_while_it_is_made(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "MAX_INJECTED_BYTES", 1000)
    for kind in ("SHIRA", "UNILORA", "FOURIERFT", "BOFT"):
        fault = refused(handler, with_field(configurations[kind], "fan_in_fan_out", True), caplog)
        assert "more memory than a server gives" in fault.detail


def test_one_tensor_over_the_budget_is_refused_before_its_memory_is_touched() -> None:
    before_kb = peak_kb()
    makers: list[Callable[[], Tensor]] = [
        lambda: torch.randn(1 << 16, 1 << 14),
        lambda: torch.zeros(1 << 30),
        lambda: torch.full((1 << 30,), 1.0),
        lambda: torch.empty(1 << 15, 1 << 15).uniform_(),
        lambda: torch.zeros(2).new_ones(1 << 30),
        lambda: torch.ones(1 << 10).repeat(1 << 20),
    ]
    for make in makers:
        with pytest.raises(WireError, match="more memory"), program._bounded(1 << 28):
            make()
    with program._bounded(1 << 28):
        assert torch.zeros(1 << 20).view(2, -1).expand(1, 2, -1).sum() == 0
    assert peak_kb() - before_kb < GROWTH_KB


def prefix(name: str = "key", shape: tuple[int, ...] = (4, 3, 12), **changes: Any) -> CallKwarg:
    return CallKwarg(**{"name": f"prefix.{name}", "tensor": torch.full(shape, 0.1), "axes": {}, "blocks": SPAN, "requires_grad": True, **changes})


def both(shape: tuple[int, ...], **changes: Any) -> tuple[CallKwarg, ...]:
    return prefix("key", shape, **changes), prefix("value", shape, **changes)


BAD_PREFIXES: dict[str, tuple[CallKwarg, ...]] = {
    "a key without a value": (prefix(),),
    "a value of other tokens": (prefix(), prefix("value", (4, 2, 12))),
    "a prefix for one block": both((4, 3, 12), blocks=BlockSpan(0, 1)),
    "blocks of other tokens": (*both((4, 3, 12), blocks=BlockSpan(0, 1)), *both((4, 2, 12), blocks=BlockSpan(1, 2))),
    "a prefix given twice": both((4, 3, 12)) * 2,
    "an unknown part": (*both((4, 3, 12)), prefix("mask")),
    "integers": both((), tensor=torch.ones(4, 3, 12, dtype=torch.int64), requires_grad=False),
    "two dimensions": both((4, 36)),
    "a scalar": both(()),
    "no tokens": both((4, 0, 12)),
    "other heads": both((3, 3, 12)),
    "one head": both((1, 3, 12)),
    "another width": both((4, 3, 13)),
    "other rows": both((3, 4, 3, 12), axes={"batch": 0}),
    "rows that are none": both((2, 4, 3, 12)),
    "more tokens than a sequence may have": both((4, 5000, 12)),
    "a huge number of heads": both((50_000_000, 1, 1)),
    "outside of the span": both((4, 3, 12), blocks=BlockSpan(2, 3)),
}


@pytest.mark.parametrize("case", BAD_PREFIXES)
def test_a_prefix_that_does_not_fit_is_a_bad_request(handler: CallHandler, caplog: pytest.LogCaptureFixture, case: str) -> None:
    for changes in ({}, {"grad_BTH": hidden()}):
        fault = refusal(handler, call(handler, kwargs=BAD_PREFIXES[case], **changes).to_message(), caplog)
        assert fault.code is FaultCode.BAD_REQUEST, fault


def test_a_prefix_that_fits_is_computed_with_and_one_whose_cache_is_too_large_is_refused(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = call(handler, kwargs=both((4, 3, 12)), grad_BTH=hidden())
    grads = SpanResult.from_message(ask(handler, backward.to_message()), backward).kwarg_grads
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    needed = 2 * 2 * 2 * 4 * (3 + 5) * 12 * 4
    monkeypatch.setattr(span, "MAX_CACHE_BYTES", needed)
    assert ask(handler, backward.to_message()).kind == "result"
    monkeypatch.setattr(span, "MAX_CACHE_BYTES", needed - 1)
    assert "lower micro_batch_tokens" in refusal(handler, backward.to_message(), caplog).detail


@pytest.mark.parametrize("kind", ["SUPERTUNING", "PSOFT"])
def test_indices_outside_of_what_they_point_into_are_a_bad_request(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    spec = AdapterSpec.of(configurations[kind])
    kwargs = tuner_kwargs(handler, spec)
    places = [index for index, kwarg in enumerate(kwargs) if not kwarg.tensor.is_floating_point()]
    assert places
    for value in (-1, -(1 << 63), 1 << 40, (1 << 63) - 1):
        for dtype in (torch.int64, torch.int32, torch.int8):
            if value < torch.iinfo(dtype).min or value > torch.iinfo(dtype).max:
                continue
            changed = list(kwargs)
            tensor = kwargs[places[0]].tensor.to(dtype, copy=True)
            tensor.view(-1)[-1] = value
            changed[places[0]] = replace(kwargs[places[0]], tensor=tensor)
            fault = refusal(handler, call(handler, adapter=spec, kwargs=tuple(changed)).to_message(), caplog)
            assert fault.code is FaultCode.BAD_REQUEST
            assert "indices outside" in fault.detail


def test_shared_tensors_for_other_blocks_than_those_that_share_them_are_a_bad_request(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("VERA", "VBLORA", "UNILORA", "TINYLORA", "LILY"):
        config = configurations[kind]
        spec = AdapterSpec.of({**config, "modules": [name for name in config["modules"] if name[0] in "13"]} if kind not in ("LILY",) else config)
        kwargs = tuner_kwargs(handler, spec)
        shared = [kwarg for kwarg in kwargs if f"peft.{spec.digest}.shared." in kwarg.name]
        assert shared, kind
        others = [kwarg for kwarg in kwargs if kwarg not in shared]
        first = int(shared[0].name.split(".")[3])
        wrong: list[list[CallKwarg]] = [others, [*kwargs, shared[0]], [replace(item, blocks=BlockSpan(5, 6)) for item in shared] + others]
        wrong.append([replace(item, name=item.name.replace(f"shared.{first}.", f"shared.{first + 1}.")) for item in shared] + others)
        if first == 1:
            wrong.append([replace(item, blocks=BlockSpan(0, 1)) for item in shared] + others)
            wrong.append([replace(item, blocks=BlockSpan(0, 2)) for item in shared] + others)
        for given in wrong:
            fault = refusal(handler, call(handler, adapter=spec, kwargs=tuple(given)).to_message(), caplog)
            assert fault.code is FaultCode.BAD_REQUEST, (kind, fault)


@pytest.mark.parametrize("fill", [0.0, 1.0, 1e30, -1e38, float("nan"), float("inf")], ids=str)
def test_whatever_values_a_tuner_has_they_cost_no_traceback(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture, fill: float
) -> None:
    for config in configurations.values():
        spec = AdapterSpec.of(config)
        for changes in ({}, {"grad_BTH": hidden()}):
            caplog.clear()
            answer = ask(handler, call(handler, adapter=spec, kwargs=tuple(tuner_kwargs(handler, spec, fill)), **changes).to_message())
            assert answer.kind == "result" or Fault.from_message(answer).code in (FaultCode.NON_FINITE, FaultCode.BAD_REQUEST)
            assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_tensors_of_a_tuner_in_another_type_or_shape_cost_no_traceback(
    handler: CallHandler, configurations: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    for config in configurations.values():
        spec = AdapterSpec.of(config)
        kwargs = tuner_kwargs(handler, spec)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            cast = tuple(replace(kwarg, tensor=kwarg.tensor.to(dtype)) if kwarg.tensor.is_floating_point() else kwarg for kwarg in kwargs)
            for given in (cast, (cast[0], *kwargs[1:])):
                caplog.clear()
                answer = ask(handler, call(handler, adapter=spec, kwargs=given, grad_BTH=hidden()).to_message())
                assert answer.kind == "result" or Fault.from_message(answer).code is FaultCode.BAD_REQUEST
                assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        for tensor in (torch.zeros(()), torch.zeros(7, 7), kwargs[0].tensor.unsqueeze(0), torch.zeros(kwargs[0].tensor.shape, dtype=torch.bool)):
            changed = (replace(kwargs[0], tensor=tensor, requires_grad=False), *kwargs[1:])
            fault = refusal(handler, call(handler, adapter=spec, kwargs=changed).to_message(), caplog)
            assert fault.code is FaultCode.BAD_REQUEST
            assert "takes" in fault.detail


def test_a_mask_of_one_row_serves_all_rows(handler: CallHandler) -> None:
    outputs = []
    for rows in (1, 2):
        forward = call(handler, kwargs=(mask(tensor=torch.tensor([[0, 1, 1, 1, 1]]).expand(rows, -1)),))
        outputs.append(SpanResult.from_message(ask(handler, forward.to_message()), forward).hidden_BTH)
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    "value", [None, 3, [], [1], [1, 2, 3], ["1", 0], [-1, 0], [1 << 63, 0], [True, 0], [1, 1.5], [1, -1], [1, 1 << 32], [[1], 0]], ids=str
)
def test_a_dropout_seed_that_is_none_is_a_bad_request(handler: CallHandler, caplog: pytest.LogCaptureFixture, value: Any) -> None:
    message = call(handler).to_message()
    asked = Message(message.kind, {**message.fields, "dropout": value}, message.tensors)
    if value is None:
        assert ask(handler, asked).kind == "result"
    else:
        assert refusal(handler, asked, caplog).code is FaultCode.BAD_REQUEST


def test_an_older_server_refuses_what_it_does_not_know_in_one_sentence(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call kinds and fields are no features of the handshake: a server that lacks one says so, and computes nothing wrong."""
    monkeypatch.setattr(messages, "_CALL_FIELDS", messages._CALL_FIELDS - {"dropout"})
    fault = refusal(handler, call(handler, dropout=messages.DropoutSeed(1)).to_message(), caplog)
    assert (fault.code, fault.detail) == (
        FaultCode.BAD_REQUEST,
        "a call holds a field that this server does not know, update the older of the two sides: 'dropout'",
    )
    fault = refusal(handler, Message("inference", initial(handler).to_message().fields), caplog)
    assert (fault.code, fault.detail) == (
        FaultCode.UNSUPPORTED,
        "this server (swarmtune test) knows no call 'inference': update the older of the two sides",
    )
    monkeypatch.delitem(tuners.TUNERS, "PSOFT")  # type: ignore[arg-type]
    assert (
        "not supported by this server: it knows ADALORA"
        in refusal(handler, call(handler, adapter=AdapterSpec.of({**LORA, "peft_type": "PSOFT"})).to_message(), caplog).detail
    )


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
        assert ServerInfo.from_json(ask(handler, Message("info")).fields).draining
    finally:
        handler.draining = False
    assert not ServerInfo.from_json(ask(handler, Message("info")).fields).draining


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


class Full:
    """An executor without room, which notes who asks."""

    def __init__(self) -> None:
        self.clients: list[str] = []

    async def submit(self, run: Callable[[], Any], *, priority: int, timeout_s: float, client: str) -> Any:
        self.clients.append(client)
        raise Busy("no room", 1.25)


def test_a_busy_server_says_when_to_ask_again_and_knows_who_asks(
    handler: CallHandler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full()
    monkeypatch.setattr(handler, "_executor", full)
    levels: list[int] = []
    monkeypatch.setattr("servers.handler.logger.log", lambda level, *_: levels.append(level))
    fault = refusal(handler, call(handler).to_message(), caplog)
    assert levels == [logging.DEBUG], "it comes again and again"
    assert (fault.code, fault.detail, fault.retry_ms) == (FaultCode.BUSY, "no room", 1250)
    assert full.clients == ["client"]


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
