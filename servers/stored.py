"""Tensors that clients have sent before, by the digest of their content, so that an adapter travels once per optimizer step."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor

MAX_STORED_BYTES = 1 << 30
"""Of all clients; where it is full, whoever holds most loses what it used least recently."""
MAX_STORED = 1 << 16
"""Tensors of all clients."""
MAX_MISSED = 1 << 12
"""Digests of one client remembered as let go."""
HOLD_S = 5.0
"""How long a call waits for tensors that another message of its client may be bringing."""


class StoredTensors:
    """By client and digest. Lives on the network's thread; what it hands out stays valid whatever is let go."""

    def __init__(self, budget_bytes: int = MAX_STORED_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self._stored: dict[str, OrderedDict[str, Tensor]] = {}
        self._bytes: dict[str, int] = {}
        self._missed: dict[str, OrderedDict[str, None]] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return sum(len(own) for own in self._stored.values())

    @property
    def held_bytes(self) -> int:
        """Of all tensors."""
        return sum(self._bytes.values())

    def put(self, client: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep copies, which do not hold the message alive that brought them."""
        own = self._stored.setdefault(client, OrderedDict())
        for digest, tensor in tensors.items():
            if digest in own:
                own.move_to_end(digest)
                continue
            own[digest] = tensor.clone()
            self._bytes[client] = self._bytes.get(client, 0) + tensor.nbytes
            self._missed.get(client, OrderedDict[str, None]()).pop(digest, None)
            while self.held_bytes > self.budget_bytes or len(self) > MAX_STORED:
                self._let_one_go()
        self._changed.set()
        self._changed = asyncio.Event()

    def get(self, client: str, digests: Sequence[str]) -> dict[str, Tensor]:
        """Those of ``digests`` that are here; they count as used now."""
        own = self._stored.get(client, OrderedDict[str, Tensor]())
        found = {digest: own[digest] for digest in digests if digest in own}
        for digest in found:
            own.move_to_end(digest)
        return found

    async def wait_for(self, client: str, digests: Sequence[str], timeout_s: float) -> dict[str, Tensor]:
        """The same, as soon as all are here: the message that brings them may still be coming in.

        What has not come in time is left out; what has been let go is not waited for.
        """
        found = self.get(client, digests)
        try:
            async with asyncio.timeout(timeout_s):
                while len(found) < len(set(digests)) and self._missed.get(client, {}).keys().isdisjoint(digests):
                    await self._changed.wait()
                    found = self.get(client, digests)
        except TimeoutError:
            pass
        return found

    def forget(self, client: str) -> None:
        """Let go all of a client that has gone."""
        self._stored.pop(client, None)
        self._bytes.pop(client, None)
        self._missed.pop(client, None)

    def _let_one_go(self) -> None:
        by_count = len(self) > MAX_STORED  # who fills what is full loses
        client = max(self._stored, key=lambda name: len(self._stored[name]) if by_count else self._bytes.get(name, 0))
        digest, tensor = self._stored[client].popitem(last=False)
        self._bytes[client] -= tensor.nbytes
        missed = self._missed.setdefault(client, OrderedDict())
        missed[digest] = None
        while len(missed) > MAX_MISSED:
            missed.popitem(last=False)
