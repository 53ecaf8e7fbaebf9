"""Tensors on their way from server to server: a call waits for its tensor here, and a delivery for its call."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from swarmtune.errors import WireError
from swarmtune.wire.relay import Delivery, Receive

MAX_TAKEN = 1 << 12
"""Tokens remembered whose call has ended."""
HOLD_S = 2.0
"""How long a delivery waits for the call that it is for, which comes another way and may be slower."""


@dataclass(slots=True)
class _Waiting:
    senders: tuple[str, str]
    size: int
    tensor: asyncio.Future[Tensor]


class Mailbox:
    """Lives on the network's thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._taken: OrderedDict[str, None] = OrderedDict()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    async def receive(self, client: str, wanted: Receive, timeout_s: float) -> Tensor:
        """The tensor that a call of ``client`` waits for.

        Raises:
            WireError: another call waits under this token.
            TimeoutError: it did not come in time.
        """
        if wanted.token in self._waiting:
            raise WireError("two calls wait for one delivery")
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting[wanted.token] = _Waiting((wanted.peer, client), wanted.size, future)
        self._changed.set()
        self._changed = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        finally:
            del self._waiting[wanted.token]
            self._taken[wanted.token] = None
            while len(self._taken) > MAX_TAKEN:
                self._taken.popitem(last=False)

    async def deliver(self, sender: str, delivery: Delivery) -> bool:
        """Hand a tensor to the call that waits for it, or will soon; whether there is one, or was: a confirmation may have been lost.

        Raises:
            WireError: it is not what the call waits for, or from somebody else.
        """
        if delivery.token in self._taken:
            return True
        try:
            async with asyncio.timeout(HOLD_S):
                while (waiting := self._waiting.get(delivery.token)) is None:
                    await self._changed.wait()
        except TimeoutError:
            return False
        if sender not in waiting.senders or delivery.tensor.nbytes != waiting.size:
            raise WireError("a delivery from somebody else, or of another size, than the call waits for")
        if not waiting.tensor.done():
            waiting.tensor.set_result(delivery.tensor)
        return True
