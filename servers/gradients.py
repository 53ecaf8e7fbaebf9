"""From the end of a span's graph back to what gradients were asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmtune.types import BlockSpan
from swarmtune.wire.messages import SpanResult

FLOAT16_PEAK = 8
"""Power of two to which gradients are scaled before they enter a float16 span; its numbers reach to 2**15."""
PINNED_BYTES = 256 << 20
"""Of a result at most: torch rounds pinned memory up to a power of two, and keeps it for the next result."""


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """What a backward needs of a forward that has run.

    Attributes:
        output_BTH: with its graph.
        input_BTH: the leaf that went in, where a gradient by it can be asked for.
        leaves: index of the kwarg, its block, and what its gradient is taken by.
        kwargs: by that index, the kwarg's blocks, the type in which it came, and whether all micro-batches share it.
        span: the blocks that it goes through.
        held_bytes: of the storages that it keeps alive, parameters and buffers of the server not counted.
    """

    output_BTH: Tensor
    input_BTH: Tensor | None
    leaves: Sequence[tuple[int, int, Tensor]]
    kwargs: Mapping[int, tuple[BlockSpan, torch.dtype, bool]]
    held_bytes: int = 0
    span: BlockSpan | None = None


def gradients(graph: Graph, grad_BTH: Tensor, input_grad: bool) -> SpanResult:
    """Everything that was asked for, given the gradient by the output; the graph is used up. Zeros where nothing depends on a tensor."""
    wanted = [leaf for _, _, leaf in graph.leaves]
    if input_grad:
        assert graph.input_BTH is not None, "whoever asks has looked"
        wanted.append(graph.input_BTH)
    if not wanted:
        return SpanResult(None)
    grads: Sequence[Tensor | None] = (None,) * len(wanted)
    if graph.output_BTH.requires_grad:
        grads = _grads(graph.output_BTH, wanted, grad_BTH.to(graph.output_BTH.device))
    filled = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, grads, strict=True)]
    by_input = to_host(filled.pop(), grad_BTH.dtype) if input_grad else None
    return SpanResult(by_input, _by_kwarg(graph, filled))


def _grads(output_BTH: Tensor, wanted: Sequence[Tensor], grad_BTH: Tensor) -> Sequence[Tensor | None]:
    """Gradients of ``wanted``. Through a float16 span they travel scaled by a power of two, which is taken out again in float32.

    Without it, gradients below 6e-8 would become zero on the way. The scale brings the largest value to about ``2**FLOAT16_PEAK``; where something
    overflows, a smaller one is tried, and what overflows even unscaled is returned as it is.
    """
    if output_BTH.dtype is not torch.float16:
        return torch.autograd.grad(output_BTH, wanted, grad_BTH.to(output_BTH.dtype), allow_unused=True)
    grad_BTH = grad_BTH.float()
    peak = float(grad_BTH.abs().amax())
    exponent = FLOAT16_PEAK - math.floor(math.log2(peak)) if 0 < peak < math.inf else 0
    tries = [exponent, exponent - 8, exponent - 16, min(0, exponent - 24)]
    for shift in tries:
        scaled = torch.autograd.grad(
            output_BTH, wanted, torch.ldexp(grad_BTH, torch.tensor(shift)).to(torch.float16), allow_unused=True, retain_graph=shift != tries[-1]
        )
        if all(grad is None or bool(torch.isfinite(grad).all()) for grad in scaled):
            break
    return [None if grad is None else torch.ldexp(grad.float(), torch.tensor(-shift)) for grad in scaled]


def _by_kwarg(graph: Graph, grads: list[Tensor]) -> dict[int, Tensor]:
    """Stack the per-block gradients of each kwarg, ascending, in the type in which it came; an argument's counts as the first block's."""
    grouped: dict[int, dict[int, Tensor]] = {}
    for (index, block, _), grad in zip(graph.leaves, grads, strict=True):
        grouped.setdefault(index, {})[block] = grad.to(graph.kwargs[index][1])
    stacked = {}
    for index, parts in grouped.items():
        blocks = graph.kwargs[index][0]
        zero = torch.zeros_like(next(iter(parts.values())))
        stacked[index] = to_host(torch.stack([parts.get(block, zero) for block in range(blocks.start, blocks.stop)]), zero.dtype)
    return stacked


def to_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A result on its way to the network, in the type in which it travels; from a GPU into pinned memory, which it writes several times as fast."""
    if tensor.device.type == "cuda" and tensor.numel() * dtype.itemsize <= PINNED_BYTES:
        with suppress(RuntimeError):  # the system locks no more memory
            return torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor.to(dtype))
    return tensor.to("cpu", dtype)
