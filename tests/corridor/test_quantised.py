"""Quantised bodies against local PEFT models whose blocks hold the same bitsandbytes layers."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import IA3Config, PeftConfig, PeftType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from servers.program import MAX_PROGRAMS
from servers.quantize import held_bytes
from swarmtune import Kwarg
from swarmtune.adapters.tuners import OVER_QUANTISED, check_over_quantised
from swarmtune.errors import AdapterUnsupported, KwargError, SwarmMismatch
from tests.harness import VOCABULARY, batch, loopback, lora, make_handler, remote, same_bits, set_values, step, trainable

MODES = ("int8", "nf4")
FLAGS = {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}
HIDDEN, BLOCKS = 64, 4
ADAPTERS: dict[str, dict[str, PeftConfig]] = {
    family: {
        "lora": lora(family),
        "ia3": IA3Config(target_modules=targets, feedforward_modules=targets[-1:], task_type="CAUSAL_LM"),
    }
    for family, targets in {"bloom": ["query_key_value", "dense_4h_to_h"], "llama": ["k_proj", "v_proj", "down_proj"]}.items()
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose rows hold whole groups of nf4: 64 weights, and 32 in LLaMA's down projection."""
    common: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    configs = {"bloom": BloomConfig(n_layer=BLOCKS, n_head=4, **common), "llama": LlamaConfig(num_hidden_layers=BLOCKS, **heads, **common)}
    found = {}
    for family, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        found[family] = tmp_path_factory.mktemp("wide") / family
        model.save_pretrained(found[family])
    return found


def local_quantised(path: Path, mode: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The library's model with bitsandbytes' own layers in its blocks, as a person would train it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for name in [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]:
        plain = layers.get_submodule(name)
        shape = (plain.in_features, plain.out_features, plain.bias is not None)
        packed: Any
        if mode == "int8":
            packed = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            packed.weight = bnb.nn.Int8Params(plain.weight.detach(), requires_grad=False, has_fp16_weights=False)
        else:
            group = 64 if plain.in_features % 64 == 0 else 32
            packed = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(
                plain.weight.detach(), requires_grad=False, blocksize=group, compress_statistics=False, quant_type="nf4", module=packed
            )
        packed.bias = plain.bias
        layers.set_submodule(name, packed.to("cpu"))
    setattr(model, FLAGS[mode], True)
    return model.requires_grad_(False).train()


def frozen_state(handler: Any) -> dict[str, Tensor]:
    """Copies of everything that must never change."""
    found = {}
    for number, block in handler._span.weights.blocks.items():
        for name, module in block.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                found[f"{number}.{name}.{leaf}"] = parameter.detach().clone()
            if isinstance(module, bnb.nn.Linear8bitLt):
                found[f"{number}.{name}.scales"] = module.state.SCB.clone()
            elif isinstance(module, bnb.nn.Linear4bit):
                found[f"{number}.{name}.scales"] = module.weight.quant_state.absmax.clone()
    return found


CASES = [(family, mode, torch.float32, kind) for family in ADAPTERS for mode in MODES for kind in ("lora", "ia3")]
CASES += [(family, mode, dtype, "lora") for family in ADAPTERS for mode in MODES for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("family", "mode", "dtype", "kind"), CASES)
def test_logits_loss_and_every_gradient_equal_local_peft_over_the_same_quantised_layers_to_the_bit(
    wide: dict[str, Path], family: str, mode: str, dtype: torch.dtype, kind: str
) -> None:
    config = ADAPTERS[family][kind]
    local = get_peft_model(local_quantised(wide[family], mode, dtype), copy.deepcopy(config)).train()
    with loopback(wide[family], dtype=dtype, quantise=mode) as swarm:
        model = remote(wide[family], swarm, config)
        assert list(trainable(local)) == list(dict(model.adapter.named_parameters()))
        set_values([trainable(local), dict(model.adapter.named_parameters())])
        expected, found = step(local, batch(padding="left")), step(model, batch(padding="left"))
        again = step(model, batch(padding="left"))
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert same_bits(expected[2], found[2])
    assert same_bits(found[2], again[2])
    assert all(grad.norm() > 0 for grad in found[2].values())


@pytest.mark.parametrize("mode", MODES)
def test_the_table_of_allowed_adapters_lists_what_is_tested_here_and_nothing_else(mode: str) -> None:
    tested = {(kind.upper(), dtype) for _, other, dtype, kind in CASES if other == mode}
    listed = {(kind, getattr(torch, name)) for kind, modes in OVER_QUANTISED.items() for name in modes.get(mode, ())}
    assert listed == tested
    for kind in PeftType:
        if kind.value not in OVER_QUANTISED:
            check_over_quantised(kind.value, "none", "float32")
            with pytest.raises(AdapterUnsupported, match=f"type {kind.value} are not known to be right over blocks held in {mode}"):
                check_over_quantised(kind.value, mode, "float32")


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_that_is_wrong_over_this_base_is_refused_by_the_client_and_by_the_server(wide: dict[str, Path], mode: str) -> None:
    sentence = f"type IA3 are not known to be right over blocks held in {mode} and computed in bfloat16: use LORA, or servers with quantize=none"
    with loopback(wide["bloom"], dtype=torch.bfloat16, quantise=mode) as swarm:
        with pytest.raises(AdapterUnsupported, match=sentence):
            remote(wide["bloom"], swarm, ADAPTERS["bloom"]["ia3"])
    handler = make_handler(wide["bloom"], "0:4", torch.bfloat16, quantise=mode)
    handler._info = replace(handler._info, numeric={})  # a server that does not say that it is quantised
    with loopback(wide["bloom"], handlers={"peer": handler}) as swarm:
        model = remote(wide["bloom"], swarm, ADAPTERS["bloom"]["ia3"])
        with pytest.raises(KwargError, match=sentence):
            model(**batch())


@pytest.mark.parametrize("mode", MODES)
def test_many_programs_share_one_copy_of_the_quantised_weights_and_none_changes_them(wide: dict[str, Path], mode: str) -> None:
    handler = make_handler(wide["bloom"], "0:4", quantise=mode)
    before = frozen_state(handler)
    with loopback(wide["bloom"], handlers={"peer": handler}) as swarm:
        for rank in range(1, MAX_PROGRAMS):
            model = remote(wide["bloom"], swarm, lora("bloom", r=rank))
            set_values([dict(model.adapter.named_parameters())])
            step(model, batch(rows=1, tokens=4))
        remote(wide["bloom"], swarm)(**batch())
        programs = list(handler._span.programs._kept.values())
    assert len(programs) == MAX_PROGRAMS
    held = sum(held_bytes(block) for block in handler._span.weights.blocks.values())
    everything = nn.ModuleList([layer for program in programs for layer in program.layers])
    assert held_bytes(everything) == held
    assert same_bits(before, frozen_state(handler))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in everything.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_norms_and_biases_can_be_stood_in_for_and_quantised_weights_cannot(wide: dict[str, Path], mode: str) -> None:
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    values = {"input_layernorm.weight": torch.rand(HIDDEN) + 0.5, "mlp.dense_h_to_4h.bias": torch.randn(4 * HIDDEN)}
    local = local_quantised(wide["bloom"], mode)
    local.transformer.word_embeddings_layernorm = local.transformer.ln_f = nn.Identity()
    theirs = [local.transformer.h[1].get_parameter(name) for name in values]
    for parameter, value in zip(theirs, values.values(), strict=True):
        parameter.data = value.clone()
        parameter.requires_grad_()
    mine = [value.clone().requires_grad_() for value in values.values()]
    with loopback(wide["bloom"], quantise=mode) as swarm:
        model = remote(wide["bloom"], swarm)
        kwargs = [Kwarg(f"param.{name}", tensor, blocks=1) for name, tensor in zip(values, mine, strict=True)]
        found, expected = model.body(hidden, kwargs=kwargs), local.transformer(inputs_embeds=hidden).last_hidden_state
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) and a.grad.norm() > 0 for a, b in zip(mine, theirs, strict=True))
        weight = Kwarg("param.mlp.dense_h_to_4h.weight", torch.zeros(4 * HIDDEN, HIDDEN), blocks=1)
        with pytest.raises(KwargError, match=rf"block 1 holds mlp.dense_h_to_4h.weight in {mode}, and nothing can stand in for it"):
            model.body(hidden, kwargs=[weight])


def test_servers_of_another_mode_are_another_class_and_are_never_mixed(wide: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    plain, packed = make_handler(wide["bloom"], "0:4"), make_handler(wide["bloom"], "0:4", quantise="int8")
    assert plain.info.block_digests == packed.info.block_digests
    with loopback(
        wide["bloom"], handlers={"a": make_handler(wide["bloom"], "0:2"), "b": make_handler(wide["bloom"], "2:4", quantise="nf4")}
    ) as swarm:
        with pytest.raises(SwarmMismatch, match=r"compute in float32 and float32 over nf4 weights .*: start them with one dtype and one quantize"):
            remote(wide["bloom"], swarm)
    with loopback(wide["bloom"], handlers={"a": packed, "b": plain}, patience_s=1.0) as swarm:
        with caplog.at_level(logging.WARNING):
            model = remote(wide["bloom"], swarm)
        assert "computes in float32 over int8 weights, this run in float32: leaving it out" in caplog.text
        (opened,) = swarm._models.values()
        swarm.loop.run(opened.directory.refresh())
        assert list(opened.directory.known) == ["b"]
        assert torch.equal(model(**batch()).logits, AutoModelForCausalLM.from_pretrained(wide["bloom"])(**batch()).logits)
