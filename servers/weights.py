"""The frozen weights of a span of blocks, and the digests by which clients compare servers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from swarmtune.skeleton import LayerSite, build_skeleton, in_dtype
from swarmtune.stored_model import StoredModel, fill
from swarmtune.types import BlockSpan
from swarmtune.weights import Checkpoint, block_digest, block_names, tensor_digest


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Blocks with their weights, never run themselves: programs borrow their tensors.

    Attributes:
        blocks: block number to its module, in the dtype and on the device that it is served from.
        digests: one per block, of the weights as stored, whatever they are quantised to.
        quantisation: ``none``, or the mode in which the linear layers are held.
        error: the largest error that quantising made in a matrix: norm of the difference over the norm.
    """

    blocks: dict[int, nn.Module]
    digests: tuple[str, ...]
    quantisation: str = "none"
    error: float = 0.0

    def prepare(self, model: PreTrainedModel, site: LayerSite) -> None:
        """Make a meta skeleton of the whole model look like these blocks, so that a tuner finds the layers that it will sit on."""
        if self.quantisation != "none":
            from servers.quantize import prepare_skeleton

            prepare_skeleton(model, site, self.blocks, self.quantisation)

    def lend(self, block: int, layer: nn.Module) -> None:
        """Put what must be borrowed as a whole layer, because it keeps state beside its tensors, into ``layer`` of a prepared skeleton."""
        if self.quantisation != "none":
            from servers.quantize import lend

            lend(self.blocks[block], layer)


def load_blocks(
    model: str,
    config: PretrainedConfig,
    site: LayerSite,
    span: BlockSpan,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    quantise: str = "none",
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
        quantise: ``none``, ``int8`` or ``nf4``; each block is quantised before the next one is read.

    Raises:
        ModelUnsupported: a tensor is missing, misshapen or unreadable, or the blocks cannot be quantised.
    """
    skeleton = build_skeleton(in_dtype(config, dtype))
    layers = skeleton.get_submodule(f"{site.parent_name}.{site.attribute}")
    assert isinstance(layers, nn.ModuleList)
    stored_model = StoredModel(skeleton, Checkpoint(model))
    if quantise != "none":
        from servers.quantize import check_quantisable, quantise_block  # bitsandbytes takes a second or two to import

        for block in range(span.start, span.stop):
            check_quantisable(layers[block], quantise)
    blocks, digests, error = {}, [], 0.0
    for block in range(span.start, span.stop):
        module = layers[block]
        stored: dict[str, bytes] = {}

        def observe(name: str, tensor: Tensor, stored: dict[str, bytes] = stored) -> None:
            stored[name] = tensor_digest(tensor)

        names = block_names(module, site.prefix, block)
        if quantise == "none":
            fill(module, names, stored_model, device, observe)
        else:
            fill(module, names, stored_model, torch.device("cpu"), observe)
            error = max(error, quantise_block(module, quantise, device))
        blocks[block] = module.eval().requires_grad_(False)
        digests.append(block_digest(stored))
        if progress is not None:
            progress(block - span.start + 1, len(span))
    return BlockWeights(blocks, tuple(digests), quantise, error)
