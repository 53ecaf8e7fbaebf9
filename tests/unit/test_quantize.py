"""Blocks as they are quantised: what is refused, what it costs, and what must not depend on it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from servers.memory import estimate
from servers.numeric import numeric_class, numeric_facts
from servers.quantize import check_quantisable, held_bytes, quantise_block, unpacked
from servers.weights import load_blocks
from swarmtune.errors import ModelUnsupported
from swarmtune.skeleton import build_skeleton, check_identity, load_config
from swarmtune.types import BlockSpan
from tests.harness import tiny_config

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Block(nn.Module):
    """Two linear layers and a norm; rows of 224 and 96 take groups of 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(224, 96), nn.Linear(96, 224, bias=False), nn.LayerNorm(224)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Scaled(nn.Linear):
    """More than linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Transposed(nn.Linear):
    """A linear layer, written otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=288, vocab_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "worst"), [("int8", 0.012), ("nf4", 0.11)])
def test_forward_and_gradient_of_a_quantised_block_are_those_of_its_unpacked_weights(mode: str, worst: float, dtype: torch.dtype) -> None:
    plain, packed = Block().to(dtype).requires_grad_(False), Block().to(dtype).requires_grad_(False)
    assert 0 < quantise_block(packed, mode, CPU) < worst
    for name in ("up", "down"):
        plain.get_submodule(name).weight = nn.Parameter(unpacked(packed.get_submodule(name)).to(dtype), requires_grad=False)
    x, grad = torch.randn(2, 2, 3, 224, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs, grads = [], []
    for block in (plain, packed.eval()):
        with torch.no_grad():
            quiet = block(x)
        leaf = x.clone().requires_grad_()
        output = block(leaf)
        assert torch.equal(quiet, output), "forward and the recomputation in backward are one function, in eval mode too"
        outputs.append(output.float())
        grads.append(torch.autograd.grad(output, leaf, grad)[0].float())
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2  # int8 rounds its scales to half precision before it multiplies
    assert (outputs[0] - outputs[1]).norm() <= tolerance * outputs[0].norm()
    assert (grads[0] - grads[1]).norm() <= tolerance * grads[0].norm()


@pytest.mark.parametrize(
    ("mode", "value"), [("int8", float("inf")), ("int8", float("nan")), ("int8", 1e5), ("nf4", float("inf")), ("nf4", float("nan"))]
)
def test_weights_that_do_not_come_back_are_refused(mode: str, value: float) -> None:
    block = Block().requires_grad_(False)
    block.up.weight[3, 5] = value
    with pytest.raises(ModelUnsupported, match=f"the weights of up do not survive quantize={mode} on this machine"):
        quantise_block(block, mode, CPU)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_a_subclass_of_linear_is_quantised_only_if_it_is_linear(mode: str) -> None:
    good, bad = nn.ModuleDict({"a": Transposed(64, 64)}).requires_grad_(False), nn.ModuleDict({"a": Scaled(64, 64)}).requires_grad_(False)
    quantise_block(good, mode, CPU)
    with pytest.raises(ModelUnsupported, match="a is a Scaled, which is more than a linear layer: serve this model with quantize=none"):
        quantise_block(bad, mode, CPU)


def test_blocks_with_matrices_outside_of_linear_layers_are_refused_with_their_name() -> None:
    gpt2 = build_skeleton(tiny_config("gpt2")).transformer.h[0]
    with pytest.raises(ModelUnsupported, match=r"Conv1D keeps attn\.c_attn\.weight \(48, 144\) outside of one"):
        check_quantisable(gpt2, "int8")
    experts = MixtralConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=8)
    with pytest.raises(ModelUnsupported, match=r"outside of one \(fused experts, Conv1D\): serve this model with quantize=none"):
        check_quantisable(build_skeleton(experts).model.layers[0], "nf4")
    with pytest.raises(ModelUnsupported, match=r"whose inputs are a multiple of 32, and self_attention\.query_key_value has 48"):
        check_quantisable(build_skeleton(tiny_config("bloom")).transformer.h[0], "nf4")
    check_quantisable(build_skeleton(tiny_config("bloom")).transformer.h[0], "int8")


MODES = [*((dtype, "none") for dtype in DTYPES), *((dtype, mode) for dtype in (torch.float32, torch.bfloat16) for mode in ("int8", "nf4"))]


@pytest.mark.parametrize(("dtype", "mode"), MODES)
def test_estimated_weights_are_what_loading_took_and_a_block_is_quantised_before_the_next_is_read(llama: Path, dtype: torch.dtype, mode: str) -> None:
    config, span = load_config(str(llama)), BlockSpan(1, 4)
    site = check_identity(config)
    need = estimate(config, site, span, dtype, mode, CPU, max_tokens=64, max_sequence=64)
    largest, before = [], alive_bytes()

    def watch(done: int, total: int) -> None:
        largest.append(alive_bytes() - before - done * need.weights / total)

    weights = load_blocks(str(llama), config, site, span, dtype, CPU, watch, mode)
    held = sum(held_bytes(block) for block in weights.blocks.values())
    assert abs(need.weights - held) <= 0.01 * held
    assert len(largest) == 3
    assert max(largest) <= 0.15 * need.weights / 3, "what is left of earlier blocks is their quantised form"
    assert need.loading > 0
    assert need.work > 0


def alive_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not item.is_meta]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_digests_are_those_of_the_stored_weights_and_the_class_is_another(llama: Path) -> None:
    config = load_config(str(llama))
    site, span = check_identity(config), BlockSpan(0, 1)
    digests = {load_blocks(str(llama), config, site, span, torch.float32, CPU, quantise=mode).digests for mode in ("none", "int8", "nf4")}
    assert len(digests) == 1
    facts = [numeric_facts(config, "m", torch.float32, CPU, mode) for mode in ("none", "int8", "nf4")]
    assert [fact["quantisation"] for fact in facts] == ["none", "int8", "nf4"]
    assert "bitsandbytes" not in facts[0]
    assert len({numeric_class(fact) for fact in facts}) == 3
