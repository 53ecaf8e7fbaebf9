"""What the chain works on: micro-batches, their kwargs, and the legs that they have gone. Pure functions of configuration and batch shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from swarmtune.types import Axis, BlockSpan
from swarmtune.wire.messages import AdapterSpec, CallKwarg, DropoutSeed, SpanCall, SpanResult


@dataclass(frozen=True, slots=True)
class KwargPlan:
    """What is known of a kwarg besides its tensor."""

    name: str
    axes: Mapping[Axis, int]
    blocks: BlockSpan
    requires_grad: bool


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch: its hidden states and its share of the kwargs.

    Attributes:
        digests: of the content of each kwarg that is the same for all micro-batches, ``""`` for others; empty where nothing is kept on servers.
    """

    hidden_BTH: Tensor
    plans: tuple[KwargPlan, ...]
    tensors: tuple[Tensor, ...]
    adapter: AdapterSpec | None
    dropout: DropoutSeed | None = None
    index: int = 0
    digests: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows times sequence length."""
        return self.hidden_BTH.shape[0] * self.hidden_BTH.shape[1]

    def trains(self, span: BlockSpan) -> bool:
        """Whether any kwarg of these blocks needs a gradient."""
        return any(plan.requires_grad and plan.blocks.overlap(span) for plan in self.plans)

    def call(
        self, span: BlockSpan, hidden_BTH: Tensor, model: str, grad_BTH: Tensor | None = None, input_grad: bool = False, keep: bool = False
    ) -> SpanCall:
        """The call that runs ``span``: kwargs are sliced to its blocks, here and on every retry."""
        kwargs = []
        for index in self._of(span):
            plan, blocks = self.plans[index], self.plans[index].blocks.overlap(span)
            assert blocks is not None
            digest = self.digests[index] if self.digests else ""
            kwargs.append(CallKwarg(plan.name, self.tensors[index], plan.axes, blocks, plan.requires_grad, digest))
        adapter = self.adapter if any(kwarg.name.startswith("peft.") for kwarg in kwargs) else None
        dropout = self.dropout if adapter is not None else None
        return SpanCall(span, model, hidden_BTH, tuple(kwargs), adapter, grad_BTH, input_grad, dropout=dropout, keep=keep)

    def grads(self, span: BlockSpan, result: SpanResult) -> Iterator[tuple[int, int, Tensor]]:
        """What a backward of ``span`` returned: index of the kwarg, block, gradient."""
        indices = self._of(span)
        for position, grads in result.kwarg_grads.items():
            blocks = self.plans[indices[position]].blocks.overlap(span)
            assert blocks is not None
            for block, grad in zip(range(blocks.start, blocks.stop), grads, strict=True):
                yield indices[position], block, grad

    def _of(self, span: BlockSpan) -> list[int]:
        return [index for index, plan in enumerate(self.plans) if plan.blocks.overlap(span)]


@dataclass(frozen=True, slots=True)
class KeptGraph:
    """What a forward has left behind.

    Attributes:
        peer: the server.
        handle: its name for it.
        generation: of the connection; the graph does not outlive it.
    """

    peer: str
    handle: int
    generation: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one server of a chain has run."""

    span: BlockSpan
    kept: KeptGraph


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of a route that has run forward.

    Attributes:
        span: its blocks.
        hidden_BTH: what entered them.
        kept: the graph, where its server has kept it.
        parts: of a chain of servers that handed the hidden states on: whose blocks were whose.
        follows: it ran in one chain with the leg before it.
    """

    span: BlockSpan
    hidden_BTH: Tensor
    kept: KeptGraph | None = None
    parts: tuple[Part, ...] = ()
    follows: bool = False

    def all_parts(self) -> tuple[Part, ...]:
        """Whose graphs its blocks left, whether one server ran them or several."""
        return self.parts if self.kept is None else (Part(self.span, self.kept),)

    def graphs(self) -> list[KeptGraph]:
        """All that has been left behind."""
        return [part.kept for part in self.all_parts()]


def chains(legs: Sequence[Leg]) -> list[list[Leg]]:
    """Legs that ran in one chain stand together."""
    found: list[list[Leg]] = []
    for leg in legs:
        if leg.follows:
            found[-1].append(leg)
        else:
            found.append([leg])
    return found


def together(legs: Sequence[Leg]) -> Leg:
    """The legs of one chain as if nothing were known of what went between them."""
    if len(legs) == 1:
        return legs[0]
    span = BlockSpan(legs[0].span.start, legs[-1].span.stop)
    return Leg(span, legs[0].hidden_BTH, parts=tuple(part for leg in legs for part in leg.all_parts()))


def micro_batches(batch: int, sequence: int, tokens: int) -> list[tuple[int, int]]:
    """Cut ``batch`` rows of ``sequence`` tokens into ranges of at most ``tokens`` tokens, as even as possible; at least one row each."""
    rows = max(1, tokens // sequence)
    count = -(-batch // rows)
    base, extra = divmod(batch, count)
    sizes = [base + (index < extra) for index in range(count)]
    return [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]
