"""What servers have been given: a tensor that all micro-batches share travels once, and is named by the digest of its content after that."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from swarmtune.remote.batch import KwargPlan
from swarmtune.transport.clock import now
from swarmtune.wire.messages import SpanCall

MAX_LOSSES = 3
"""A server that has missed tensors so often gets all of them with every call, as long as the connection lasts."""
TOGETHER_S = 1.0
MAX_KNOWN = 1 << 14
"""Digests remembered for each connection."""


def content_digest(tensor: Tensor) -> str:
    """32 hexadecimal digits of BLAKE2b over element type, shape and bytes."""
    plain = tensor.detach().to("cpu").contiguous()
    made = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)} ".encode(), digest_size=16)
    if plain.numel():
        made.update(plain.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return made.hexdigest()


def digests_of(plans: Sequence[KwargPlan], tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """One per kwarg; ``""`` for those that are cut with the batch, or belong to its positions."""
    return tuple("" if plan.axes else content_digest(tensor) for plan, tensor in zip(plans, tensors, strict=True))


class Uploads:
    """Which digests each server has been sent, over the connection that is open now. Only a hint: a server may have let them go."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], OrderedDict[str, int | None]] = {}
        """``None`` for what has arrived, else the step that is bringing it."""
        self._counted_at: dict[tuple[str, int], float] = {}
        self._losses: Counter[tuple[str, int]] = Counter()

    def by_reference(self, peer: str, generation: int, call: SpanCall, step: int) -> SpanCall:
        """The call without the tensors that this server has, or that another call of the same step is bringing.

        What another step is bringing may never come: that step may have been interrupted.
        """
        for key in [key for key in self._known if key[0] == peer and key[1] != generation]:
            del self._known[key], self._losses[key]
            self._counted_at.pop(key, None)
        if self._losses[peer, generation] >= MAX_LOSSES:
            return without_digests(call)
        known = self._known.setdefault((peer, generation), OrderedDict())
        kwargs = []
        for kwarg in call.kwargs:
            carried = not kwarg.digest or known.get(kwarg.digest, math.nan) not in (None, step)
            kwargs.append(kwarg if carried else replace(kwarg, carried=False))
            if kwarg.digest:
                known[kwarg.digest] = step if carried else known[kwarg.digest]
                known.move_to_end(kwarg.digest)
        while len(known) > MAX_KNOWN:
            known.popitem(last=False)
        return replace(call, kwargs=tuple(kwargs))

    def arrived(self, peer: str, generation: int, call: SpanCall) -> None:
        """A call was answered, so the server has what it carried or named."""
        known = self._known.get((peer, generation), OrderedDict[str, int | None]())
        for kwarg in call.kwargs:
            if kwarg.digest in known:
                known[kwarg.digest] = None

    def failed(self, peer: str, call: SpanCall, step: int) -> None:
        """A call may not have brought what it carried."""
        for (name, _), known in self._known.items():
            if name == peer:
                for kwarg in call.kwargs:
                    if known.get(kwarg.digest) in (None, step):
                        known.pop(kwarg.digest, None)

    def missed(self, peer: str) -> None:
        """A server says that it does not have what it was given; all calls that find it out together count as one loss."""
        for key, known in self._known.items():
            if key[0] == peer:
                known.clear()
                if now() - self._counted_at.get(key, -math.inf) > TOGETHER_S:
                    self._counted_at[key] = now()
                    self._losses[key] += 1


def without_digests(call: SpanCall) -> SpanCall:
    """For a server that keeps no tensors."""
    return replace(call, kwargs=tuple(replace(kwarg, digest="") if kwarg.digest else kwarg for kwarg in call.kwargs))
