"""Gradients of one backward pass, filed by kwarg, block and micro-batch as they come, and added in one order, whoever added a part of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarmtune.errors import NotExact
from swarmtune.remote.batch import Batch, KwargPlan, Leg
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import GradientSum, SpanResult

_Place = tuple[BlockSpan, str, int]
"""A span, the server that has kept its graph, and the generation of the connection to it."""


@dataclass(frozen=True, slots=True, eq=False)
class Withheld:
    """A backward that has been done, and whose gradients a server holds for the sum: what it takes to do it again."""

    batch: Batch
    leg: Leg
    grad_BTH: Tensor


class PassGradients:
    """What has come so far.

    Micro-batch ``i`` belongs to lane ``i % lanes``. The gradient by a kwarg is, for each block, the left fold over the lanes of the left fold over
    the micro-batches of each in order (or its rows put together again where it was cut with them), then the left fold over the blocks, ascending. So
    it depends on configuration and shapes, and neither on routes nor on whether a server has added.
    """

    def __init__(self, plans: Sequence[KwargPlan], count: int, ticket: int, lanes: int = 1) -> None:
        """``ticket`` and the ``lanes - 1`` numbers that follow belong to this pass."""
        self._plans, self._count, self._ticket, self._lanes = plans, count, ticket, min(lanes, count)
        self._places: dict[int, frozenset[_Place]] = {}
        self._parts: dict[tuple[int, int], dict[int, Tensor]] = {}
        self._sums: dict[tuple[int, int, int], Tensor] = {}
        self._withheld: dict[tuple[int, BlockSpan], Withheld] = {}

    def ran(self, micro: int, legs: Sequence[Leg]) -> None:
        """The forward of one more micro-batch has run there: sums are worth asking for where all of its lane so far went to one server."""
        places = frozenset((part.span, part.kept.peer, part.kept.generation) for leg in legs for part in leg.all_parts())
        lane = self.lane(micro)
        self._places[lane] = self._places.get(lane, places) & places

    def lane(self, micro: int) -> int:
        """To which lane a micro-batch belongs."""
        return micro % self._lanes

    def _members(self, lane: int) -> range:
        return range(lane, self._count, self._lanes)

    def wanted(self, micro: int, span: BlockSpan) -> GradientSum | None:
        """How to ask for the gradients of ``span``: as a sum where all micro-batches of the lane went to one server, and something can be added."""
        lane = self.lane(micro)
        members = self._members(lane)
        sums = len(members) > 1 and any(span == own for own, _, _ in self._places.get(lane, ()))
        sums = sums and any(plan.requires_grad and not plan.axes and plan.blocks.overlap(span) for plan in self._plans)
        return GradientSum(self._ticket + lane, members.index(micro), len(members)) if sums else None

    def collect(self, batch: Batch, leg: Leg, grad_BTH: Tensor, result: SpanResult, span: BlockSpan | None = None) -> None:
        """File what a backward of ``leg``, or of the part ``span`` of it, has returned; ``grad_BTH`` is the gradient by the whole leg's output."""
        for index, block, grad in batch.grads(span or leg.span, result):
            if result.summed and not self._plans[index].axes:
                self._sums[index, block, self.lane(batch.index)] = grad
            else:
                self._parts.setdefault((index, block), {})[batch.index] = grad
        if result.withheld:
            self._withheld.setdefault((batch.index, leg.span), Withheld(batch, leg, grad_BTH))

    def lacking(self) -> list[Withheld]:
        """Backwards whose gradients were held for a sum that never came: a micro-batch went elsewhere meanwhile, or the server is gone."""
        return [
            each
            for each in self._withheld.values()
            if any((*key, self.lane(each.batch.index)) not in self._sums for key in self._shared(each.leg.span))
        ]

    def by_kwarg(self) -> list[Tensor | None]:
        """One gradient for each kwarg, ``None`` where none was asked for.

        Raises:
            NotExact: a micro-batch of some block is not there.
        """
        return [self._one(index, plan) if plan.requires_grad else None for index, plan in enumerate(self._plans)]

    def _one(self, index: int, plan: KwargPlan) -> Tensor:
        axis = plan.axes.get("batch")
        blocks = range(plan.blocks.start, plan.blocks.stop)
        if axis is not None:
            return torch.cat([_fold([self._part(index, block, micro) for block in blocks]) for micro in range(self._count)], dim=axis)
        return _fold([_fold([self._of_lane(index, block, lane) for lane in range(self._lanes)]) for block in blocks])

    def _of_lane(self, index: int, block: int, lane: int) -> Tensor:
        known = self._sums.get((index, block, lane))
        return known if known is not None else _fold([self._part(index, block, micro) for micro in self._members(lane)])

    def _part(self, index: int, block: int, micro: int) -> Tensor:
        part = self._parts.get((index, block), {}).get(micro)
        if part is None:
            raise NotExact(f"the gradient of {self._plans[index].name} for block {block} lacks micro-batch {micro}")
        return part

    def _shared(self, span: BlockSpan) -> list[tuple[int, int]]:
        found = []
        for index, plan in enumerate(self._plans):
            blocks = plan.blocks.overlap(span)
            if plan.requires_grad and not plan.axes and blocks is not None:
                found += [(index, block) for block in range(blocks.start, blocks.stop)]
        return found


def _fold(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
