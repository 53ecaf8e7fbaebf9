"""Every error that swarmtune raises on purpose.

    SwarmtuneError
    ├── UsageError              what the user gave is wrong: a key, a path, a model, an adapter; exit code 2
    │   ├── ModelUnsupported    a model that cannot be cut into spans exactly
    │   ├── AdapterUnsupported  an adapter that cannot be trained (or loaded) remotely and exactly
    │   └── KwargError          a kwarg whose name, axes, blocks or shape do not fit
    ├── WireError               bytes from a peer that are not a message of our protocol
    ├── NonFinite               a NaN or an infinity appeared; says where first
    └── SwarmError              the swarm cannot do what was asked
        ├── PeersUnreachable    none of the initial peers answered
        ├── BlocksUnserved      some blocks have no live server
        ├── SwarmMismatch       servers disagree with each other or with the client about the model
        ├── NotExact            a result would have been counted twice or not at all; a defect, stopped before it does harm
        ├── PeerFault           one server failed or was silent; another may do better
        │   ├── PeerBusy        it has no room now, and says when to ask again
        │   ├── PeerDraining    it is shutting down and takes no new work
        │   ├── PeerSlow        it took much longer than calls of its kind do, and another server can do the work
        │   ├── PeerCutOff      our own way to it broke, which is no fault of the peer
        │   ├── GraphLost       it does not keep what a forward had left there for the backward
        │   └── TensorsLost     it does not keep a tensor that an earlier call had brought
        └── ServerStartFailed   a bundled server ended before it was ready

Each carries its data as attributes, pickles, and is chained to its cause.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmtune.types import BlockSpan


class SwarmtuneError(Exception):
    """The root: catching this catches everything that swarmtune raises on purpose."""


class UsageError(SwarmtuneError):
    """Something the user gave is wrong. The message says what was expected, what came and what to do."""


class ModelUnsupported(UsageError):
    """This model cannot be cut into spans of blocks exactly."""


class AdapterUnsupported(UsageError):
    """This adapter cannot be trained or loaded remotely and exactly."""


class KwargError(UsageError):
    """A kwarg's name, axes, blocks or shape do not fit the model or the batch."""


class WireError(SwarmtuneError):
    """Bytes that are not a message of our protocol, or that exceed its limits."""


class NonFinite(SwarmtuneError):
    """A NaN or an infinity appeared during the forward pass.

    Attributes:
        block: the first block whose output was not finite; ``None`` where it began outside the blocks.
    """

    def __init__(self, detail: str, block: int | None = None) -> None:
        super().__init__(detail)
        self.detail, self.block = detail, block

    def __reduce__(self) -> tuple[type[NonFinite], tuple[str, int | None]]:
        return type(self), (self.detail, self.block)


class SwarmError(SwarmtuneError):
    """The swarm cannot do what was asked of it."""


class PeersUnreachable(SwarmError):
    """None of the initial peers answered in time."""


class BlocksUnserved(SwarmError):
    """Some blocks of the model have no live server.

    Attributes:
        missing: the spans that nobody serves.
    """

    def __init__(self, detail: str, missing: tuple[BlockSpan, ...] = ()) -> None:
        super().__init__(detail)
        self.detail, self.missing = detail, missing

    def __reduce__(self) -> tuple[type[BlocksUnserved], tuple[str, tuple[BlockSpan, ...]]]:
        return type(self), (self.detail, self.missing)


class SwarmMismatch(SwarmError):
    """Servers disagree with each other, or with the client, about which model this is."""


class PeerFault(SwarmError):
    """A server answered with a fault, or did not answer in time. Another server may do better."""

    def __init__(self, peer: str, span: BlockSpan | None, detail: str) -> None:
        where = "" if span is None else f" blocks {span}"
        super().__init__(f"peer {peer} failed{where}: {detail}")
        self.peer, self.span, self.detail = peer, span, detail

    def __reduce__(self) -> tuple[type[PeerFault], tuple[str, BlockSpan | None, str]]:
        return type(self), (self.peer, self.span, self.detail)


class PeerBusy(PeerFault):
    """A server has no room for a call now.

    Attributes:
        retry_s: seconds after which it may be asked again.
    """

    def __init__(self, peer: str, span: BlockSpan | None, detail: str, retry_s: float) -> None:
        super().__init__(peer, span, detail)
        self.retry_s = retry_s

    def __reduce__(self) -> tuple[type[PeerBusy], tuple[str, BlockSpan | None, str, float]]:  # type: ignore[override]
        return type(self), (self.peer, self.span, self.detail, self.retry_s)


class PeerDraining(PeerFault):
    """A server is shutting down: it finishes what it has and takes nothing new."""


class PeerSlow(PeerFault):
    """A server took much longer than calls of its kind do, and another one can do the work."""


class PeerCutOff(PeerFault):
    """This side's own way into the network broke during a call; it is being repaired, and the peer may be as well as before."""


class GraphLost(PeerFault):
    """The server does not keep the graph of the forward any more. It can still do the backward when it gets the inputs again."""


class TensorsLost(PeerFault):
    """The server does not keep a tensor any more that an earlier call had brought. It can still do the call when it gets all of them again."""


class NotExact(SwarmError):
    """A result would have been counted twice, or is missing, though every call says that it is done: a defect of ours, stopped in time."""


class ServerStartFailed(SwarmError):
    """A bundled server ended, or stayed silent, before it was ready."""
