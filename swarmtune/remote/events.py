"""What happened on the way, for people: failures, slow and busy servers, waits, and what each cost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from swarmtune.types import BlockSpan

KEPT_EVENTS = 1000


class EventKind(StrEnum):
    """What can happen to a call."""

    FAILED = "failed"
    SLOW = "slow"
    BUSY = "busy"
    DRAINED = "drained"
    WAITED = "waited"
    MOVED = "moved"
    CUT_OFF = "cut_off"
    RECOMPUTED = "recomputed"
    RESENT = "resent"
    COMPILED = "compiled"
    DAEMON = "daemon"


@dataclass(frozen=True, slots=True)
class SwarmEvent:
    """One thing that happened.

    Attributes:
        at: monotonic instant.
        server: label of the server, or ``""`` where it is nobody's.
        span: the blocks of the call, where there is one.
        lost_s: seconds of work or waiting that it cost.
        detail: a sentence.
    """

    at: float
    kind: EventKind
    server: str
    span: BlockSpan | None
    lost_s: float
    detail: str


@dataclass(slots=True)
class Tally:
    """How often, and how many seconds in all."""

    count: int = 0
    lost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that finds nobody.

    Attributes:
        what: a sentence.
        ends_at: monotonic instant at which it gives up.
    """

    what: str
    ends_at: float

    def left_s(self) -> float:
        """Seconds until it gives up."""
        return max(0.0, self.ends_at - time.monotonic())


@dataclass(slots=True)
class EventLog:
    """The latest events, and sums over all of them. Written on the loop thread, read from any.

    Attributes:
        by_kind: sums by kind.
        by_server: sums by the label of the server, of events that are somebody's.
        waiting: calls that find nobody now, by a number of their own.
    """

    latest: deque[SwarmEvent] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    by_kind: dict[EventKind, Tally] = field(default_factory=lambda: {kind: Tally() for kind in EventKind})
    by_server: dict[str, Tally] = field(default_factory=dict)
    waiting: dict[int, Waiting] = field(default_factory=dict)

    def add(self, kind: EventKind, detail: str, *, server: str = "", span: BlockSpan | None = None, lost_s: float = 0.0, at: float = 0.0) -> None:
        """Keep one event."""
        self.latest.append(SwarmEvent(at or time.monotonic(), kind, server, span, lost_s, detail))
        for tally in (self.by_kind[kind], *([self.by_server.setdefault(server, Tally())] if server else [])):
            tally.count, tally.lost_s = tally.count + 1, tally.lost_s + lost_s

    def longest_wait(self) -> Waiting | None:
        """The wait that will give up first."""
        return min(list(self.waiting.values()), key=lambda each: each.ends_at, default=None)


@dataclass(frozen=True, slots=True)
class SwarmStatus:
    """What a client is doing now.

    Attributes:
        route: label and blocks of each server that runs calls now.
        slow: labels of servers that were left because they are slow.
        waiting: what is being waited for, where a call finds nobody.
        retries: calls that had to be asked again.
        events: sums by kind.
        last: the latest event.
    """

    route: tuple[tuple[str, BlockSpan], ...]
    slow: tuple[str, ...]
    waiting: Waiting | None
    retries: int
    events: Mapping[EventKind, Tally]
    last: SwarmEvent | None
