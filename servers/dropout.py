"""Dropout of adapters whose mask is a function of the call, not of a random state.

A server recomputes a forward in its backward, another server may take over, and a batch may be cut into micro-batches and a route into spans: one
step must see one mask. So every bit of a mask follows from (seed of the step, absolute block, site within the block, number of the call within the
step, absolute row of the batch, position within the row), by integer arithmetic that every device and every version of torch does alike.

**The hash.** ``lowbias32`` is Chris Wellons' 32-bit integer hash of that name, found by his "hash prospector": xor-shift 16, multiply by
0x7feb352d, xor-shift 15, multiply by 0x846ca68b, xor-shift 16. BLAKE2b of (seed, block, call, site) gives one 32-bit word, and with the row appended
four more. A *line* is a vector along the last axis. Its number within the row plus a word, hashed, xored with another word, and hashed again is a key
of the line; the four words give it two, ``a`` and ``b``. The key ``c`` of a feature is the hash of its number plus the site's word. The value of an
element is ``lowbias32`` of ``a ^ c`` with ``b`` added after the first multiplication, and without the last xor-shift, which would change its lower 16
bits only. The element is dropped if its value, with the top bit flipped, is below ``p * 2**32``.

**Its limits.** It is a statistical hash and no cipher: masks keep no secrets. ``p`` is met to within ``2**-32``. Two lines of different rows have the
same keys with probability ``2**-64``, lines of one row never; two sites share a word with probability ``2**-32``, but not their lines' keys.
Over 3e8 elements each at p = 0.1 and 0.5 the rates and the correlations of neighbours (1 to 512 features apart, 1 to 64 lines apart, squares of four)
were those of independent draws: of 26 means, the largest lay 2.8 standard errors from zero.

**Rows.** In a tensor of three or more axes the first is the batch, and row ``n`` of a call is row ``first_row + n`` of the batch, so that cutting a
batch moves no mask. All axes but the last are counted as lines, so rows padded on the right keep their masks. A tensor of one or two axes has lost
its rows (the experts of a mixture take flattened tokens): it is one row, number ``first_row``, and its mask goes by the order of its lines in this
call, hence also by the micro-batch in which they came.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # as signed numbers, for torch has no unsigned arithmetic
_CHUNK_CPU, _CHUNK = 1 << 18, 1 << 24
"""Elements hashed at a time: the two int32 buffers fit into the caches of a CPU, and take at most 128 MiB elsewhere (unless one line is longer)."""


@dataclass(frozen=True, slots=True)
class DropoutPlan:
    """What decides the masks of one call. No plan at all means evaluation.

    Attributes:
        seed: of the training step, 0 to 2**64 - 1; the same for all its micro-batches, servers and recomputes.
        first_row: number within the batch of the call's first row.
    """

    seed: int
    first_row: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"a dropout seed must be from 0 to 2**64 - 1, got {self.seed}")
        if not 0 <= self.first_row < 1 << 32:
            raise ValueError(f"the first row of a call must be from 0 to 2**32 - 1, got {self.first_row}")


class SeededDropout(nn.Module):
    """``nn.Dropout`` whose mask follows from the plan of the call; the identity while there is none, whatever ``training`` says.

    A site that is called again within one call (a tuner that drops twice, a layer that runs twice) gets another mask: calls are counted from the
    moment when the plan is set. A recompute is therefore a new ``active``, never a second pass within the same one.
    """

    def __init__(self, p: float, block: int, site: str) -> None:
        """Describe a site.

        Args:
            p: probability to drop an element, 0 to 1.
            block: absolute number of the block.
            site: dotted name within the block.

        Raises:
            ValueError: ``p`` is no probability, or ``block`` is negative.
        """
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"a dropout probability must be from 0 to 1, got {p}")
        if block < 0:
            raise ValueError(f"a block number must not be negative, got {block}")
        self.p, self.block, self.site = p, block, site
        self.plan: DropoutPlan | None = None
        self.calls = 0
        self.gates: tuple[nn.Module, ...] = ()  # in a tuple, because a module would be registered as a child

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` (floating-point, any shape) and scale the others by ``1 / (1 - p)``; the type of ``x`` stays."""
        if self.plan is None:
            return x
        call, self.calls = self.calls, self.calls + 1
        if self.p == 0 or x.numel() == 0:
            return x
        if self.p == 1:
            return x * 0.0
        rows = x.shape[0] if x.dim() > 2 else 1
        keys = site_keys(self.plan, self.block, self.site, call, rows)
        keep = keep_mask(keys, math.prod(x.shape[:-1]) // rows, x.shape[-1] if x.dim() else 1, self.p, x.device)
        return (x * keep.view(x.shape)).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"p={self.p}, block={self.block}, site={self.site}"


def seed_dropouts(layer: nn.Module, block: int) -> list[SeededDropout]:
    """Replace each ``nn.Dropout`` that belongs to a tuner's layer within ``layer`` by a seeded one; those of the frozen body stay.

    Exactly ``nn.Dropout``: what else a tuner may use to be random (its own modules, global random functions) is not looked for here.

    Args:
        layer: block ``block``, with a tuner's layers injected.
        block: its absolute number.

    Returns:
        The new modules, in the order of their names' appearance.
    """
    seeded: dict[nn.Dropout, SeededDropout] = {}
    modules: list[tuple[str, nn.Module]] = list(layer.named_modules())
    for name, tuner in modules:
        if not isinstance(tuner, BaseTunerLayer):
            continue
        for owner_name, owner in _own_modules(tuner, name):
            for child_name, child in list(owner.named_children()):
                if type(child) is not nn.Dropout:
                    continue
                if child not in seeded:
                    seeded[child] = SeededDropout(child.p, block, f"{owner_name}.{child_name}".lstrip("."))
                    seeded[child].training = child.training
                    seeded[child].gates = (tuner,) if isinstance(tuner, LoraLayer) else ()
                setattr(owner, child_name, seeded[child])
    return list(seeded.values())


@contextmanager
def active(dropouts: Sequence[SeededDropout], plan: DropoutPlan | None) -> Iterator[None]:
    """Let ``plan`` decide the masks for the length of one call; ``None`` changes nothing.

    LoRA's variants (DoRA) leave dropout out unless their layer trains, and FRoD unless its dropout does, so meanwhile both are told that they train:
    they alone, not what lies in them. Not thread-safe: one device worker runs a program.

    Raises:
        RuntimeError: a plan is active on one of them already.
    """
    if plan is None:
        yield
        return
    if any(dropout.plan is not None for dropout in dropouts):
        raise RuntimeError("a dropout plan is active already: a program runs one call at a time")
    flags: dict[nn.Module, bool] = {module: module.training for dropout in dropouts for module in (dropout, *dropout.gates)}
    try:
        for dropout in dropouts:
            dropout.plan, dropout.calls = plan, 0
        for module in flags:
            module.training = True
        yield
    finally:
        for dropout in dropouts:
            dropout.plan = None
        for module, training in flags.items():
            module.training = training


def keep_mask(keys: Sequence[int], lines: int, features: int, p: float, device: torch.device) -> Tensor:
    """Which elements are kept: bool, (rows * lines, features), True with probability ``1 - p``.

    Args:
        keys: signed 32-bit words: one of the site, then four of each row.
        lines: per row, 1 to 2**31 - 1.
        features: per line, 1 to 2**31 - 1.
        p: from 0, below 1.
        device: where the mask is computed and wanted.
    """
    keys_4R1 = torch.tensor(keys[1:], dtype=torch.int32, device=device).view(-1, 4).T.contiguous().unsqueeze(-1)
    line_T = torch.arange(lines, dtype=torch.int32, device=device)
    feature_F = torch.arange(features, dtype=torch.int32, device=device)
    words = _mix(torch.cat([(line_T + keys_4R1[:2]).view(-1), feature_F + keys[0]]))
    words_2RT = words[:-features].view(2, -1, lines)
    first_L1, second_L1 = _mix(words_2RT.bitwise_xor_(keys_4R1[2:])).view(2, -1, 1)
    feature_F = words[-features:]
    threshold = min(round(p * (1 << 32)), (1 << 32) - 1) - (1 << 31)
    keep_LF = torch.empty(len(first_L1), features, dtype=torch.bool, device=device)
    step = max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK) // features)
    hashes, spare = torch.empty(2, min(step, len(first_L1)), features, dtype=torch.int32, device=device)
    for start in range(0, len(first_L1), step):
        part = slice(start, start + step)
        count = len(first_L1[part])
        hash_LF, spare_LF = hashes[:count], spare[:count]
        torch.bitwise_xor(first_L1[part], feature_F, out=hash_LF)
        _xor_shift(hash_LF, 16, spare_LF)
        torch.add(second_L1[part], hash_LF, alpha=_FIRST, out=hash_LF)
        _xor_shift(hash_LF, 15, spare_LF)
        hash_LF.mul_(_SECOND)
        torch.ge(hash_LF, threshold, out=keep_LF[part])
    return keep_LF


def site_keys(plan: DropoutPlan, block: int, site: str, call: int, rows: int) -> list[int]:
    """The words that ``keep_mask`` takes, for ``rows`` rows from the plan's first."""
    base = blake2b(struct.pack("<QQQ", plan.seed, block, call) + site.encode(), digest_size=16, person=b"swarmtune/drop/1")
    keys = list(struct.unpack("<i12x", base.digest()))
    for row in range(plan.first_row, plan.first_row + rows):
        of_row = base.copy()
        of_row.update(b"\0" + struct.pack("<Q", row))
        keys.extend(struct.unpack("<4i", of_row.digest()))
    return keys


def _mix(words: Tensor) -> Tensor:
    """``lowbias32`` of each int32, in place."""
    spare = torch.empty_like(words)
    _xor_shift(words, 16, spare)
    _xor_shift(words.mul_(_FIRST), 15, spare)
    _xor_shift(words.mul_(_SECOND), 16, spare)
    return words


def _xor_shift(words: Tensor, bits: int, spare: Tensor) -> None:
    """``words ^= words >> bits`` as if unsigned: torch's shift of int32 copies the sign, which the mask removes."""
    torch.bitwise_right_shift(words, bits, out=spare)
    words.bitwise_xor_(spare.bitwise_and_((1 << 32 - bits) - 1))


def _own_modules(tuner: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A tuner's layer and what lies in it, without the wrapped layer."""
    yield name, tuner
    for child_name, child in tuner.named_children():
        if child_name != "base_layer" and not isinstance(child, BaseTunerLayer):
            yield from _own_modules(child, f"{name}.{child_name}")
