"""Graphs that forwards leave behind for their backwards, under handles: bounded in bytes and in time, and never needed for a right result."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from servers.gradients import Graph
from swarmtune.errors import SwarmError


class GraphGone(SwarmError):
    """The graph that a backward asks for is not here: it was used, evicted, too old, or of another client."""


class Tape:
    """Counts the bytes that autograd keeps during a forward, each storage once; from the limit on, nothing is kept.

    Attributes:
        held_bytes: so far.
        full: the limit was passed, so the graph cannot be used.
    """

    def __init__(self, limit_bytes: int, frozen: frozenset[int]) -> None:
        self._limit_bytes, self._frozen = limit_bytes, frozen
        self._seen: set[int] = set()
        self.held_bytes, self.full = 0, limit_bytes <= 0

    def count(self, tensor: Tensor) -> None:
        """Count a tensor that stays alive with the graph."""
        if tensor.layout is torch.sparse_coo:
            self.count(tensor._indices())
            self.count(tensor._values())
            return
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._frozen and address not in self._seen:
            self._seen.add(address)
            self.held_bytes += storage.nbytes()
            self.full = self.full or self.held_bytes > self._limit_bytes

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, what autograd saves is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int] | None:
        if not self.full:
            self.count(tensor)
        # Without its own graph: else an output that its own operation saves would keep itself alive.
        return None if self.full else (tensor.detach(), tensor._version)


def _unpack(kept: tuple[Tensor, int] | None) -> Tensor:
    """What was saved, if nothing has been written into it since: autograd's own check, which hooks switch off."""
    assert kept is not None, "a graph whose tape was full is thrown away"
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError("a tensor that the backward needs was changed in place after the forward had saved it")
    return tensor


class Expires(Protocol):
    """Keeps something for a while."""

    ttl_s: float

    def expire(self) -> None:
        """Let go what is too old."""
        ...


async def expire_forever(*stores: Expires) -> NoReturn:
    """Let go what is too old, also while nobody calls."""
    while True:
        await asyncio.sleep(max(0.1, min(10.0, *(store.ttl_s / 4 for store in stores))))
        for store in stores:
            store.expire()


def _gone(handle: int) -> GraphGone:
    return GraphGone(f"no graph is kept under handle {handle} for this client: send the inputs")


class Graphs:
    """Keeps graphs of clients, each under a handle of that client, until they are taken, too old, or too many.

    The device worker adds and takes; the network's thread lets clients go. Where the budget is full, the client that holds most loses its oldest.
    """

    def __init__(self, budget_bytes: int, ttl_s: float) -> None:
        self.budget_bytes, self.ttl_s = budget_bytes, ttl_s
        self._lock = Lock()
        self._kept: dict[str, OrderedDict[int, tuple[float, Graph]]] = {}
        # Handles of an earlier process with the same identity must not mean something here.
        self._numbers = itertools.count(1 + secrets.randbits(52))
        self.evicted = 0

    @property
    def held_bytes(self) -> int:
        """Of all graphs."""
        with self._lock:
            return self._total()

    def __len__(self) -> int:
        with self._lock:
            return sum(len(own) for own in self._kept.values())

    def keep(self, client: str, graph: Graph) -> int:
        """The handle of ``graph``; 0 where it does not fit at all."""
        if graph.held_bytes > self.budget_bytes:
            return 0
        with self._lock:
            freed = self._too_old()
            while self._total() + graph.held_bytes > self.budget_bytes:
                freed.append(self._oldest_of_whoever_holds_most())
                self.evicted += 1
            handle = next(self._numbers)
            self._kept.setdefault(client, OrderedDict())[handle] = (time.monotonic(), graph)
        return handle

    def check(self, client: str, handle: int) -> None:
        """Whether the graph is here, for a call that is to wait before it takes it.

        Raises:
            GraphGone: it is not here.
        """
        with self._lock:
            if handle not in self._kept.get(client, ()):
                raise _gone(handle)

    def take(self, client: str, handle: int) -> Graph:
        """The graph, which is not kept any more: autograd frees it as it goes back.

        Raises:
            GraphGone: it is not here.
        """
        with self._lock:
            own = self._kept.get(client, OrderedDict())
            entry = own.pop(handle, None)
            if not own:
                self._kept.pop(client, None)
        if entry is None:
            raise _gone(handle)
        return entry[1]

    def release(self, client: str, handles: Sequence[int]) -> None:
        """Let go what the client does not need any more."""
        with self._lock:
            own = self._kept.get(client, OrderedDict())
            freed = [own.pop(handle, None) for handle in handles]
            if not own:
                self._kept.pop(client, None)
        del freed  # outside of the lock: freeing much takes time

    def forget(self, client: str) -> None:
        """Let go all of a client that has gone."""
        with self._lock:
            freed = self._kept.pop(client, None)
        del freed

    def expire(self) -> None:
        """Let go what is too old."""
        with self._lock:
            freed = self._too_old()
        del freed

    def _total(self) -> int:
        return sum(graph.held_bytes for own in self._kept.values() for _, graph in own.values())

    def _too_old(self) -> list[Graph]:
        before, freed = time.monotonic() - self.ttl_s, []
        for client, own in list(self._kept.items()):
            for handle in [handle for handle, (kept_at, _) in own.items() if kept_at < before]:
                freed.append(own.pop(handle)[1])
            if not own:
                del self._kept[client]
        return freed

    def _oldest_of_whoever_holds_most(self) -> Graph:
        client = max(self._kept, key=lambda name: sum(graph.held_bytes for _, graph in self._kept[name].values()))
        _, (_, graph) = self._kept[client].popitem(last=False)
        if not self._kept[client]:
            del self._kept[client]
        return graph
