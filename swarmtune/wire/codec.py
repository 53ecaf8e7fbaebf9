"""Message to ``Encoded`` and ``Incoming`` to message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swarmtune.errors import WireError
from swarmtune.wire.frames import Encoded, Incoming, WireLimits, dump_json, padding
from swarmtune.wire.tensors import TensorSpec, tensor_bytes, tensor_from


@dataclass(frozen=True, slots=True)
class Message:
    """A kind, plain fields, and named tensors in order."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def encode(message: Message, limits: WireLimits | None = None, answer_bytes: int | None = None) -> Encoded:
    """Prepare ``message`` for sending. Contiguous CPU tensors are not copied and must stay unchanged until sent.

    Raises:
        WireError: a tensor's type does not travel, or the message is over the limits of a receiver.
    """
    limits = limits or WireLimits()
    specs = [TensorSpec.of(name, tensor) for name, tensor in message.tensors.items()]
    header = dump_json({"kind": message.kind, "fields": message.fields, "tensors": [spec.to_json() for spec in specs]})
    size = sum(spec.padded_bytes for spec in specs)
    if len(header) > limits.header_bytes or len(specs) > limits.tensors or size > limits.message_bytes:
        raise WireError(
            f"a {message.kind} message of {len(specs)} tensors and {size} bytes is over the limits ({limits.tensors} tensors, "
            f"{limits.message_bytes} bytes): use a smaller batch or a smaller micro_batch_tokens"
        )
    parts: list[memoryview] = []
    for spec, tensor in zip(specs, message.tensors.values(), strict=True):
        raw = tensor_bytes(tensor)
        if len(raw):
            parts.append(raw)
        if gap := padding(spec.payload_bytes, spec.padded_bytes):
            parts.append(gap)
    return Encoded(header, tuple(parts), answer_bytes)


def decode(incoming: Incoming) -> Message:
    """Read a complete message; its tensors share the received buffer.

    Raises:
        WireError: the header does not hold exactly a kind and fields.
    """
    kind, fields = incoming.header.get("kind"), incoming.header.get("fields")
    if len(incoming.header) != 2 or not isinstance(kind, str) or not 0 < len(kind) <= 64 or not isinstance(fields, dict):
        raise WireError("a message header must hold a kind and fields, and nothing else")
    tensors, offset = {}, 0
    for spec in incoming.specs:
        tensors[spec.name] = tensor_from(spec, incoming.body, offset)
        offset += spec.padded_bytes
    return Message(kind, fields, tensors)
