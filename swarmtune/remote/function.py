"""Door 3: the autograd function between the client's graph and the chain."""

from __future__ import annotations

import time
import weakref
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swarmtune.remote.batch import Batch, KwargPlan, Leg, micro_batches
from swarmtune.remote.chain import Chain
from swarmtune.remote.guard import GradientGuard
from swarmtune.remote.ledger import Page
from swarmtune.transport.loop import LoopThread
from swarmtune.wire.messages import AdapterSpec, DropoutSeed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BodyCall:
    """All of one body call but its tensors."""

    loop: LoopThread
    chain: Chain
    plans: tuple[KwargPlan, ...]
    adapter: AdapterSpec | None
    seed: int | None = None
    guard: GradientGuard | None = None
    digests: tuple[str, ...] = ()

    def open_page(self, micro: Sequence[Batch]) -> Page:
        """Plan this call."""
        rows = [batch.hidden_BTH.shape[0] for batch in micro]
        return self.chain.ledger.open([(sum(rows[:index]), count) for index, count in enumerate(rows)], self.chain.num_blocks)

    def cut(self, hidden_BTH: Tensor, tensors: Sequence[Tensor]) -> list[Batch]:
        """Micro-batches: kwargs with a batch axis are cut with the rows, the others are shared. A pure function of shapes and settings."""
        found = []
        for index, (start, rows) in enumerate(micro_batches(hidden_BTH.shape[0], hidden_BTH.shape[1], self.chain.settings.micro_batch_tokens)):
            parts = tuple(
                (tensor if (axis := plan.axes.get("batch")) is None else tensor.narrow(axis, start, rows)).detach()
                for plan, tensor in zip(self.plans, tensors, strict=True)
            )
            dropout = None if self.seed is None else DropoutSeed(self.seed, start)
            found.append(Batch(hidden_BTH[start : start + rows].detach(), self.plans, parts, self.adapter, dropout, index, self.digests))
        return found

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the chain's ``work`` on the loop thread; the time that this takes is counted."""
        began = time.monotonic()
        try:
            return self.loop.run(work)
        finally:
            self.chain.counters.wait_s += time.monotonic() - began


class Legs:
    """Where the micro-batches of one forward ran, and what was left behind there for the backward; whatever is not used is released."""

    def __init__(self, call: BodyCall, ran: Sequence[Sequence[Leg]]) -> None:
        nothing = torch.empty(0)  # tensors are autograd's to keep
        self._left = [[replace(leg, hidden_BTH=nothing) for leg in own] for own in ran]
        graphs = [graph for own in ran for leg in own for graph in leg.graphs()]
        self._unused = weakref.finalize(self, call.loop.post, partial(call.chain.caller.release, graphs))
        self._unused.atexit = False

    def with_inputs(self, micro: Sequence[Batch], entered: Sequence[Tensor]) -> list[list[Leg]]:
        """Put the saved inputs back beside their spans. A graph can be gone through once, so a second backward gets none."""
        remaining = iter(entered)
        left, self._left = self._left, [[replace(leg, kept=None, parts=()) for leg in own] for own in self._left]
        self._unused.detach()
        return [
            [replace(leg, hidden_BTH=next(remaining) if position else batch.hidden_BTH) for position, leg in enumerate(own)]
            for own, batch in zip(left, micro, strict=True)
        ]


class RemoteSequential(torch.autograd.Function):
    """All blocks of the body, on servers; differentiable by the hidden states and by every kwarg that asks for it."""

    @staticmethod
    def forward(ctx: Any, call: BodyCall, hidden_BTH: Tensor, *tensors: Tensor) -> Tensor:
        """Run the chain; keep what entered each leg."""
        micro = call.cut(hidden_BTH, tensors)
        page = call.open_page(micro)
        results = call.wait(call.chain.forward(micro, page, ctx.needs_input_grad[1] if any(ctx.needs_input_grad) else None))
        if any(ctx.needs_input_grad):
            ctx.call, ctx.page = call, page
            ctx.legs = Legs(call, [legs for legs, _ in results])
            # The first leg's input is a slice of hidden_BTH, so only what came back from servers is kept beside it.
            ctx.save_for_backward(hidden_BTH, *tensors, *(leg.hidden_BTH for legs, _ in results for leg in legs[1:]))
        output_BTH = torch.cat([output for _, output in results]) if len(results) > 1 else results[0][1]
        return output_BTH.to(hidden_BTH.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run the chain back; either every gradient comes, or an error, and then the gradients of all that learns are as before the backward."""
        call: BodyCall = ctx.call
        hidden_BTH, *rest = ctx.saved_tensors
        tensors, entered = rest[: len(call.plans)], rest[len(call.plans) :]
        micro = call.cut(hidden_BTH, tensors)
        legs = ctx.legs.with_inputs(micro, entered)
        (grad_BTH,) = grads
        parts = [travelling(part, hidden_BTH) for part in grad_BTH.split([batch.hidden_BTH.shape[0] for batch in micro])]
        try:
            inputs, found = call.wait(call.chain.backward(micro, legs, parts, ctx.needs_input_grad[1], ctx.page))
            by_kwarg = found.by_kwarg()
        except BaseException:
            if call.guard is not None:
                call.guard.restore()
            raise
        return (None, *as_gradients(inputs if ctx.needs_input_grad[1] else None, by_kwarg, hidden_BTH, tensors))


def travelling(grad_BTH: Tensor, hidden_BTH: Tensor) -> Tensor:
    """A gradient by hidden states as it travels: between float16 spans as float32, whose small numbers do not vanish."""
    return grad_BTH.to(torch.float32 if hidden_BTH.dtype is torch.float16 else hidden_BTH.dtype)


def as_gradients(
    inputs: Sequence[Tensor | None] | None, by_kwarg: Sequence[Tensor | None], hidden_BTH: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Of the hidden states, put together again where they are wanted, and of the kwargs, where they belong."""
    input_grad = None if inputs is None else torch.cat([_present(grad) for grad in inputs]).to(hidden_BTH.device, hidden_BTH.dtype)
    return (input_grad, *(None if grad is None else grad.to(tensor.device) for grad, tensor in zip(by_kwarg, tensors, strict=True)))


def _present(grad: Tensor | None) -> Tensor:
    assert grad is not None, "the chain returns the gradient by the input when asked"
    return grad
