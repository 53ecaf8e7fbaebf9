"""Training steps in which each micro-batch goes back through the body as soon as it has come forward and its loss is known (1F1B).

The model is the library's, so it is run in two halves: once for the whole batch as far as to the body, and for each micro-batch from the body's
output on to the loss, which is that micro-batch's share of the batch's mean.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swarmtune.errors import SwarmError, UsageError
from swarmtune.remote.batch import Batch, micro_batches
from swarmtune.remote.body import BodyReached, RemoteBody, attached_to
from swarmtune.remote.function import as_gradients, travelling
from swarmtune.remote.gradients import PassGradients
from swarmtune.remote.randomness import random_state, set_random_state
from swarmtune.types import Pipeline

logger = logging.getLogger(__name__)
SAME_LOSS = 1e-3
"""Losses of the parts may differ from the whole batch's by so much of it: in half precision, other shapes round otherwise."""


class Pipelined:
    """Forward and backward of a causal language model, batch by batch. One thread uses it.

    Args:
        model: from ``load_causal_lm``, or any other model, whose batches are then never pipelined.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        body = getattr(model, "body", None)
        self._body = body if isinstance(body, RemoteBody) else None
        adapter: Any = getattr(model, "adapter", None) if self._body is not None else None
        # A tuner's own addition to the loss stands in the loss of every call.
        self._fits = self._body is not None and (adapter is None or adapter.regularise() is None)
        virtual = adapter is not None and adapter.peft is not None and adapter.peft.wrapped is not None and not adapter.peft.is_cache_prefix
        self._first = 0 if virtual else 1  # virtual tokens stand before the first token, so it is predicted too
        self._batches = 0

    def __call__(self, batch: Mapping[str, Tensor], scale: float = 1.0) -> Tensor | None:
        """The loss of a batch, the mean over its predicted tokens, with forward and backward done.

        Args:
            batch: arguments of the model, each with the same number of rows; ``labels`` among them.
            scale: what the loss will be multiplied by before its ``backward``; another factor works too, at a multiplication of each gradient.

        Returns:
            A scalar whose ``backward`` only hands the gradients out; ``None`` where the batch is one micro-batch, or cannot be computed in
            parts: call the model then, as if this had not been called.

        Raises:
            SwarmError: some blocks could not be run within the patience. No gradient has been touched.
            NonFinite: a block gave a NaN or an infinity.
        """
        tokens, rows = self._tokens(batch), len(batch["input_ids"])
        if self._body is None or not tokens or not self._several(*batch["input_ids"].shape) or any(len(each) != rows for each in batch.values()):
            return None
        device = batch["input_ids"].device
        before = random_state(device)
        reached = self._to_the_body(batch)
        micro = reached.call.cut(reached.hidden_BTH, reached.tensors)
        step = _Step(self._model, self._body, reached, micro, batch, tokens, scale)
        loss = None
        if len(micro) > 1 and sum(len(each.hidden_BTH) for each in micro) == rows and step.learning:
            looks = self._batches & (self._batches + 1) == 0  # at the first batch, the second, the fourth, the eighth...
            loss = step.run(keep_outputs=looks)
            self._fits = self._is_the_same(loss, step, looks)
        if loss is None or not self._fits:
            set_random_state(device, before)
            return None
        self._batches += 1
        return loss

    def _is_the_same(self, loss: Tensor | None, step: _Step, looks: bool) -> bool:
        """Whether this model's batches can be computed in parts, as far as this one tells.

        Raises:
            UsageError: the loss is not the sum of its parts, and was before.
        """
        if step.drew:
            logger.warning("this model draws random numbers behind its body, as dropout in its head does: micro-batches go on without 1F1B")
            return False
        if loss is None:
            return self._batches > 0  # a model that takes the mean of each part has none for a part that asks for nothing
        return not looks or self._is_the_sum(step.loss_of_all(), float(loss.detach()))

    def _is_the_sum(self, whole: float, parts: float) -> bool:
        """Whether a batch's loss is what its micro-batches' shares add up to.

        Raises:
            UsageError: it is not, and was before.
        """
        if abs(whole - parts) <= SAME_LOSS * abs(whole):
            return True
        what = f"this model's loss over a batch ({whole:.4f}) is not the sum of its parts ({parts:.4f})"
        if self._batches:
            raise UsageError(f"{what}, though it was before: something adds to it; use swarm.pipeline=gpipe")
        logger.warning("%s: micro-batches go on without 1F1B", what)
        return False

    def _several(self, rows: int, sequence: int) -> bool:
        assert self._body is not None, "the caller has looked"
        settings = self._body.settings
        if self._body.attached != attached_to(self._model) or any(parameter._backward_hooks for parameter in self._model.parameters()):
            return False  # somebody's hook or function may add to each loss, or change each gradient
        return self._fits and settings.pipeline is Pipeline.ONE_F_ONE_B and len(micro_batches(rows, sequence, settings.micro_batch_tokens)) > 1

    def _tokens(self, batch: Mapping[str, Tensor]) -> int:
        labels = batch.get("labels")
        return 0 if labels is None or labels.dim() != 2 else int((labels[:, self._first :] != -100).sum())

    def _to_the_body(self, batch: Mapping[str, Tensor]) -> BodyReached:
        assert self._body is not None, "the caller has looked"
        self._body.staged.captures = True
        try:
            self._model(**batch)
        except BodyReached as reached:
            return reached
        finally:
            self._body.staged.captures = False
        raise SwarmError("the model returned without having called its body")


class _Step:
    """One batch on its way."""

    def __init__(
        self, model: nn.Module, body: RemoteBody, reached: BodyReached, micro: Sequence[Batch], batch: Mapping[str, Tensor], tokens: int, scale: float
    ) -> None:
        self._model, self._body, self._micro, self._batch, self._tokens, self._scale = model, body, micro, batch, tokens, scale
        self._call, self._hidden_BTH, self._tensors = reached.call, reached.hidden_BTH, reached.tensors
        self._behind = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._outputs: list[Future[Tensor]] = [Future() for _ in micro]
        self._grads: list[Future[Tensor]] = [Future() for _ in micro]
        self._seen: list[Tensor] = []
        self.drew = False
        """Whether random numbers were drawn behind the body."""

    @property
    def learning(self) -> bool:
        """Whether a backward has anything to do in the body."""
        return torch.is_grad_enabled() and (self._hidden_BTH.requires_grad or any(plan.requires_grad for plan in self._call.plans))

    def run(self, keep_outputs: bool) -> Tensor | None:
        """Forward, loss and backward of all micro-batches; ``None`` where a loss is not finite."""
        chain, page = self._call.chain, self._call.open_page(self._micro)
        running = self._call.loop.begin(chain.train(self._micro, page, self._hidden_BTH.requires_grad, self._tail))
        losses: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(self._behind)
        try:
            for index in range(len(self._micro)):
                output_BTH = self._wait(running, self._outputs[index])
                if output_BTH is None:
                    break  # it has failed
                if keep_outputs:
                    self._seen.append(output_BTH)
                loss, grad_BTH, behind = self._from_the_body(index, output_BTH)
                if not bool(torch.isfinite(loss)):
                    return None
                losses.append(loss)
                sums = [_added(total, more) for total, more in zip(sums, behind, strict=True)]
                if not self._grads[index].set_running_or_notify_cancel():
                    break  # another micro-batch has failed meanwhile
                self._grads[index].set_result(travelling(grad_BTH, self._hidden_BTH))
            inputs, found = self._result(running)
        finally:
            running.cancel()
        gradients = as_gradients(inputs if self._hidden_BTH.requires_grad else None, found.by_kwarg(), self._hidden_BTH, self._tensors)
        total = torch.stack(losses).sum()
        handed: Tensor = _Handed.apply(total, self._scale, (*gradients, *sums), self._hidden_BTH, *self._tensors, *self._behind)
        return handed

    def loss_of_all(self) -> float:
        """The same outputs as one batch."""
        with torch.no_grad():
            return float(self._staged(torch.cat(self._seen).to(self._hidden_BTH.device), slice(None)).loss)  # the model's own mean

    async def _tail(self, index: int, output_BTH: Tensor) -> Tensor:
        """On the loop: hand an output to the thread that trains, and wait for the gradient."""
        self._outputs[index].set_result(output_BTH)
        return await asyncio.wrap_future(self._grads[index])

    def _from_the_body(self, index: int, output_BTH: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """The share of one micro-batch in the loss; its gradients by the body's output, and by what learns behind the body."""
        start = sum(len(batch.hidden_BTH) for batch in self._micro[:index])
        leaf_BTH = output_BTH.to(self._hidden_BTH.device).detach().requires_grad_()
        loss = self._staged(leaf_BTH, slice(start, start + len(leaf_BTH)), num_items_in_batch=self._tokens).loss
        seed = torch.full_like(loss, self._scale)
        grad_BTH, *behind = torch.autograd.grad(loss, [leaf_BTH, *self._behind], seed, allow_unused=True)
        return loss.detach(), torch.zeros_like(leaf_BTH) if grad_BTH is None else grad_BTH, behind

    def _staged(self, output_BTH: Tensor, rows: slice, **more: Any) -> Any:
        """The model from the body on. What is before it runs, too, for nothing, so whatever it draws is put back."""
        staged, device = self._body.staged, output_BTH.device
        before, staged.output_BTH = random_state(device), output_BTH
        try:
            output = self._model(**{name: tensor[rows] for name, tensor in self._batch.items()}, **more)
            self.drew |= not all(map(torch.equal, staged.random, random_state(device)))
            return output
        finally:
            staged.output_BTH = None
            set_random_state(device, before)

    def _wait(self, running: Future[Any], output: Future[Tensor]) -> Tensor | None:
        """The output, as soon as it is there; ``None`` where all has ended before."""
        began = time.monotonic()
        try:
            self._call.loop.wait(running, output)
        finally:
            self._call.chain.counters.wait_s += time.monotonic() - began
        return output.result() if output.done() else None

    def _result(self, running: Future[tuple[list[Tensor | None], PassGradients]]) -> tuple[list[Tensor | None], PassGradients]:
        began = time.monotonic()
        try:
            self._call.loop.wait(running)
            return running.result()
        except CancelledError as error:
            raise SwarmError("this swarm connection was closed during a call") from error
        finally:
            self._call.chain.counters.wait_s += time.monotonic() - began


class _Handed(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float, grads: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        """The loss itself."""
        ctx.scale, ctx.grads = torch.full_like(loss, scale), grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The known gradients, which were computed for a loss times ``scale``."""
        (grad,) = grads
        if bool(grad == ctx.scale):
            return (None, None, None, *ctx.grads)
        factor = grad / ctx.scale
        return (None, None, None, *(None if each is None else each * factor.to(each.dtype) for each in ctx.grads))


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more
