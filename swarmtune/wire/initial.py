"""A call for first values that depend on body weights: of a tuner's tensors, or of the body's own parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swarmtune.errors import WireError
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message
from swarmtune.wire.messages import AdapterSpec, CallKind, block_span, integer, text
from swarmtune.wire.tensors import ALIGNMENT

_INITIAL_FIELDS = frozenset({"span", "model", "names", "remaining_ms", "adapter"})
MAX_INITIAL = 4096
"""Most values that one call may ask for."""
MAX_RNG_BYTES = 16384
MAX_ELEMENT_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class InitialCall:
    """Ask for first values that depend on body weights.

    Attributes:
        span: the blocks that are asked about.
        model: digest of the model's configuration.
        names: block and name of each value: ``param.<name within the block>``, or a tuner's tensor as it travels.
        adapter: the tuner, where its tensors are asked for.
        rng: state of the client's random generator before the tuner was made, where its first values depend on random numbers too.
        remaining_ms: how long the caller will still wait.
        shapes: what the caller expects, value by value; they stay with it.
    """

    span: BlockSpan
    model: str
    names: tuple[tuple[int, str], ...]
    adapter: AdapterSpec | None = None
    rng: Tensor | None = None
    remaining_ms: int = 300_000
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def answer_bytes(self) -> int:
        """Largest body of an honest answer."""
        return sum(-(-math.prod(shape) * MAX_ELEMENT_BYTES // ALIGNMENT) * ALIGNMENT for shape in self.shapes)

    def to_message(self) -> Message:
        """As it travels."""
        fields: dict[str, Any] = {
            "span": [self.span.start, self.span.stop],
            "model": self.model,
            "names": [[block, name] for block, name in self.names],
            "remaining_ms": self.remaining_ms,
        }
        if self.adapter is not None:
            fields["adapter"] = dict(self.adapter.config)
        return Message(CallKind.INITIAL, fields, {} if self.rng is None else {"rng": self.rng})

    @classmethod
    def from_message(cls, message: Message) -> InitialCall:
        """Check a peer's message.

        Raises:
            WireError: anything missing, superfluous or of the wrong type.
        """
        fields, tensors = message.fields, dict(message.tensors)
        if unknown := set(fields) - _INITIAL_FIELDS:
            raise WireError(f"a call holds a field that this server does not know, update the older of the two sides: {sorted(unknown)[0]!r:.80}")
        rng = tensors.pop("rng", None)
        if tensors or (rng is not None and (str(rng.dtype) != "torch.uint8" or rng.dim() != 1 or rng.numel() > MAX_RNG_BYTES)):
            raise WireError("a call for first values may bring the state of a random generator, and nothing else")
        span, names = block_span(fields.get("span"), "span"), fields.get("names")
        if not isinstance(names, list) or not 0 < len(names) <= MAX_INITIAL or not all(isinstance(name, list) and len(name) == 2 for name in names):
            raise WireError(f"a call for first values must name 1 to {MAX_INITIAL} of them as [block, name]")
        checked = tuple((integer(block, "a block", span.start, span.stop - 1), text(name, "a value's name", 512)) for block, name in names)
        if len(set(checked)) != len(checked):
            raise WireError("a call for first values must name each of them once")
        adapter = fields.get("adapter")
        return cls(
            span=span,
            model=text(fields.get("model"), "model"),
            names=checked,
            adapter=None if adapter is None else AdapterSpec.from_json(adapter),
            rng=rng,
            remaining_ms=integer(fields.get("remaining_ms"), "remaining_ms", 1, 1 << 32),
        )


@dataclass(frozen=True, slots=True, eq=False)
class InitialResult:
    """The values asked for, in order."""

    values: tuple[Tensor, ...]

    def to_message(self) -> Message:
        """As it travels: tensors ``v0``, ``v1``..."""
        return Message("values", {}, {f"v{index}": value for index, value in enumerate(self.values)})

    @classmethod
    def from_message(cls, message: Message, call: InitialCall) -> InitialResult:
        """Check a reply against the call that it answers.

        Raises:
            WireError: not exactly one finite tensor for each name.
        """
        tensors = dict(message.tensors)
        if message.kind != "values" or set(tensors) != {f"v{index}" for index in range(len(call.names))}:
            raise WireError("expected one value for each name")
        values = tuple(tensors[f"v{index}"] for index in range(len(call.names)))
        for (block, name), value, shape in zip(call.names, values, call.shapes, strict=True):
            if tuple(value.shape) != shape or (value.is_floating_point() and not bool(torch.isfinite(value).all())):
                raise WireError(f"the first value of {name} in block {block} has shape {tuple(value.shape)}, expected {shape}, or is not finite")
        return cls(values)
