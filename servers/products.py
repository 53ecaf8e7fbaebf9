"""Matrix products of compiled code in float32 on a CPU that is not Intel's: by oneDNN, not by MKL.

torch hands them to MKL, which takes its AVX512 code on Intel's CPUs only. On an EPYC with AVX512, oneDNN needs less than half of the time
(docs/benchmarks.md). It reads the same weights, so nothing is held twice.
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


def _product(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    # It takes a weight as linear layers hold it, (out, in), and any strides.
    return torch.ops.mkldnn._linear_pointwise.default(x_TI, weight_IO.t(), bias_O, "none", [], "")


def _shape(x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_IO.shape[1])


torch.library.define(NAME, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl(NAME, "cpu", _product)
torch.library.register_fake(NAME, _shape)


@cache
def faster() -> bool:
    """Whether products go to oneDNN here, which depends on the make of the CPU, and on torch having it."""
    if cpu_vendor() == "GenuineIntel" or not torch.backends.mkldnn.is_available():
        return False
    try:
        x, weight, bias = torch.rand(64, 64), torch.rand(64, 64), torch.rand(64)
        right = torch.addmm(bias, x, weight)
        error = (_product(x, weight, bias) - right).norm() / right.norm()
    except Exception as failure:  # it is no public part of torch: whatever another release says
        logger.info("matrix products stay with MKL: %s", str(failure).splitlines()[0][:200])
        return False
    return bool(error <= TOLERANCE)


class Products(CustomGraphPass):
    """Puts oneDNN's product in the place of each ``mm`` and ``addmm`` of float32 matrices on the CPU."""

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
                if _by_rows(x) or bias is not None:
                    made = _call(graph, torch.ops.swarmtune.product.default, x, weight, bias)
                else:
                    # The gradient of a weight, (T, out)^T (T, in): the transposed product takes the larger factor as it lies.
                    turned = _call(graph, torch.ops.swarmtune.product.default, _turn(graph, weight), _turn(graph, x), None)
                    made = _call(graph, aten.clone.default, _turn(graph, turned), memory_format=torch.contiguous_format)
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """For torch's cache of compiled code."""
        return get_hash_for_files((__file__,))


def _call(graph: torch.fx.Graph, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
    """A call in the graph that knows what it gives, as later passes ask."""
    node = graph.call_function(target, args, kwargs)
    values = [each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in args]
    node.meta["val"] = target(*values, **kwargs)
    return node


def _turn(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    return _call(graph, torch.ops.aten.permute.default, node, [1, 0])


def _ours(*factors: torch.fx.Node | None) -> bool:
    values = [each.meta["val"] for each in factors if each is not None]
    if any(value.dtype is not torch.float32 or value.device.type != "cpu" for value in values):
        return False
    return (len(values) < 3 or values[2].dim() == 1) and all(size > 0 for value in values for size in value.shape)


def _by_rows(node: torch.fx.Node) -> bool:
    value = node.meta["val"]
    return bool(value.stride(1) == 1 or value.shape[1] == 1)
