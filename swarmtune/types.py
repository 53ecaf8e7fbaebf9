"""The values that cross doors: spans of blocks, named arguments, and the order of work.

Shape suffixes used throughout: B batch, T sequence, H hidden size, V vocabulary, R adapter rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from swarmtune.errors import KwargError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["batch", "sequence"]
AXES: tuple[Axis, ...] = ("batch", "sequence")


@dataclass(frozen=True, slots=True, order=True)
class BlockSpan:
    """Blocks ``start:stop``, half-open, as everywhere in swarmtune."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise UsageError(f"a block span must satisfy 0 <= start < stop, got {self.start}:{self.stop}")

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.stop

    def covers(self, other: BlockSpan) -> bool:
        """Whether every block of ``other`` is in this span."""
        return self.start <= other.start and other.stop <= self.stop

    def overlap(self, other: BlockSpan) -> BlockSpan | None:
        """The blocks in both spans, or ``None`` where they share none."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return BlockSpan(start, stop) if start < stop else None

    @classmethod
    def parse(cls, text: object) -> BlockSpan:
        """Read ``"4:8"``.

        Raises:
            UsageError: anything else, YAML's sexagesimal integers included.
        """
        if not isinstance(text, str):
            raise UsageError(f'blocks must be a quoted string such as "4:8", got {text!r} (unquoted, YAML reads 4:8 as 248)')
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
        if match is None:
            raise UsageError(f'blocks must look like "4:8" (half-open: blocks 4, 5, 6, 7), got {text!r}')
        return cls(int(match[1]), int(match[2]))


def gaps(spans: Iterable[BlockSpan], num_blocks: int) -> tuple[BlockSpan, ...]:
    """The maximal spans of ``0:num_blocks`` that none of ``spans`` covers, ascending."""
    found, reached = [], 0
    for span in sorted(spans):
        if span.start > reached:
            found.append(BlockSpan(reached, min(span.start, num_blocks)))
        reached = max(reached, span.stop)
        if reached >= num_blocks:
            break
    if reached < num_blocks:
        found.append(BlockSpan(reached, num_blocks))
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Kwarg:
    """One named argument for the blocks; differentiable when ``tensor`` requires a gradient.

    Attributes:
        name: an argument of the library's own forward (``attention_mask``, ``position_ids``), or
            ``peft.<config digest>.<parameter name within the block>``, ``param.<parameter name within the block>``, ``prompt``.
        tensor: the value; its gradient comes back from the servers.
        axes: which dimension is ``batch`` and which is ``sequence``; ``{}`` means shared by the whole batch.
        blocks: ``"i:j"``, a block number, or ``None`` for all blocks; absolute numbers.
    """

    name: str
    tensor: Tensor
    axes: Mapping[Axis, int] = field(default_factory=dict)
    blocks: str | int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 512 or not self.name.isprintable():
            raise KwargError(f"a kwarg's name must be 1 to 512 printable characters, got {self.name!r:.100}")
        if not callable(getattr(self.tensor, "dim", None)) or str(self.tensor.layout) != "torch.strided" or self.tensor.is_meta:
            raise KwargError(f"kwarg {self.name[:80]}: its value must be a dense tensor with data, got {type(self.tensor).__name__}")
        if not isinstance(self.axes, Mapping):
            raise KwargError(f'kwarg {self.name}: axes must be a mapping such as {{"batch": 0}}, got {self.axes!r:.80}')
        rank = self.tensor.dim()
        for axis, dimension in self.axes.items():
            if axis not in AXES:
                raise KwargError(f'kwarg {self.name}: axes may be "batch" and "sequence", got {axis!r}')
            if not isinstance(dimension, int) or not 0 <= dimension < rank:
                raise KwargError(f"kwarg {self.name}: {axis} axis {dimension!r} is outside a tensor of shape {tuple(self.tensor.shape)}")
        if len(set(self.axes.values())) != len(self.axes):
            raise KwargError(f"kwarg {self.name}: batch and sequence cannot be the same axis, got {dict(self.axes)}")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, str | int | None):
            raise KwargError(f'kwarg {self.name}: blocks must be "i:j", a block number or None, got {self.blocks!r}')

    def span(self, num_blocks: int) -> BlockSpan:
        """The blocks that this kwarg is for.

        Raises:
            KwargError: they are not all blocks of the model.
        """
        try:
            if self.blocks is None:
                return BlockSpan(0, num_blocks)
            found = BlockSpan(self.blocks, self.blocks + 1) if isinstance(self.blocks, int) else BlockSpan.parse(self.blocks)
        except UsageError as error:
            raise KwargError(f"kwarg {self.name}: {error}") from error
        if found.stop > num_blocks:
            raise KwargError(f"kwarg {self.name}: blocks {found} reach outside the model, which has blocks 0:{num_blocks}")
        return found


MAX_LANES = 64
"""Routes over which micro-batches go in turns."""


class Copies(StrEnum):
    """Of what servers hand on to each other: whether the client gets it, too, so that it need not be computed again for a backward."""

    NONE = "none"
    AUTO = "auto"
    """Where a server has lost a graph, or keeps none."""
    ALL = "all"


class Pipeline(StrEnum):
    """How training overlaps micro-batches; the result depends on it as far as sums of other shapes round otherwise."""

    ONE_F_ONE_B = "1f1b"
    """Each goes back as soon as it has come forward (Narayanan et al. 2019, PipeDream); head and loss are computed for one at a time."""
    GPIPE = "gpipe"
    """All go forward, then head and loss are computed for all of them, then all go back (Huang et al. 2019, GPipe)."""
