"""The frozen weights of a span of blocks, and the digests by which clients compare servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from swarmtune.skeleton import LayerSite, build_skeleton
from swarmtune.types import BlockSpan
from swarmtune.weights import Checkpoint, block_digest, fill, tensor_digest


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Blocks with their weights, never run themselves: programs borrow their tensors.

    Attributes:
        blocks: block number to its module, in the dtype and on the device that it is served from.
        digests: one per block, of the weights as stored.
    """

    blocks: dict[int, nn.Module]
    digests: tuple[str, ...]


def load_blocks(
    model: str,
    config: PretrainedConfig,
    site: LayerSite,
    span: BlockSpan,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> BlockWeights:
    """Read the blocks of ``span`` from the shards that hold them, and no others.

    Args:
        model: local directory or hub id.
        config: of the whole model.
        site: where the model keeps its layers.
        span: which blocks.
        dtype: of the served weights.
        device: where they go.
        progress: called with the blocks loaded and the blocks to load.

    Raises:
        ModelUnsupported: a tensor is missing, misshapen or unreadable.
    """
    skeleton = build_skeleton(config)
    layers = skeleton.get_submodule(f"{site.parent_name}.{site.attribute}")
    assert isinstance(layers, nn.ModuleList)
    checkpoint = Checkpoint(model)
    blocks, digests = {}, []
    for block in range(span.start, span.stop):
        module = layers[block]
        stored: dict[str, bytes] = {}

        def observe(name: str, tensor: Tensor, stored: dict[str, bytes] = stored) -> None:
            stored[name] = tensor_digest(tensor)

        names = {name: f"{site.prefix}{block}.{name}" for name in module.state_dict()}
        fill(module, names, checkpoint, skeleton.base_model_prefix, dtype, device, observe)
        blocks[block] = module.eval().requires_grad_(False)
        digests.append(block_digest(stored))
        if progress is not None:
            progress(block - span.start + 1, len(span))
    return BlockWeights(blocks, tuple(digests))
