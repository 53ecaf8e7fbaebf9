"""Gradients of micro-batches, held until all of a pass are here, and then added in their order: they travel once per backward."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor

from swarmtune.errors import KwargError
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import GradientSum

MAX_HELD_BYTES = 1 << 30
"""Of all clients; where it is full, gradients are returned with their calls."""
MAX_PASSES = 64
"""Of one client; the oldest goes."""
TTL_S = 600.0


@dataclass(slots=True)
class _Pass:
    began: float
    grads: dict[int, Mapping[int, Tensor]] = field(default_factory=dict)

    def like(self, grads: Mapping[int, Tensor]) -> bool:
        """Whether these can be added to what is here."""
        first = next(iter(self.grads.values()), grads)
        return {index: (grad.shape, grad.dtype) for index, grad in first.items()} == {
            index: (grad.shape, grad.dtype) for index, grad in grads.items()
        }


class Sums:
    """By client, ticket and span. The device worker adds; the network's thread lets clients go."""

    def __init__(self, budget_bytes: int = MAX_HELD_BYTES) -> None:
        self.budget_bytes, self.ttl_s = budget_bytes, TTL_S
        self._lock = Lock()
        self._held: dict[str, OrderedDict[tuple[int, int, BlockSpan], _Pass]] = {}
        self._bytes: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """Of all gradients."""
        with self._lock:
            return sum(self._bytes.values())

    def add(self, client: str, span: BlockSpan, wanted: GradientSum, grads: Mapping[int, Tensor]) -> Mapping[int, Tensor] | None:
        """Hold the gradients of one micro-batch; once all are here, their sums, which are held no more.

        Each sum is the left fold over the micro-batches in ascending order, whatever the order in which they came. A micro-batch that comes
        twice counts once.

        Returns:
            The sums; nothing where some micro-batches are still to come.

        Raises:
            NoRoom: these cannot be held.
            KwargError: the micro-batches of the pass do not have the same kwargs.
        """
        size = sum(grad.nbytes for grad in grads.values())
        with self._lock:
            self._expire()
            own = self._held.setdefault(client, OrderedDict())
            key = (wanted.ticket, wanted.count, span)
            place = own.setdefault(key, _Pass(time.monotonic()))
            if not place.like(grads):
                raise KwargError(f"the gradients of micro-batch {wanted.index} are not those of the same kwargs as the others' of its pass")
            if wanted.index not in place.grads:
                to_come = wanted.count - 1 - len(place.grads)  # all but the last are held
                if to_come and sum(self._bytes.values()) + size * to_come > self.budget_bytes:
                    if not place.grads:
                        del own[key]
                    raise NoRoom
                place.grads[wanted.index] = grads
                self._bytes[client] = self._bytes.get(client, 0) + size
            if len(place.grads) < wanted.count:
                while len(own) > MAX_PASSES:
                    self._drop(client, next(iter(own)))
                return None
            self._drop(client, key)
        ordered = [place.grads[index] for index in sorted(place.grads)]
        totals = dict(ordered[0])
        for more in ordered[1:]:
            totals = {index: total + more[index] for index, total in totals.items()}
        return totals

    def forget(self, client: str) -> None:
        """Let go all of a client that has gone."""
        with self._lock:
            self._held.pop(client, None)
            self._bytes.pop(client, None)

    def expire(self) -> None:
        """Let go what is too old."""
        with self._lock:
            self._expire()

    def _drop(self, client: str, key: tuple[int, int, BlockSpan]) -> None:
        dropped = self._held[client].pop(key)
        self._bytes[client] = self._bytes.get(client, 0) - sum(grad.nbytes for grads in dropped.grads.values() for grad in grads.values())

    def _expire(self) -> None:
        before = time.monotonic() - self.ttl_s
        for client, own in list(self._held.items()):
            for key in [key for key, place in own.items() if place.began < before]:
                self._drop(client, key)


class NoRoom(Exception):
    """The gradients go back with their call instead."""
