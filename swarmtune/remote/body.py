"""Door 2: the frozen transformer body as an ``nn.Module`` without parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from swarmtune.errors import KwargError
from swarmtune.remote.chain import Chain, KwargPlan
from swarmtune.remote.function import BodyCall, RemoteSequential
from swarmtune.transport.loop import LoopThread
from swarmtune.types import Kwarg
from swarmtune.wire.messages import AdapterSpec


class RemoteBody(nn.Module):
    """All blocks of a model, on servers. Frozen; what learns comes in as kwargs.

    Attributes:
        num_blocks: how many blocks there are.
        hidden_size: width of the hidden states.
    """

    def __init__(self, loop: LoopThread, chain: Chain, num_blocks: int, hidden_size: int) -> None:
        super().__init__()
        self._loop, self._chain = loop, chain
        self.num_blocks, self.hidden_size = num_blocks, hidden_size

    def forward(
        self,
        hidden_BTH: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        kwargs: Sequence[Kwarg] = (),
        adapter: AdapterSpec | None = None,
    ) -> Tensor:
        """Run every block.

        Args:
            hidden_BTH: input of block 0, floating point.
            attention_mask: ``(batch, sequence)``, 1 where a token is, 0 where padding is.
            position_ids: ``(batch, sequence)``, for models that take them.
            kwargs: named arguments for the blocks; those that require a gradient get one.
            adapter: configuration behind kwargs named ``peft.<digest>...``.

        Returns:
            The output of the last block, of the same shape and type, before the final norm.

        Raises:
            KwargError: a kwarg does not fit the batch or the model.
            SwarmError: some blocks could not be run within the patience.
            NonFinite: a block gave a NaN or an infinity.
        """
        if hidden_BTH.dim() != 3 or hidden_BTH.shape[2] != self.hidden_size or not hidden_BTH.is_floating_point() or 0 in hidden_BTH.shape:
            raise KwargError(
                f"hidden states must be floating-point (batch, sequence, {self.hidden_size}), got {hidden_BTH.dtype} {tuple(hidden_BTH.shape)}"
            )
        if isinstance(kwargs, Mapping) or not isinstance(kwargs, Iterable) or not all(isinstance(kwarg, Kwarg) for kwarg in kwargs):
            raise KwargError(f"kwargs must be a list of swarmtune.Kwarg, got {type(kwargs).__name__}")
        every = [*_library(hidden_BTH, attention_mask=attention_mask, position_ids=position_ids), *kwargs]
        plans = tuple(self._plan(kwarg, hidden_BTH) for kwarg in every)
        call = BodyCall(self._loop, self._chain, plans, adapter)
        output_BTH: Tensor = RemoteSequential.apply(call, hidden_BTH, *(kwarg.tensor for kwarg in every))
        return output_BTH

    def _plan(self, kwarg: Kwarg, hidden_BTH: Tensor) -> KwargPlan:
        for axis, length in zip(("batch", "sequence"), hidden_BTH.shape[:2], strict=True):
            dimension = kwarg.axes.get(axis)  # type: ignore[call-overload]
            if dimension is not None and kwarg.tensor.shape[dimension] != length:
                raise KwargError(f"kwarg {kwarg.name}: its {axis} axis has length {kwarg.tensor.shape[dimension]}, the hidden states have {length}")
        return KwargPlan(kwarg.name, dict(kwarg.axes), kwarg.span(self.num_blocks), kwarg.tensor.requires_grad and torch.is_grad_enabled())


def _library(hidden_BTH: Tensor, **arguments: Tensor | None) -> list[Kwarg]:
    """Arguments of the library's own forward as kwargs; one row may stand for all."""
    found = []
    for name, tensor in arguments.items():
        if tensor is None:
            continue
        if tensor.dim() != 2:
            raise KwargError(f"{name} must have shape (batch, sequence), got {tuple(tensor.shape)}")
        shared = tensor.shape[0] == 1 and hidden_BTH.shape[0] != 1
        found.append(Kwarg(name, tensor.detach(), {"sequence": 1} if shared else {"batch": 0, "sequence": 1}))
    return found
