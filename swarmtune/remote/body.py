"""Door 2: the frozen transformer body as an ``nn.Module`` without parameters."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swarmtune.errors import KwargError, NonFinite, UsageError
from swarmtune.remote.batch import KwargPlan, micro_batches
from swarmtune.remote.chain import Chain, ChainSettings
from swarmtune.remote.function import BodyCall, RemoteSequential
from swarmtune.remote.guard import GradientGuard
from swarmtune.remote.uploads import digests_of
from swarmtune.transport.loop import LoopThread
from swarmtune.types import Kwarg
from swarmtune.wire.messages import AdapterSpec


class BodyReached(BaseException):
    """A model that runs only as far as to its body has reached it; not for handlers of errors."""

    def __init__(self, call: BodyCall, hidden_BTH: Tensor, tensors: list[Tensor]) -> None:
        super().__init__("the body has been reached")
        self.call, self.hidden_BTH, self.tensors = call, hidden_BTH, tensors


class Staged(threading.local):
    """For each thread, what its calls of a model leave out.

    Attributes:
        captures: stop at the body.
        output_BTH: what the body is taken to have returned.
        random: of the generators, when it was.
    """

    captures = False
    output_BTH: Tensor | None = None
    random: Sequence[Tensor] = ()


def attached_to(model: nn.Module) -> tuple[object, ...]:
    """What decides a model's loss besides its modules: its hooks and theirs, its forward, its loss."""
    hooks = tuple(key for module in model.modules() for key in (*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks))
    return (hooks, model.forward, getattr(model, "_loss_function", None), type(model))


class RemoteBody(nn.Module):
    """All blocks of a model, on servers. Frozen; what learns comes in as kwargs.

    Attributes:
        num_blocks: how many blocks there are.
        hidden_size: width of the hidden states.
        guard: puts gradients back when a backward fails; ``None`` where nobody has said what learns.
        attached: ``attached_to`` the whole model, as this package has made it.
        staged: whether this thread runs a model only as far as to the body, or only from there on.
    """

    def __init__(self, loop: LoopThread, chain: Chain, num_blocks: int, hidden_size: int) -> None:
        super().__init__()
        self._loop, self._chain = loop, chain
        self.num_blocks, self.hidden_size = num_blocks, hidden_size
        self.guard: GradientGuard | None = None
        self.staged = Staged()
        self.attached: tuple[object, ...] = ()

    @property
    def settings(self) -> ChainSettings:
        """How calls are cut."""
        return self._chain.settings

    def forward(
        self,
        hidden_BTH: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        kwargs: Iterable[Kwarg] = (),
        adapter: AdapterSpec | None = None,
        seed: int | None = None,
        whole: bool = False,
    ) -> Tensor:
        """Run every block.

        Args:
            hidden_BTH: input of block 0, floating point.
            attention_mask: ``(batch, sequence)``, 1 where a token is, 0 where padding is.
            position_ids: ``(batch, sequence)``, for models that take them.
            kwargs: named arguments for the blocks; those that require a gradient get one.
            adapter: configuration behind kwargs named ``peft.<digest>...``.
            seed: of the adapter's dropout, from 0 to 2**63 - 1; without one there is no dropout.
            whole: refuse to cut the batch, because something in the blocks mixes its rows.

        Returns:
            The output of the last block, of the same shape and type, before the final norm.

        Raises:
            KwargError: a kwarg does not fit the batch or the model.
            SwarmError: some blocks could not be run within the patience.
            NonFinite: a block gave a NaN or an infinity.
        """
        call, tensors = self._prepare(hidden_BTH, attention_mask, position_ids, kwargs, adapter, seed, whole)
        if self.staged.captures:
            raise BodyReached(call, hidden_BTH, tensors)
        output_BTH: Tensor = RemoteSequential.apply(call, hidden_BTH, *tensors)
        return output_BTH

    def _prepare(
        self,
        hidden_BTH: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        kwargs: Iterable[Kwarg],
        adapter: AdapterSpec | None,
        seed: int | None,
        whole: bool,
    ) -> tuple[BodyCall, list[Tensor]]:
        """Check and plan a call."""
        if hidden_BTH.dim() != 3 or hidden_BTH.shape[2] != self.hidden_size or not hidden_BTH.is_floating_point() or 0 in hidden_BTH.shape:
            raise KwargError(
                f"hidden states must be floating-point (batch, sequence, {self.hidden_size}), got {hidden_BTH.dtype} {tuple(hidden_BTH.shape)}"
            )
        kwargs = kwargs if isinstance(kwargs, Mapping) or not isinstance(kwargs, Iterable) else list(kwargs)  # a generator can be read once
        if not isinstance(kwargs, list) or not all(isinstance(kwarg, Kwarg) for kwarg in kwargs):
            raise KwargError(f"kwargs must be a list of swarmtune.Kwarg, got {type(kwargs).__name__}")
        every = [*_library(hidden_BTH, attention_mask=attention_mask, position_ids=position_ids), *kwargs]
        plans = tuple(self._plan(kwarg, hidden_BTH) for kwarg in every)
        _check_finite(every)
        if whole and len(micro_batches(hidden_BTH.shape[0], hidden_BTH.shape[1], self._chain.settings.micro_batch_tokens)) > 1:
            raise KwargError(
                f"this adapter mixes the rows of a batch, so the batch cannot be cut into micro-batches: raise micro_batch_tokens to at least "
                f"{hidden_BTH.shape[0] * hidden_BTH.shape[1]}, or use a smaller batch"
            )
        call = BodyCall(self._loop, self._chain, plans, adapter, seed, self.guard, digests_of(plans, [kwarg.tensor for kwarg in every]))
        return call, [kwarg.tensor for kwarg in every]

    def __reduce_ex__(self, protocol: object) -> Any:
        """A connection cannot be copied.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a remote model cannot be copied or pickled, because its body is a connection: save what learns with model.adapter.save_pretrained"
        )

    def initial(
        self, names: Sequence[tuple[int, str]], shapes: Sequence[tuple[int, ...]], spec: AdapterSpec | None = None, rng: Tensor | None = None
    ) -> list[Tensor]:
        """First values that depend on body weights, from the servers.

        Args:
            names: block and name of each: ``param.<name within the block>``, or a tuner's tensor as it travels.
            shapes: what is expected.
            spec: the tuner whose tensors are asked for.
            rng: state of the random generator before the tuner was made, where its first values depend on random numbers too.

        Raises:
            SwarmError: some blocks could not be asked within the patience.
            KwargError: a server says that there is no such value.
        """
        return self._loop.run(self._chain.initial(names, shapes, spec, rng))

    def _plan(self, kwarg: Kwarg, hidden_BTH: Tensor) -> KwargPlan:
        for axis, length in zip(("batch", "sequence"), hidden_BTH.shape[:2], strict=True):
            dimension = kwarg.axes.get(axis)  # type: ignore[call-overload]
            if dimension is not None and kwarg.tensor.shape[dimension] != length:
                raise KwargError(f"kwarg {kwarg.name}: its {axis} axis has length {kwarg.tensor.shape[dimension]}, the hidden states have {length}")
        span = kwarg.span(self.num_blocks)
        if "." not in kwarg.name and kwarg.name != "prompt" and len(span) < self.num_blocks:
            # Servers cannot see this: some blocks of the model may be all that they are asked for.
            raise KwargError(f"{kwarg.name} is an argument of the library's forward, which is for all blocks, got {span}")
        return KwargPlan(kwarg.name, dict(kwarg.axes), span, kwarg.tensor.requires_grad and torch.is_grad_enabled())


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


def _check_finite(kwargs: Sequence[Kwarg]) -> None:
    """Refuse NaN and infinity before anything travels: at an unrouted expert or a masked position nobody would see them.

    Raises:
        NonFinite: names the kwarg and its blocks.
    """
    floating = [kwarg for kwarg in kwargs if kwarg.tensor.is_floating_point()]
    if not floating:
        return
    sums = torch.stack([kwarg.tensor.detach().sum(dtype=torch.float32).to(floating[0].tensor.device) for kwarg in floating])
    if bool(torch.isfinite(sums).all()):
        return
    for kwarg in floating:
        if not bool(torch.isfinite(kwarg.tensor).all()):
            start = kwarg.blocks if isinstance(kwarg.blocks, int) else None
            raise NonFinite(
                f"kwarg {kwarg.name} for {'all blocks' if kwarg.blocks is None else f'blocks {kwarg.blocks}'} holds NaN or infinity", start
            )
