"""Whether the servers hold the checkpoint that the user named: as far as its body is on this disk."""

from __future__ import annotations

import logging

from torch import nn
from transformers import PretrainedConfig

from swarmtune.errors import ModelUnsupported, SwarmMismatch
from swarmtune.remote.census import label, listed
from swarmtune.remote.route import Directory
from swarmtune.skeleton import LayerSite, build_skeleton
from swarmtune.stored_model import StoredModel, stored_digest
from swarmtune.weights import Checkpoint, block_names

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 31
"""Further blocks are compared while no more than this has to be read: seconds of hashing, at the start of a run."""


def compare_weights(model: str, config: PretrainedConfig, site: LayerSite, directory: Directory) -> None:
    """Compare the blocks of ``model`` that are on this disk with what the servers hold: one block of every span, then more within ``READ_BYTES``.

    Nothing is downloaded for it. What cannot be read is left to the servers' word, which is logged.

    Raises:
        SwarmMismatch: servers hold other weights for a block.
    """
    skeleton = build_skeleton(config)
    layers = skeleton.get_submodule(f"{site.parent_name}.{site.attribute}")
    assert isinstance(layers, nn.ModuleList)
    stored, holders = StoredModel(skeleton, Checkpoint(model)), directory.holders()
    one_of_each_span = sorted({info.span.start for info in holders.values()})
    compared, read_bytes, largest_bytes = 0, 0, 0
    for block in dict.fromkeys((*one_of_each_span, *range(site.num_blocks))):
        agreed = directory.digest_of(block)
        if agreed is None or (block not in one_of_each_span and read_bytes + largest_bytes > READ_BYTES):
            continue
        try:
            found = stored_digest(block_names(layers[block], site.prefix, block), stored)
        except ModelUnsupported as error:
            logger.warning("block %d of %s cannot be compared with what the servers hold: %s", block, model, error)
            continue
        if found is None:
            continue
        if found[0] != agreed:
            servers = listed(label(peer, info) for peer, info in sorted(holders.items()) if block in info.span)
            raise SwarmMismatch(
                f"the weights of block {block} on {servers or 'the swarm'} are not those of {model} (same configuration, another checkpoint, or one "
                "stored in another type): give the checkpoint that the servers hold, or start them with this one"
            )
        compared, read_bytes, largest_bytes = compared + 1, read_bytes + found[1], max(largest_bytes, found[1])
    left = site.num_blocks - compared
    logger.log(logging.INFO if left else logging.DEBUG, "%d of %d blocks on the servers were compared with %s%s",
        compared, site.num_blocks, model, f"; the other {left} are not on this disk or too much to read" if left else "")  # fmt: skip
