"""The backward of a forward whose graph its server has kept: only the gradient travels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swarmtune.errors import WireError
from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message
from swarmtune.wire.messages import MAX_HANDLE, CallKind, GradientSum, block_span, integer, text

_FIELDS = frozenset({"span", "model", "handle", "input_grad", "remaining_ms", "sum"})


@dataclass(frozen=True, slots=True, eq=False)
class KeptCall:
    """Go back through the graph under ``handle``. The answer is that of the whole backward.

    Attributes:
        span: the blocks of the forward.
        model: digest of the model's configuration.
        handle: what the forward's result named, from 1 to 2**53 - 1.
        grad_BTH: gradient of the loss by the output of the last block.
        input_grad: whether the gradient by the input is wanted; the forward must have announced it.
        remaining_ms: how long the caller will still wait.
        sum: see ``SpanCall``.
    """

    span: BlockSpan
    model: str
    handle: int
    grad_BTH: Tensor
    input_grad: bool = False
    remaining_ms: int = 300_000
    sum: GradientSum | None = None

    def to_message(self) -> Message:
        """As it travels."""
        fields: dict[str, object] = {
            "span": [self.span.start, self.span.stop],
            "model": self.model,
            "handle": self.handle,
            "input_grad": self.input_grad,
            "remaining_ms": self.remaining_ms,
        }
        if self.sum is not None:
            fields["sum"] = self.sum.to_json()
        return Message(CallKind.KEPT_BACKWARD, fields, {"grad": self.grad_BTH})

    @classmethod
    def from_message(cls, message: Message) -> KeptCall:
        """Check a peer's message.

        Raises:
            WireError: anything missing, superfluous, of the wrong type or shape.
        """
        fields, tensors = message.fields, dict(message.tensors)
        if unknown := set(fields) - _FIELDS:
            raise WireError(f"a call holds a field that this server does not know, update the older of the two sides: {sorted(unknown)[0]!r:.80}")
        grad = tensors.pop("grad", None)
        if grad is None or tensors or grad.dim() != 3 or not grad.is_floating_point() or 0 in grad.shape:
            raise WireError("a backward of a kept graph needs one floating-point tensor 'grad' of shape (batch, sequence, hidden), and nothing else")
        input_grad = fields.get("input_grad", False)
        if not isinstance(input_grad, bool):
            raise WireError("input_grad must be true or false")
        return cls(
            span=block_span(fields.get("span"), "span"),
            model=text(fields.get("model"), "model"),
            handle=integer(fields.get("handle"), "handle", 1, MAX_HANDLE),
            grad_BTH=grad,
            input_grad=input_grad,
            remaining_ms=integer(fields.get("remaining_ms"), "remaining_ms", 1, 1 << 32),
            sum=GradientSum.from_json(fields.get("sum")),
        )
