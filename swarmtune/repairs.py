"""What must be neutral in a span besides its layers, and the few values that a family needs for that.

Stem and final norm of the library's model stay with the client, so in a span they must do nothing. Most of that follows from what kind of module
each is. What is written into a family's own forward, such as a factor on the embeddings, stands in ``NEUTRAL_VALUES``. Whether it was enough
is judged by ``skeleton.check_identity``, never assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swarmtune.errors import ModelUnsupported

NEUTRAL_VALUES: Mapping[str, Mapping[str, float]] = {
    "granite": {"embedding_multiplier": 1.0},
    "granite_swa": {"embedding_multiplier": 1.0},
    "granitemoe": {"embedding_multiplier": 1.0},
    "granitemoe_swa": {"embedding_multiplier": 1.0},
    "granitemoehybrid": {"embedding_multiplier": 1.0},
    "granitemoeshared": {"embedding_multiplier": 1.0},
    "recurrent_gemma": {"normalizer": 1.0},
}
"""Model type to attributes of the module that loops over the layers, and the value with which each does nothing. These families scale
``inputs_embeds`` themselves: the client's stem has done it before the first span."""


class ZeroPositions(nn.Module):
    """Stands in for a table of positions: the client has already added them."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar zero, whatever is asked."""
        return torch.zeros(())


class Absent(nn.Module):
    """Stands in for the token embedding of a span, which must never be used."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise: a span starts from hidden states."""
        raise ModelUnsupported("a span was asked to embed tokens")


class PassOn(nn.Module):
    """Stands in for norms, projections and whole stems: hidden states go through as they came."""

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The hidden states, by the name that stems give them or in the first place."""
        given = (inputs_embeds, *args, *kwargs.values())
        return next(value for value in given if isinstance(value, Tensor) and value.is_floating_point())


def neutralise(parent: nn.Module, layers: str, width: int) -> None:
    """Replace what surrounds the layers in the module that loops over them; tables that layers are given (rotary) stay.

    Args:
        parent: changed in place.
        layers: name of its layer list.
        width: of the hidden states.
    """
    embedding = parent.get_input_embeddings() if isinstance(parent, PreTrainedModel) else None
    for name, child in list(parent.named_children()):
        if name == layers:
            continue
        if child is embedding:
            setattr(parent, name, Absent())
        elif isinstance(child, nn.Embedding) or _is_position_table(child, width):
            setattr(parent, name, ZeroPositions())
        elif next(child.parameters(), None) is not None or _is_bare_norm(child):
            setattr(parent, name, PassOn())
    config: Any = parent.config
    for name, value in NEUTRAL_VALUES.get(config.model_type, {}).items():
        former = getattr(parent, name)
        setattr(parent, name, torch.tensor(value, dtype=former.dtype) if isinstance(former, Tensor) else value)


def _is_position_table(module: nn.Module, width: int) -> bool:
    """Whether a module without parameters holds a computed table (sinusoidal positions) with a row of hidden width per position."""
    return next(module.parameters(), None) is None and any(buffer.dim() == 2 and buffer.shape[1] == width for buffer in module.buffers(recurse=False))


def _is_bare_norm(module: nn.Module) -> bool:
    """Whether a module has nothing learned or stored and maps one argument, as a norm without weights does."""
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    arguments = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty and each.kind < each.VAR_POSITIONAL for each in arguments) == 1
