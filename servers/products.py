"""Matrix products of compiled code in float32 on AMD's CPUs with AVX512: by oneDNN, not by MKL.

torch hands them to MKL, which takes its AVX512 code on Intel's CPUs only; oneDNN needs less than half of the time (docs/benchmarks.md).
It reads the same weights, so nothing is held twice.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from servers.numeric import cpu_vendor

logger = logging.getLogger(__name__)
NAME = "swarmtune::product"
TOLERANCE = 1e-5
"""Of the norm, for one product of 64 x 64 matrices."""
LEAST = 1 << 22
"""Multiplications and additions of a product that is worth it: the products of a row or two are not."""


def onednn(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    """A product with a bias, (T, I) x (I, O) + (O,); ``x`` and ``weight`` of any strides."""
    # It takes a weight as linear layers hold it, (O, I), and reads a bias as if it were contiguous and whole.
    bias = None if bias_O is None else bias_O.expand(weight_IO.shape[1]).contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x_TI, weight_IO.t(), bias, "none", [], "")


def _product(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    return onednn(x_TI, weight_IO, bias_O)


def _shape(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_IO.shape[1])


torch.library.define(NAME, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl(NAME, "cpu", _product)
torch.library.register_fake(NAME, _shape)


@cache
def faster() -> bool:
    """Whether products go to oneDNN here: on the CPUs on which that was measured, and where torch has it."""
    if cpu_vendor() != "AuthenticAMD" or torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.rand(*shape, generator=random) for shape in ((64, 64), (64, 64), (64,)))
    right = torch.addmm(bias, x, weight)
    try:
        error = (onednn(x, weight, bias) - right).norm() / right.norm()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as failure:  # it is no public part of torch
        logger.info("matrix products stay with MKL: %s", str(failure).splitlines()[0][:200])
        return False
    return bool(error <= TOLERANCE)


class Products(CustomGraphPass):
    """Puts oneDNN's product in the place of each large ``mm`` and ``addmm`` of float32 matrices on the CPU."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change the graph where it is."""
        aten = torch.ops.aten
        for node in list(graph.nodes):
            if node.target is aten.mm.default:
                x, weight = node.args
                bias = None
            elif node.target is aten.addmm.default and not node.kwargs:
                bias, x, weight = node.args
            else:
                continue
            if not _ours(x, weight, bias):
                continue
            with graph.inserting_before(node):
                if bias is None and _is_better_turned(x, weight):
                    # The gradient of a weight, (T, O)^T (T, I) with O above I: the transposed product takes the larger factor as it lies.
                    turned = _call(graph, torch.ops.swarmtune.product.default, _turn(graph, weight), _turn(graph, x), None)
                    made = _call(graph, aten.clone.default, _turn(graph, turned), memory_format=torch.contiguous_format)
                else:
                    made = _call(graph, torch.ops.swarmtune.product.default, x, weight, bias)
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """For torch's cache of compiled code."""
        return get_hash_for_files((__file__,), f"{LEAST}")


def _call(graph: torch.fx.Graph, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
    """A call in the graph that knows what it gives, as later passes ask."""
    node = graph.call_function(target, args, kwargs)
    values = [each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in args]
    node.meta["val"] = target(*values, **kwargs)
    return node


def _turn(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    return _call(graph, torch.ops.aten.permute.default, node, [1, 0])


def _ours(x: torch.fx.Node, weight: torch.fx.Node, bias: torch.fx.Node | None) -> bool:
    factors = [each for each in (x, weight, bias) if each is not None]
    values = [value for each in factors if isinstance(value := each.meta.get("val"), Tensor)]
    if len(values) < len(factors) or any(value.dtype is not torch.float32 or value.device.type != "cpu" for value in values):
        return False
    (rows, inner), columns = values[0].shape, values[1].shape[1]
    return (bias is None or values[2].dim() == 1) and rows * inner * columns >= max(1, LEAST)


def _is_better_turned(x: torch.fx.Node, weight: torch.fx.Node) -> bool:
    """Whether ``x`` lies by columns and has more rows than the product has columns."""
    value = x.meta["val"]
    return bool(value.stride(1) != 1 and value.shape[1] != 1 and value.shape[0] > weight.meta["val"].shape[1])
