"""Frozen blocks whose linear layers hold int8 or nf4 weights, by bitsandbytes.

Only linear layers are quantised; norms, biases and everything computed stay in the served dtype. Three habits of bitsandbytes 0.50 are answered here:

- A layer in eval mode on a CPU computes otherwise than one that trains: int8 also rounds what it multiplies, nf4 re-packs its weights for a bfloat16
  kernel that has no gradient. So a layer never leaves training mode, and forward and backward are of one function.
- The CPU kernel that unpacks nf4 is wrong, silently, where a group of weights with one scale reaches from one row into the next. So groups are
  chosen to divide the rows, and what was packed is unpacked once and compared with what was stored.
- State lies beside the parameters (``state.SCB``, ``quant_state``), so a tensor alone means nothing. Programs borrow whole layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarmtune.errors import ModelUnsupported
from swarmtune.skeleton import LayerSite

NONE, INT8, NF4 = "none", "int8", "nf4"
NF4_GROUPS = (64, 32)
"""Weights that share one scale: the first of these that divides a row. 64 is what the paper uses (arXiv:2305.14314)."""
INT8_OUTLIER = 6.0
"""On a GPU, inputs above this are multiplied in the served dtype (arXiv:2208.07339); CPUs do not round inputs at all."""
PEFT_FLAGS = {INT8: "is_loaded_in_8bit", NF4: "is_loaded_in_4bit"}
"""What PEFT looks for on a model before it uses its own layers for quantised bases."""
_WORST_ERROR = {INT8: 0.5 / 127 + 2**-10, NF4: 0.152 + 2**-8}
"""Half of the widest step between two codes in units of the scale, plus the rounding of half precision."""


class Int8Linear(Linear8bitLt):
    """A frozen int8 layer that never leaves training mode."""

    def train(self, mode: bool = True) -> Int8Linear:
        """Stay in training mode, whatever is asked."""
        return super().train(True)


class Nf4Linear(Linear4bit):
    """A frozen nf4 layer that never leaves training mode."""

    def train(self, mode: bool = True) -> Nf4Linear:
        """Stay in training mode, whatever is asked."""
        return super().train(True)


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of this file."""
    return isinstance(module, Int8Linear | Nf4Linear)


def check_quantisable(block: nn.Module, mode: str) -> None:
    """Refuse a block (on the meta device is enough) of which a part could not be held in ``mode``.

    Raises:
        ModelUnsupported: it keeps matrices outside of linear layers, or rows do not fit.
    """
    linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in block.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if parameter.dim() >= 2 and not (owner in linear and leaf == "weight"):
            raise ModelUnsupported(
                f"quantize={mode} holds linear layers, and {type(block.get_submodule(owner)).__name__} keeps {name} {tuple(parameter.shape)} "
                "outside of one (fused experts, Conv1D): serve this model with quantize=none"
            )
    if not linear:
        raise ModelUnsupported(f"quantize={mode} holds linear layers, and {type(block).__name__} has none: serve this model with quantize=none")
    for name, module in linear.items():
        if mode == NF4 and nf4_group(module.in_features) is None:
            raise ModelUnsupported(
                f"quantize=nf4 needs linear layers whose inputs are a multiple of {NF4_GROUPS[-1]}, and {name} has {module.in_features}: "
                "serve this model with quantize=int8 or none"
            )


def nf4_group(in_features: int) -> int | None:
    """How many weights of a row share one scale; ``None`` where no group divides it."""
    return next((group for group in NF4_GROUPS if in_features % group == 0), None)


def weight_bytes(out_features: int, in_features: int, mode: str) -> int:
    """Bytes of one quantised matrix with its scales (float32: one per row in int8, one per group and a table of 16 codes in nf4)."""
    if mode == INT8:
        return out_features * in_features + 4 * out_features
    group = nf4_group(in_features) or NF4_GROUPS[-1]
    return out_features * in_features // 2 + 4 * (out_features * in_features // group) + 4 * 16


def quantise_block(block: nn.Module, mode: str, device: torch.device) -> float:
    """Replace every linear layer of ``block`` (in the served dtype, on the CPU) by a quantised one on ``device``, and take the rest there.

    Layers are replaced one by one, so that the block is never held twice.

    Returns:
        The largest error of a matrix: norm of the difference over the norm.

    Raises:
        ModelUnsupported: a layer is more than linear, or its weights do not come back from their packed form.
    """
    errors = []
    for name in [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]:
        module = cast(nn.Linear, block.get_submodule(name))
        _check_linear(name, module)
        layer = _pack(module, mode, device)
        errors.append(_check_packed(name, layer, module.weight.detach()))
        block.set_submodule(name, layer)
    for part in block.modules():
        if not is_quantised(part):  # moving one of these would make it forget its scales
            for leaf, parameter in part._parameters.items():
                part._parameters[leaf] = parameter if parameter is None else nn.Parameter(parameter.detach().to(device), requires_grad=False)
            for leaf, buffer in part._buffers.items():
                part._buffers[leaf] = buffer if buffer is None else buffer.to(device)
    return max(errors)


def prepare_skeleton(model: PreTrainedModel, site: LayerSite, blocks: Mapping[int, nn.Module], mode: str) -> None:
    """Put empty quantised layers into a meta skeleton of the whole model where ``blocks`` have them, and tell PEFT that they are there."""
    for number, block in blocks.items():
        for name, module in block.named_modules():
            if isinstance(module, Int8Linear | Nf4Linear):
                dtype: Any = getattr(module, "compute_dtype", None)
                model.set_submodule(f"{site.prefix}{number}.{name}", _empty(module, mode, dtype))
    setattr(model, PEFT_FLAGS[mode], True)


def lend(block: nn.Module, layer: nn.Module) -> None:
    """Put the quantised layers of ``block`` themselves, not copies, into ``layer``, below the layers of a tuner where there are any."""
    for name, module in block.named_modules():
        if is_quantised(module):
            target = layer.get_submodule(name)
            if hasattr(target, "base_layer"):
                target.base_layer = module
            else:
                layer.set_submodule(name, module)


def held_bytes(module: nn.Module) -> int:
    """Bytes of all tensors of ``module`` that are not meta: parameters, buffers and the state of quantised layers, each storage once."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if isinstance(part, Int8Linear):
            tensors += [tensor for tensor in (part.state.CB, part.state.SCB) if tensor is not None]
        elif isinstance(part, Nf4Linear):
            state = cast(Any, part.weight).quant_state
            tensors += [state.absmax, state.code]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if not tensor.is_meta}
    return sum(storages.values())


def _check_linear(name: str, module: nn.Linear) -> None:
    """A subclass is replaced only if it computes what ``nn.Linear`` computes."""
    if type(module) is nn.Linear:
        return
    probe = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight.dtype)
    with torch.no_grad():
        plain, own = nn.functional.linear(probe, module.weight, module.bias), module(probe)
    if not isinstance(own, Tensor) or own.shape != plain.shape or not torch.allclose(own, plain, rtol=2e-2, atol=1e-3 * float(plain.abs().max())):
        raise ModelUnsupported(f"{name} is a {type(module).__name__}, which is more than a linear layer: serve this model with quantize=none")


def _empty(module: nn.Linear, mode: str, dtype: torch.dtype | None) -> Int8Linear | Nf4Linear:
    """A quantised layer of the shape of ``module``, without weights."""
    shape: Any = {"input_features": module.in_features, "output_features": module.out_features, "bias": module.bias is not None, "device": "meta"}
    if mode == INT8:
        return Int8Linear(**shape, has_fp16_weights=False, threshold=INT8_OUTLIER)
    return Nf4Linear(**shape, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")


def _pack(module: nn.Linear, mode: str, device: torch.device) -> Int8Linear | Nf4Linear:
    """The quantised layer of ``module``, whose bias it takes over."""
    layer: Any = _empty(module, mode, module.weight.dtype)
    weight = module.weight.detach()
    if mode == INT8:
        layer.weight = cast(Any, Int8Params(weight, requires_grad=False, has_fp16_weights=False)).to(device)
        layer.init_8bit_state()
    else:
        group = nf4_group(module.in_features)
        packing: Any = {"blocksize": group, "compress_statistics": False, "quant_type": "nf4", "module": layer}
        layer.weight = cast(Any, Params4bit(weight, requires_grad=False, **packing)).to(device)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().to(device), requires_grad=False)
    return cast(Int8Linear | Nf4Linear, layer.train())


def unpacked(layer: nn.Module) -> Tensor:
    """The weights that a quantised layer multiplies with, in the dtype that it was made from (float32 for int8)."""
    if isinstance(layer, Int8Linear):
        assert layer.state.CB is not None, "_pack has filled the state"
        assert layer.state.SCB is not None, "_pack has filled the state"
        return int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
    assert isinstance(layer, Nf4Linear), "there are two kinds"
    return dequantize_4bit(layer.weight.data, cast(Any, layer.weight).quant_state)


def _check_packed(name: str, layer: nn.Module, weight: Tensor) -> float:
    """Every weight must come back within half a step of its code; returns the norm of the difference over the norm."""
    mode = INT8 if isinstance(layer, Int8Linear) else NF4
    group = weight.shape[1] if mode == INT8 else nf4_group(weight.shape[1])
    assert group is not None
    stored = weight.float()
    scale = stored.reshape(-1, group).abs().amax(dim=1, keepdim=True)
    difference = (unpacked(layer).to("cpu", torch.float32) - stored).reshape(-1, group)
    if not bool((difference.abs() <= scale * _WORST_ERROR[mode] + 1e-7).all()):
        raise ModelUnsupported(
            f"the weights of {name} do not survive quantize={mode} on this machine (not finite, out of range, or a defect of bitsandbytes): "
            "serve this model with quantize=none"
        )
    return float(difference.norm() / stored.norm().clamp_min(1e-30))
