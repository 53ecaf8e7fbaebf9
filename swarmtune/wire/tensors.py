"""Tensors as raw little-endian bytes: type codes, declared sizes, views without copies."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import torch
from torch import Tensor

from swarmtune.errors import WireError

ALIGNMENT = 64
"""Each tensor of a body starts at a multiple of this many bytes, so that a received buffer can be used in place."""
MAX_RANK = 8
MAX_NAME = 512
MAX_DIMENSION = 1 << 40


class WireDtype(IntEnum):
    """Codes of the element types that may travel."""

    FLOAT32 = 1
    FLOAT64 = 2
    FLOAT16 = 3
    BFLOAT16 = 4
    INT64 = 5
    INT32 = 6
    INT8 = 7
    UINT8 = 8
    BOOL = 9


_TORCH = {
    WireDtype.FLOAT32: torch.float32,
    WireDtype.FLOAT64: torch.float64,
    WireDtype.FLOAT16: torch.float16,
    WireDtype.BFLOAT16: torch.bfloat16,
    WireDtype.INT64: torch.int64,
    WireDtype.INT32: torch.int32,
    WireDtype.INT8: torch.int8,
    WireDtype.UINT8: torch.uint8,
    WireDtype.BOOL: torch.bool,
}
_CODES = {dtype: code for code, dtype in _TORCH.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header declares about one tensor of the body."""

    name: str
    dtype: WireDtype
    shape: tuple[int, ...]

    @property
    def payload_bytes(self) -> int:
        """Size of the raw data, without padding."""
        return math.prod(self.shape) * _TORCH[self.dtype].itemsize

    @property
    def padded_bytes(self) -> int:
        """Size in the body, padding included."""
        return -(-self.payload_bytes // ALIGNMENT) * ALIGNMENT

    def to_json(self) -> list[object]:
        """``[name, dtype code, [dimensions]]``."""
        return [self.name, int(self.dtype), list(self.shape)]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """Describe ``tensor``.

        Raises:
            WireError: its dtype has no code, or its rank or name is out of bounds.
        """
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise WireError(
                f"tensor {name} has dtype {tensor.dtype}, which does not travel; use one of {', '.join(d.name.lower() for d in WireDtype)}"
            )
        return cls.from_json([name, int(code), list(tensor.shape)])

    @classmethod
    def from_json(cls, item: object) -> TensorSpec:
        """Check one entry of a header, allocating nothing.

        Raises:
            WireError: it is not a name, a known type code and at most eight non-negative dimensions.
        """
        if not isinstance(item, list) or len(item) != 3:
            raise WireError("a tensor entry must be [name, dtype, shape]")
        name, code, shape = item
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise WireError(f"a tensor's name must have 1 to {MAX_NAME} characters")
        if type(code) is not int or code not in WireDtype._value2member_map_:
            raise WireError(f"tensor {name!r}: unknown dtype code {code!r:.40}")
        if not isinstance(shape, list) or len(shape) > MAX_RANK:
            raise WireError(f"tensor {name!r}: a shape must be a list of at most {MAX_RANK} dimensions")
        if any(type(dimension) is not int or not 0 <= dimension <= MAX_DIMENSION for dimension in shape):
            raise WireError(f"tensor {name!r}: dimensions must be integers from 0 to 2**40")
        if math.prod(max(1, dimension) for dimension in shape) > MAX_DIMENSION:  # an empty tensor too: its strides would overflow
            raise WireError(f"tensor {name!r}: its dimensions multiply to more than 2**40")
        return cls(name, WireDtype(code), tuple(shape))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of ``tensor``: a view where it is contiguous on the CPU, one copy otherwise.

    The view shares memory with ``tensor``, which must stay unchanged until the bytes have been sent.
    """
    if sys.byteorder != "little":
        raise WireError("swarmtune needs a little-endian machine")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def allocate(size: int) -> memoryview:
    """A writable buffer of ``size`` bytes for a body.

    Its pages cost memory only once data arrive, and its tensors lie at whole multiples of ``ALIGNMENT``: some kernels give other last bits elsewhere.

    Raises:
        WireError: there is not so much memory.
    """
    if not size:
        return memoryview(bytearray())
    try:
        return memoryview(cast(Any, torch.empty(size, dtype=torch.uint8).numpy()))
    except RuntimeError as error:
        raise WireError(f"there is no memory for a message of {size} bytes") from error


def tensor_from(spec: TensorSpec, buffer: memoryview, offset: int) -> Tensor:
    """A tensor over ``buffer[offset:]`` without a copy; it owns a reference to ``buffer``."""
    dtype = _TORCH[spec.dtype]
    count = spec.payload_bytes // dtype.itemsize
    if count == 0:
        return torch.empty(spec.shape, dtype=dtype)
    if spec.dtype is WireDtype.BOOL:  # a byte other than 0 and 1 under torch.bool is undefined behaviour
        return torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=offset).view(spec.shape) != 0
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(spec.shape)
