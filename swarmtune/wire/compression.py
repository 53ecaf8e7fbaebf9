"""Codecs: hidden states and gradients in fewer bytes. Not exact, so never used unless asked for.

Every codec gives back what it was given once it has been through it: to compress a second time changes nothing. So a boundary that a client holds,
and sends again after a failure, is the one that its servers computed with.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor

from swarmtune.errors import WireError
from swarmtune.wire.codec import Message
from swarmtune.wire.frames import WireLimits

BLOCK = 64
"""Values of one block of int8, which share a power of two."""
LARGEST_INT8 = 127
NOT_FINITE = 127
"""In the place of an exponent: the block held a NaN or an infinity, and all of it becomes NaN."""
MAX_EXPONENT = 126
HALF_EXPONENT = 15
"""The largest value is brought below 2 to this power before it becomes float16."""
SCALE = ".scale"
COMPRESSED = ("hidden", "grad", "tensor")
"""The tensors of a message that may travel so."""
INLINE_BYTES = 1 << 18
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


class Codec(StrEnum):
    """How a floating-point tensor travels.

    ``bf16`` rounds to bfloat16. ``fp16`` rounds to float16 after one power of two for the whole tensor has been taken out. ``int8`` rounds each block
    of 64 values to whole multiples of the smallest power of two with which they fit into 8 bits.
    """

    NONE = "none"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"


def feature(codec: Codec) -> str:
    """What a server is called that knows ``codec``."""
    return f"codec_{codec}"


def squeeze(message: Message, codecs: Mapping[str, Codec]) -> Message:
    """The message with the named tensors compressed; its ``codecs`` field says which, and what they were."""
    tensors: dict[str, Tensor] = {}
    said = {}
    for name, tensor in message.tensors.items():
        codec = codecs.get(name, Codec.NONE)
        if codec is Codec.NONE or not tensor.is_floating_point():
            tensors[name] = tensor
            continue
        said[name] = [str(codec), str(tensor.dtype).removeprefix("torch.")]
        tensors[name], scale = compress(tensor, codec)
        if scale is not None:
            tensors[name + SCALE] = scale
            said[name].append(list(tensor.shape))  # type: ignore[arg-type]
    return replace(message, fields={**message.fields, "codecs": said}, tensors=tensors) if said else message


def expand(message: Message) -> Message:
    """What ``squeeze`` was given, as far as the codec lets it.

    Raises:
        WireError: a codec that is not known here, or parts that do not fit it.
    """
    said = message.fields.get("codecs")
    if said is None:
        return message
    if not isinstance(said, dict) or not 0 < len(said) <= 4:
        raise WireError("codecs must be an object of at most 4 tensors")
    tensors, total = dict(message.tensors), 0
    for name, entry in said.items():
        if not isinstance(entry, list) or len(entry) not in (2, 3) or not all(isinstance(part, str) for part in entry[:2]):
            raise WireError("a codec must be [codec, type] or have a shape as well")
        if entry[0] not in Codec._value2member_map_ or entry[1] not in _TYPES or name not in COMPRESSED or name not in tensors:
            raise WireError(f"no codec {entry[0]!r:.40} for a tensor {name!r:.40} of type {entry[1]!r:.40} is known here: use swarm.codec=none")
        scale = tensors.pop(name + SCALE, None)
        tensors[name] = restore(tensors[name], scale, Codec(entry[0]), _TYPES[entry[1]], entry[2] if len(entry) == 3 else None)
        total += tensors[name].nbytes
        _check_size(total, torch.int8)
    return replace(message, fields={key: value for key, value in message.fields.items() if key != "codecs"}, tensors=tensors)


async def squeezed(message: Message, codecs: Mapping[str, Codec]) -> Message:
    """``squeeze``, large tensors beside the event loop."""
    if all(codec is Codec.NONE for codec in codecs.values()):
        return message
    large = sum(message.tensors[name].nbytes for name in codecs if name in message.tensors) > INLINE_BYTES
    return await asyncio.to_thread(squeeze, message, codecs) if large else squeeze(message, codecs)


async def expanded(message: Message) -> Message:
    """``expand``, large tensors beside the event loop."""
    said = message.fields.get("codecs")
    if said is None:
        return message
    large = isinstance(said, dict) and sum(message.tensors[name].nbytes for name in said if name in message.tensors) > INLINE_BYTES
    return await asyncio.to_thread(expand, message) if large else expand(message)


def codec_of(value: object) -> Codec:
    """A codec that a peer asks for.

    Raises:
        WireError: it is not known here.
    """
    if not isinstance(value, str) or value not in Codec._value2member_map_:
        raise WireError(f"no codec {value!r:.40} is known here: use swarm.codec=none, or update the older of the two sides")
    return Codec(str(value))


def compress(tensor: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """A tensor as it travels, and the exponents that belong to it; on the CPU."""
    plain = tensor.detach().to("cpu")
    if codec is Codec.BF16:
        return plain.to(torch.bfloat16), None
    values = plain.to(torch.float32).contiguous()
    if codec is Codec.FP16:
        return _to_half(values)
    return _to_int8(values)


def restore(parts: Tensor, scale: Tensor | None, codec: Codec, dtype: torch.dtype, shape: object) -> Tensor:
    """A tensor from its parts.

    Raises:
        WireError: the parts do not fit the codec.
    """
    if codec is Codec.BF16 and scale is None and shape is None and parts.dtype is torch.bfloat16:
        _check_size(parts.numel(), dtype)
        return parts.to(dtype)
    sizes = shape if isinstance(shape, list) and len(shape) <= 8 and all(type(size) is int and 0 <= size < 1 << 31 for size in shape) else None
    if sizes is None or scale is None:
        raise WireError(f"what came does not fit the codec {codec}")
    _check_size(math.prod(max(1, size) for size in sizes), dtype)  # torch multiplies the others, too, where one is 0
    count = math.prod(sizes)
    if codec is Codec.FP16 and parts.dtype is torch.float16 and list(parts.shape) == sizes and scale.dtype is torch.int32 and scale.numel() == 1:
        return torch.ldexp(parts.to(torch.float32), scale.clamp(-300, 300)).to(dtype)
    blocks = -(-count // BLOCK)
    if codec is Codec.INT8 and parts.dtype is scale.dtype is torch.int8 and parts.shape == (count,) and scale.shape == (blocks,):
        padded = torch.nn.functional.pad(parts, (0, blocks * BLOCK - count)).view(blocks, BLOCK).to(torch.float32)
        values = torch.ldexp(padded, scale.to(torch.int32).unsqueeze(1))
        values[scale == NOT_FINITE] = torch.nan
        largest = torch.finfo(dtype).max  # a block's rounding can reach beyond it; NaN stays
        return values.clamp(-largest, largest).view(-1)[:count].view(sizes).to(dtype)
    raise WireError(f"what came does not fit the codec {codec}")


def _check_size(count: int, dtype: torch.dtype) -> None:
    """What a message becomes is bounded like what it is."""
    if count * dtype.itemsize > WireLimits().message_bytes:
        raise WireError(f"a compressed tensor of {count} values is over the limit of {WireLimits().message_bytes} bytes")


def _to_half(values: Tensor) -> tuple[Tensor, Tensor]:
    sizes = values.abs()
    peak = float(torch.where(sizes < math.inf, sizes, 0.0).amax()) if values.numel() else 0.0  # of what is finite
    exponent = 0
    if peak > 0:
        exponent = int(torch.frexp(torch.tensor(peak)).exponent) - HALF_EXPONENT
    half = torch.ldexp(values, torch.tensor(-exponent)).to(torch.float16)
    if (
        peak > 0 and float(torch.where(sizes < math.inf, half.abs(), 0.0).amax()) == 2.0**HALF_EXPONENT
    ):  # rounded up: a second time it would be scaled otherwise
        exponent += 1
        half = torch.ldexp(values, torch.tensor(-exponent)).to(torch.float16)
    return half, torch.tensor([exponent], dtype=torch.int32)


def _to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    count = values.numel()
    blocks = -(-count // BLOCK)
    padded = torch.nn.functional.pad(values.view(-1), (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    peak = padded.abs().amax(dim=1) if blocks else padded.new_zeros(0)
    mantissa, exponent = torch.frexp(peak / LARGEST_INT8)
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    finite = torch.isfinite(peak)
    whole = torch.ldexp(padded, -exponent.unsqueeze(1)).round().clamp(-LARGEST_INT8, LARGEST_INT8)
    whole = torch.where(finite.unsqueeze(1), whole, torch.zeros_like(whole))
    scale = torch.where(finite, exponent, torch.full_like(exponent, NOT_FINITE)).to(torch.int8)
    return whole.to(torch.int8).view(-1)[:count].contiguous(), scale
