"""The traps of remote fine-tuning, by name: what shapes, routes, types, ties, faults and threads can get silently wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, VBLoRAConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, MixtralConfig, Qwen2MoeConfig

from swarmtune import DeepPromptConfig, Kwarg, StandInConfig
from swarmtune.errors import KwargError, NonFinite
from swarmtune.wire.frames import CHUNK_BYTES, MAX_PAYLOAD
from tests.harness import (
    Faults,
    batch,
    local_peft,
    loopback,
    lora,
    make_handler,
    remote,
    same_bits,
    set_values,
    step,
    trainable,
    worst_difference,
)

ROWS, TOKENS, HIDDEN, BLOCKS = 4, 6, 48, 4
SPANS = ["0:2", "2:4", "0:2", "2:4"]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.3


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return values(*shape, seed=seed, dtype=dtype).requires_grad_()


def own(model: Any) -> dict[str, Tensor]:
    return dict(model.adapter.named_parameters())


def aligned(model: Any) -> Any:
    """A checkpoint's own memory is not aligned, and some kernels give other last bits then."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def local_body(
    path: Path, hidden: Tensor, prompts: Mapping[int, Tensor] | None = None, params: Mapping[tuple[int, str], Tensor] | None = None
) -> Tensor:
    """The blocks of a BLOOM between neutral ends, with prompts before some and tensors in the place of some parameters."""
    model = aligned(AutoModelForCausalLM.from_pretrained(path, dtype=hidden.dtype).eval().requires_grad_(False))
    body = model.transformer
    body.word_embeddings_layernorm = body.ln_f = torch.nn.Identity()
    for block, prompt in (prompts or {}).items():

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], prompt: Tensor = prompt) -> tuple[Tensor, ...]:
            tokens = prompt.shape[-2]
            return (torch.cat([args[0][:, :tokens] + prompt.to(args[0].dtype), args[0][:, tokens:]], dim=1), *args[1:])

        body.h[block].register_forward_pre_hook(hook)
    replaced = {f"h.{block}.{name}": tensor.to(hidden.dtype) for (block, name), tensor in (params or {}).items()}
    output: Tensor = torch.func.functional_call(body, replaced, (), {"inputs_embeds": hidden}, tie_weights=False).last_hidden_state
    return output


def close(expected: Tensor, found: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((expected - found).norm() <= tolerance * expected.norm())


SHAPES = {  # rows, tokens, rank, layers
    "the rank is the sequence length": (3, 8, 8, None),
    "the rank is the batch size": (4, 7, 4, None),
    "rank, batch and sequence are one number": (6, 6, 6, None),
    "and the rank is the width": (2, 5, HIDDEN, None),
    "one block only": (4, 4, 4, [2]),
}


@pytest.mark.parametrize("micro_batches", [1, "all"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_guessed_from_shapes_when(models: dict[str, Path], name: str, family: str, micro_batches: int | str) -> None:
    rows, tokens, rank, layers = SHAPES[name]
    inputs = batch(rows=rows, tokens=tokens, padding="left")
    config = lora(family, r=rank, layers_to_transform=layers)
    local = local_peft(models[family], config)
    aligned(local)
    with loopback(models[family], ["0:1", "1:4"], micro_batch_tokens=4096 if micro_batches == 1 else tokens) as swarm:
        model = remote(models[family], swarm, config)
        set_values([trainable(local), own(model)])
        expected, found = step(local, inputs), step(model, inputs)
    if micro_batches == 1:
        assert torch.equal(expected[0], found[0])
        assert same_bits(expected[2], found[2])
    assert worst_difference(expected[2], found[2]) <= 1e-6
    assert all(grad.norm() > 0 for grad in found[2].values())


@pytest.mark.parametrize("spans", [["0:2", "1:4"], ["0:3", "1:4"], ["0:1", "0:3", "2:4"], ["0:4", "1:3"]], ids=" ".join)
def test_kwargs_reach_their_blocks_on_routes_that_enter_a_server_above_its_first_block(bloom: Path, spans: list[str]) -> None:
    prompt, weight, bias, x = leaf(2, HIDDEN, seed=1), leaf(HIDDEN, seed=2), leaf(4 * HIDDEN, seed=3), leaf(ROWS, TOKENS, HIDDEN, seed=4)
    theirs = [tensor.detach().clone().requires_grad_() for tensor in (prompt, weight, bias, x)]
    norm, inner = "input_layernorm.weight", "mlp.dense_h_to_4h.bias"
    with loopback(bloom, spans) as swarm:
        kwargs = [Kwarg("prompt", prompt, blocks="1:4"), Kwarg(f"param.{norm}", weight, blocks="0:3"), Kwarg(f"param.{inner}", bias, blocks=3)]
        found = remote(bloom, swarm).body(x, kwargs=kwargs)
        found.square().sum().backward()
    places = {**{(block, norm): theirs[1] for block in range(3)}, (3, inner): theirs[2]}
    expected = local_body(bloom, theirs[3], dict.fromkeys(range(1, 4), theirs[0]), places)
    expected.square().sum().backward()
    assert torch.equal(expected, found)
    assert torch.equal(theirs[3].grad, x.grad)
    assert torch.equal(theirs[2].grad, bias.grad)
    assert all(close(a.grad, b.grad) for a, b in zip(theirs, (prompt, weight, bias, x), strict=True))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of whose projections fills a frame."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wide")
    config = BloomConfig(n_layer=2, n_head=4, hidden_size=320, vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_a_gradient_that_is_larger_than_any_frame_arrives_whole(wide: Path) -> None:
    name = "mlp.dense_h_to_4h.weight"
    mine, x = values(1280, 320, seed=1).mul_(0.1).requires_grad_(), values(2, 3, 320, seed=2)
    assert mine.nbytes > MAX_PAYLOAD > CHUNK_BYTES
    theirs = mine.detach().clone().requires_grad_()
    with loopback(wide, ["0:2"]) as swarm:
        body = remote(wide, swarm).body
        found = body(x, kwargs=[Kwarg(f"param.{name}", mine)])
        before = swarm.traffic().bytes_down
        found.square().sum().backward()
        assert swarm.traffic().bytes_down - before >= 2 * mine.nbytes, "one gradient per block"
    expected = local_body(wide, x, params={(block, name): theirs for block in range(2)})
    expected.square().sum().backward()
    assert torch.equal(expected, found)
    assert close(theirs.grad, mine.grad)


ADAPTERS: Mapping[str, Callable[[], Any]] = {
    "lora and deep prompts": lambda: [lora("bloom"), DeepPromptConfig(3)],
    "vblora": lambda: VBLoRAConfig(r=4, num_vectors=8, vector_length=16, target_modules=["query_key_value", "dense_4h_to_h"], task_type="CAUSAL_LM"),
    "stand-ins": lambda: StandInConfig(["*bias"]),
    "prefixes": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def run_step(path: Path, name: str, spans: list[str], faults: Faults, **settings: Any) -> tuple[dict[str, Tensor], int]:
    trouble = Faults()
    with loopback(path, spans, faults=trouble, **settings) as swarm:
        torch.manual_seed(3)
        model = remote(path, swarm, ADAPTERS[name]())
        set_values([own(model)])
        trouble.before, trouble.after, trouble.log = faults.before, faults.after, []  # calls are counted from here
        return step(model, batch(padding="left"))[2], swarm.traffic().retries


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_kwargs_are_bitwise_quiet_after_servers_die_in_backward(bloom: Path, name: str) -> None:
    quiet, _ = run_step(bloom, name, SPANS, Faults())
    assert all(grad.norm() > 0 for grad in quiet.values())
    for phase in ("before", "after"):
        for call in (2, 3):
            grads, retries = run_step(bloom, name, SPANS, Faults(**{phase: {call}}))
            assert retries == 1, (phase, call)
            assert same_bits(quiet, grads), (phase, call)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("spans", "call"), [(["0:4", "0:1", "1:3", "3:4"], 1), (["0:2", "2:4", "0:3", "1:4"], 2)], ids=["pieces", "overlaps"])
def test_gradients_of_kwargs_are_bitwise_quiet_when_backward_moves_to_other_cuts(bloom: Path, name: str, spans: list[str], call: int) -> None:
    quiet, _ = run_step(bloom, name, SPANS, Faults())
    grads, retries = run_step(bloom, name, spans, Faults(before={call}))
    assert retries >= 1
    assert same_bits(quiet, grads)


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_of_kwargs_are_bitwise_quiet_after_a_death_among_micro_batches(bloom: Path, name: str) -> None:
    settings = {"micro_batch_tokens": 13}
    quiet, _ = run_step(bloom, name, SPANS, Faults(), **settings)
    for call in (9, 14):
        grads, retries = run_step(bloom, name, SPANS, Faults(after={call}), **settings)
        assert retries >= 1
        assert same_bits(quiet, grads), call


def test_frozen_prompts_under_a_trained_lora_act_and_get_no_gradient(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        trained = remote(bloom, swarm, [lora("bloom"), DeepPromptConfig(3)])
        frozen = remote(bloom, swarm, [lora("bloom"), DeepPromptConfig(3, trainable=False)])
        set_values([own(trained), own(frozen)])
        expected, found = step(trained, batch()), step(frozen, batch())
    assert torch.equal(expected[0], found[0])
    assert own(frozen)["deep_prompts"].grad is None
    assert set(expected[2]) - set(found[2]) == {"deep_prompts"}
    assert all(torch.equal(expected[2][name], grad) for name, grad in found[2].items())


@pytest.mark.parametrize("frozen", ["deep_prompts", "lora_A", "query_key_value"])
def test_parameters_that_the_user_freezes_later_get_none_and_the_others_get_the_same_bits(bloom: Path, frozen: str) -> None:
    with loopback(bloom, ["0:1", "1:4"]) as swarm:
        model = remote(bloom, swarm, [lora("bloom"), DeepPromptConfig(3)])
        set_values([own(model)])
        expected = step(model, batch())
        model.zero_grad(set_to_none=True)
        for name, parameter in own(model).items():
            parameter.requires_grad_(frozen not in name)
        found = step(model, batch())
        assert torch.equal(expected[0], found[0])
        assert all(parameter.grad is None for name, parameter in own(model).items() if frozen in name)
        assert {name for name in expected[2] if frozen not in name} == set(found[2])
        assert all(torch.equal(expected[2][name], grad) for name, grad in found[2].items())
        for parameter in own(model).values():
            parameter.requires_grad_()
        assert same_bits(expected[2], step(model, batch())[2])


def test_a_backward_ends_at_the_lowest_block_that_learns(bloom: Path) -> None:
    faults = Faults()
    with loopback(bloom, ["0:1", "1:2", "2:4"], faults=faults) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([own(model)])
        expected = step(model, batch())[2]
        for name, parameter in own(model).items():
            parameter.requires_grad_(".h.1." in name or ".h.3." in name)
        model.zero_grad(set_to_none=True)
        faults.log.clear()
        found = step(model, batch())[2]
        assert faults.log[3:] == [("kept_backward", "peer2"), ("kept_backward", "peer1")]
        assert all(torch.equal(expected[name], grad) for name, grad in found.items())


def hidden() -> Tensor:
    return leaf(ROWS, TOKENS, HIDDEN)


def nan(*shape: int, place: int = 0, value: float = float("nan")) -> Tensor:
    tensor = values(*shape)
    tensor.view(-1)[place] = value
    return tensor


@pytest.mark.parametrize(
    ("kwargs", "error", "sentence"),
    [
        ([Kwarg("param.mlp.gizmo.weight", values(3), blocks=2)], KwargError, r"block 2 has no parameter 'mlp\.gizmo\.weight' \(kwarg param\.mlp"),
        ([Kwarg("gizmo", values(3))], KwargError, "kwarg 'gizmo' is no argument of BloomModel, and no parameter, adapter tensor or prompt"),
        ([Kwarg("gizmo.x", values(3), blocks=1)], KwargError, r"kwarg 'gizmo\.x' is no argument, .* of block 1"),
        ([Kwarg("peft.0123456789abcdef.x", values(3), blocks=3)], KwargError, "belongs to an adapter configuration that the call does not bring"),
        ([Kwarg("prompt", values(3, 2, HIDDEN), {"batch": 0}, 1)], KwargError, "kwarg prompt: its batch axis has length 3, the hidden states have 4"),
        ([Kwarg("prompt", values(5, HIDDEN), {"sequence": 0})], KwargError, "kwarg prompt: its sequence axis has length 5, the hidden states have 6"),
        ([Kwarg("prompt", values(2, ROWS, HIDDEN), {"batch": 1})], KwargError, "a prompt must have shape"),
        ([Kwarg("prompt", values(2, HIDDEN), blocks=4)], KwargError, "kwarg prompt: blocks 4:5 reach outside the model, which has blocks 0:4"),
        ([Kwarg("prompt", values(2, HIDDEN), blocks="3:5")], KwargError, "kwarg prompt: blocks 3:5 reach outside the model"),
        ([Kwarg("prompt", values(2, HIDDEN), blocks=-1)], KwargError, "kwarg prompt: a block span must satisfy 0 <= start < stop"),
        ([Kwarg("prompt", nan(2, HIDDEN, place=-1), blocks=2)], NonFinite, "kwarg prompt for blocks 2 holds NaN or infinity"),
        ([Kwarg("prompt", nan(2, HIDDEN, value=float("inf")))], NonFinite, "kwarg prompt for all blocks holds NaN or infinity"),
        ([Kwarg("prompt", nan(2, HIDDEN, value=-float("inf")), blocks="1:3")], NonFinite, "kwarg prompt for blocks 1:3 holds NaN or infinity"),
        ([Kwarg("prompt", values(2, HIDDEN)), Kwarg("prompt", values(2, HIDDEN), blocks=2)], KwargError, "prompt is given twice for block 2"),
        (
            [Kwarg("param.input_layernorm.bias", values(HIDDEN), blocks="0:2"), Kwarg("param.input_layernorm.bias", values(HIDDEN), blocks="1:3")],
            KwargError,
            r"param\.input_layernorm\.bias is given twice for block 1",
        ),
        ([Kwarg("attention_mask", torch.ones(ROWS, TOKENS)), Kwarg("attention_mask", torch.ones(ROWS, TOKENS))], KwargError, "is given twice"),
        ([Kwarg("attention_mask", torch.ones(ROWS, TOKENS), blocks="0:2")], KwargError, "attention_mask is .* for all blocks, got 0:2"),
        ([Kwarg("prefix.key", values(4, 2, 12), blocks=1)], KwargError, "block .* needs prefix.key and prefix.value of one shape"),
        ([Kwarg("param.input_layernorm.bias", torch.ones(HIDDEN, dtype=torch.long), blocks=1)], KwargError, r"type torch\.int64, block 1 takes"),
    ],
)
def test_a_wrong_kwarg_is_one_error_that_names_it_and_its_block(bloom: Path, kwargs: list[Kwarg], error: type[Exception], sentence: str) -> None:
    with loopback(bloom, ["0:2", "1:4"], patience_s=1.0) as swarm:
        model = remote(bloom, swarm)
        with pytest.raises(error, match=sentence) as caught:
            model.body(hidden(), kwargs=kwargs)
        assert "\n" not in str(caught.value)
        assert torch.isfinite(model(**batch()).loss), "and nothing is broken by it"
        assert swarm.traffic().retries == 0, "what no server would do is not asked of another one"


def test_a_nan_in_an_adapter_is_named_before_anything_travels(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        with torch.no_grad():
            own(model)["base_model.model.transformer.h.2.mlp.dense_h_to_4h.lora_A.default.weight"][1, 2] = float("nan")
        with pytest.raises(NonFinite, match=r"kwarg peft\.\w+\.mlp\.dense_h_to_4h\.lora_A\.weight for blocks 2:3 holds NaN or infinity"):
            model(**batch())
        assert swarm.traffic().calls == 0


MIXTURES = {
    "mixtral": lambda common: MixtralConfig(num_local_experts=8, num_experts_per_tok=1, intermediate_size=40, **common),
    "qwen2_moe": lambda common: Qwen2MoeConfig(
        num_experts=8, num_experts_per_tok=1, moe_intermediate_size=40, shared_expert_intermediate_size=40, decoder_sparse_step=1, **common
    ),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_no_token_reached_get_zeros_and_the_others_the_local_gradient(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    common = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    AutoModelForCausalLM.from_config(MIXTURES[family](common)).save_pretrained(tmp_path, save_original_format=False)
    local: Any = aligned(AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False))
    inputs = batch(rows=1, tokens=3)
    with loopback(tmp_path, ["0:1", "1:2"]) as swarm:
        model = remote(tmp_path, swarm, [StandInConfig(["mlp.experts.*"]), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")])
        names = [name.removeprefix("param.") for name in own(model) if name.startswith("param.")]
        assert names
        for name in names:
            local.get_parameter(name).requires_grad_()
        expected, found = step(local, inputs), step(model, inputs)
    assert torch.equal(expected[0], found[0])
    for name in names:
        mine, theirs = found[2][f"param.{name}"], expected[2][name]
        assert torch.equal(mine, theirs)
        reached = [bool(expert.norm() > 0) for expert in mine]
        assert 1 <= sum(reached) <= 3, "eight experts, three tokens, one expert each"


def test_blocks_that_a_shared_tensor_passes_without_using_it_add_zeros(bloom: Path) -> None:
    config = VBLoRAConfig(r=4, num_vectors=8, vector_length=16, target_modules=["query_key_value"], layers_to_transform=[0, 3], task_type="CAUSAL_LM")
    local = aligned(local_peft(bloom, config))
    with loopback(bloom, ["0:1", "1:3", "3:4"]) as swarm:
        model = remote(bloom, swarm, config)
        set_values([trainable(local), own(model)])
        expected, found = step(local, batch()), step(model, batch())
    assert torch.equal(expected[0], found[0])
    assert worst_difference(expected[2], found[2]) <= 1e-6


def test_fp64_kwargs_over_a_bf16_body_get_fp64_gradients_equal_to_local(bloom: Path) -> None:
    x = values(ROWS, TOKENS, HIDDEN, seed=1)
    prompt, bias = leaf(2, HIDDEN, seed=2, dtype=torch.float64), leaf(HIDDEN, seed=3, dtype=torch.float64)
    theirs = [tensor.detach().clone().requires_grad_() for tensor in (prompt, bias)]
    with loopback(bloom, dtype=torch.bfloat16) as swarm:
        kwargs = [Kwarg("prompt", prompt, blocks=1), Kwarg("param.input_layernorm.bias", bias, blocks=3)]
        found = remote(bloom, swarm).body(x, kwargs=kwargs)
        assert found.dtype is torch.float32
        found.square().sum().backward()
    expected = local_body(bloom, x.bfloat16(), {1: theirs[0]}, {(3, "input_layernorm.bias"): theirs[1]}).float()
    expected.square().sum().backward()
    assert torch.equal(expected, found)
    for mine, other in zip((prompt, bias), theirs, strict=True):
        assert mine.grad.dtype is torch.float64
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bodies_under_fp32_adapters_equal_local(models: dict[str, Path], family: str, dtype: torch.dtype) -> None:
    """To the bit, but for gradients through float16, which servers scale so that they do not vanish."""
    local = local_peft(models[family], lora(family), dtype)
    aligned(local)
    with loopback(models[family], dtype=dtype) as swarm:
        model = remote(models[family], swarm, lora(family))
        set_values([trainable(local), own(model)])
        expected, found = step(local, batch(padding="left")), step(model, batch(padding="left"))
    assert all(grad.dtype is torch.float32 for grad in found[2].values())
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2]) or (dtype is torch.float16 and worst_difference(expected[2], found[2]) <= 1e-2)


def test_lora_on_tied_embeddings_and_head_equals_local_to_the_bit(bloom: Path) -> None:
    config = lora("bloom", target_modules=["query_key_value", "word_embeddings", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises on ties
        local = local_peft(bloom, config)
    with loopback(bloom) as swarm:
        model = remote(bloom, swarm, config)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        set_values([trainable(local), own(model)])
        expected, found = step(local, batch()), step(model, batch())
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])
    assert all(grad.norm() > 0 for grad in found[2].values())


def test_the_gradients_of_one_tensor_given_as_two_kwargs_add_up(bloom: Path) -> None:
    mine, x = leaf(HIDDEN, seed=1), values(ROWS, TOKENS, HIDDEN)
    theirs = mine.detach().clone().requires_grad_()
    with loopback(bloom) as swarm:
        kwargs = [
            Kwarg("param.input_layernorm.bias", mine, blocks=0),
            Kwarg("param.post_attention_layernorm.bias", mine, blocks=3),
            Kwarg("prompt", mine.view(1, HIDDEN), blocks=2),
        ]
        remote(bloom, swarm).body(x, kwargs=kwargs).square().sum().backward()
    places = {(0, "input_layernorm.bias"): theirs, (3, "post_attention_layernorm.bias"): theirs}
    local_body(bloom, x, {2: theirs.view(1, HIDDEN)}, places).square().sum().backward()
    assert close(theirs.grad, mine.grad)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Start all at one moment, each in a thread of its own."""
    gate = Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        gate.wait(timeout=60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, job) for job in jobs]]


def of(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Logits and gradients, without touching ``.grad``, which threads would share."""
    output = model(**inputs)
    return [output.logits.detach(), *torch.autograd.grad(output.loss, list(own(model).values()))]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["lora and deep prompts", "prefixes"])
def test_two_threads_that_use_one_model_at_once_get_what_each_gets_alone(models: dict[str, Path], name: str) -> None:
    path = models["bloom"]
    inputs = [batch(rows=2, tokens=7, padding="left", seed=1), batch(rows=3, tokens=5, seed=2)]
    with loopback(path) as swarm:
        model = remote(path, swarm, ADAPTERS[name]())
        set_values([own(model)])
        alone = [of(model, each) for each in inputs]
        for _ in range(20):
            both = together([lambda each=each: of(model, each) for each in inputs])  # type: ignore[misc]
            assert all(equal(expected, found) for expected, found in zip(alone, both, strict=True))


def test_two_clients_with_different_ranks_at_once_get_from_one_server_what_each_gets_alone(bloom: Path) -> None:
    handlers = {"peer": make_handler(bloom, "0:4")}
    with loopback(bloom, handlers=handlers) as one, loopback(bloom, handlers=handlers) as other:
        clients = [remote(bloom, one, lora("bloom", r=2)), remote(bloom, other, lora("bloom", r=7))]
        for model in clients:
            set_values([own(model)])
        alone = [of(model, batch()) for model in clients]
        for _ in range(10):
            both = together([lambda model=model: of(model, batch()) for model in clients])  # type: ignore[misc]
            assert all(equal(expected, found) for expected, found in zip(alone, both, strict=True))


AXES: Mapping[str, tuple[Any, tuple[int, ...]]] = {
    "no axis": ({}, (2, HIDDEN)),
    "batch": ({"batch": 0}, (ROWS, 2, HIDDEN)),
    "sequence": ({"sequence": 0}, (TOKENS, HIDDEN)),
    "batch and sequence": ({"batch": 0, "sequence": 1}, (ROWS, TOKENS, HIDDEN)),
}


@pytest.mark.parametrize(("axes", "shape"), AXES.values(), ids=AXES.keys())
def test_over_four_micro_batches_a_kwarg_is_cut_along_its_batch_axis_and_else_summed(bloom: Path, axes: Any, shape: tuple[int, ...]) -> None:
    mine, x = leaf(*shape, seed=1), values(ROWS, TOKENS, HIDDEN)
    theirs = mine.detach().clone().requires_grad_()
    with loopback(bloom, micro_batch_tokens=TOKENS) as swarm:
        found = remote(bloom, swarm).body(x, kwargs=[Kwarg("prompt", mine, axes, "1:3")])
        found.square().sum().backward()
        assert swarm.traffic().calls >= 4 * 3
    expected = local_body(bloom, x, dict.fromkeys((1, 2), theirs))
    expected.square().sum().backward()
    assert torch.allclose(expected, found, rtol=1e-5, atol=1e-5)
    assert close(theirs.grad, mine.grad)


def test_prefixes_with_a_batch_axis_are_cut_with_the_rows(bloom: Path) -> None:
    shared = [leaf(4, 3, HIDDEN // 4, seed=seed) for seed in (1, 2)]
    batched = [tensor.detach().expand(ROWS, -1, -1, -1).clone().requires_grad_() for tensor in shared]
    x = values(ROWS, TOKENS, HIDDEN)
    with loopback(bloom, micro_batch_tokens=TOKENS) as swarm:
        body = remote(bloom, swarm).body
        outputs = []
        for pair, axes in ((shared, {}), (batched, {"batch": 0})):
            outputs.append(body(x, kwargs=[Kwarg(name, each, axes) for name, each in zip(("prefix.key", "prefix.value"), pair, strict=True)]))
            outputs[-1].square().sum().backward()
        assert not torch.equal(outputs[0], body(x))
    assert torch.equal(outputs[0], outputs[1])
    assert all(close(one.grad, each.grad.sum(0)) for one, each in zip(shared, batched, strict=True))
