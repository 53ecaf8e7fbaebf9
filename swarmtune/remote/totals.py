"""Running totals of one client: what each server did for it, for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from swarmtune.types import BlockSpan
from swarmtune.wire.codec import Message
from swarmtune.wire.frames import Incoming
from swarmtune.wire.messages import CallKind, ServerInfo, ServerTimes


@dataclass(slots=True)
class ServerTotals:
    """What one server did for this client so far.

    Attributes:
        label: its name or its blocks, fit for the name of a metric.
        span: the blocks that it held when it was first called.
        calls: forwards and backwards asked of it.
        failures: of these, those that it did not do.
        lost_s: seconds that these took.
        network_s: seconds of done calls that it did not account for: the way there and back.
        queue_s: seconds that calls waited there, as it says.
        compute_s: seconds of work, as it says.
        block_forwards: blocks that it ran forward, as it says; recomputing for a backward included.
        bytes_up: of messages sent to it.
        bytes_down: of whole answers received.
    """

    label: str
    span: BlockSpan
    calls: int = 0
    failures: int = 0
    lost_s: float = 0.0
    network_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    block_forwards: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def add(self, seconds: float, times: ServerTimes | None, answer: Incoming) -> None:
        """Count a done call; a server cannot claim more time than has passed."""
        compute_s = min(seconds, times.compute_us / 1e6) if times else 0.0
        queue_s = min(seconds - compute_s, times.queue_us / 1e6) if times else 0.0
        self.compute_s, self.queue_s, self.network_s = (
            self.compute_s + compute_s,
            self.queue_s + queue_s,
            self.network_s + seconds - compute_s - queue_s,
        )
        self.block_forwards += times.block_forwards if times else 0
        self.bytes_down += len(answer.body)


@dataclass(slots=True)
class ChainCounters:
    """Running totals, for people.

    Attributes:
        compiled: forwards, and backwards that ran forward again, which compiled code has done.
        wait_s: seconds that the caller's thread waited for the chain.
        payload: bytes of tensors by direction and kind, such as ``up hidden``: what calls carried, sent again after a failure or not.
        servers: by peer id.
    """

    calls: int = 0
    retries: int = 0
    compiled: int = 0
    wait_s: float = 0.0
    payload: Counter[str] = field(default_factory=Counter)
    servers: dict[str, ServerTotals] = field(default_factory=dict)

    def carried(self, way: Literal["up", "down"], message: Message, asked: str = "") -> None:
        """Count the tensors of a message; ``asked`` is the kind of the call that it answers."""
        of_gradients = asked in (CallKind.BACKWARD, CallKind.KEPT_BACKWARD)
        own = {"hidden": "gradient" if of_gradients else "hidden", "grad": "gradient", "tensor": "relayed"}
        for name, tensor in message.tensors.items():
            kind = own.get(name.partition(".")[0], "kwarg gradients" if of_gradients else "kwargs")
            self.payload[f"{way} {kind}"] += tensor.nbytes


def label_of(peer: str, info: ServerInfo, taken: Collection[str]) -> str:
    """The name of a server, or its blocks, so that runs can be compared; where two would be called alike, with the end of its peer id."""
    label = re.sub(r"[^A-Za-z0-9_.-]", "_", info.name)[:40] or f"blocks{info.span.start}-{info.span.stop}"
    return f"{label}.{peer[-6:]}" if label in taken else label
