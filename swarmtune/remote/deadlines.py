"""How long a call may take: until its patience ends, and, where another server can do it, until it is much slower than its like."""

from __future__ import annotations

import statistics
from collections import deque

from swarmtune.errors import BlocksUnserved, PeerFault
from swarmtune.transport.clock import now
from swarmtune.types import BlockSpan

KEPT_CALLS = 32
NEEDED_CALLS = 3
SLACK_S = 1.2
"""What even the quickest call may take longer than its like: a busy machine stops for as long."""
NORMAL = 1.4826
"""The standard deviation of normally distributed numbers, over the median of their absolute deviations."""
MAX_SILENCE_S = 12.0
MAX_TRIES = 100
"""Of one piece of work, whoever does them."""


class CallTimes:
    """What calls of each span and direction took lately, network and queue included, whichever server did them."""

    def __init__(self) -> None:
        self._lately: dict[tuple[str, BlockSpan], deque[tuple[int, float]]] = {}
        self._limits: dict[tuple[str, BlockSpan, int], float] = {}

    def add(self, way: str, span: BlockSpan, tokens: int, seconds: float) -> None:
        """Remember a call that was done, or the time after which one was given up."""
        self._lately.setdefault((way, span), deque(maxlen=KEPT_CALLS)).append((tokens, seconds))
        self._limits.clear()

    def limit_s(self, way: str, span: BlockSpan, tokens: int) -> float | None:
        """Twice the median and two deviations above it, and a slack; ``None`` while too few calls are known.

        The deviation is 1.4826 times the median absolute deviation, which one outlier does not move. Times of smaller calls are scaled up.
        """
        key = (way, span, tokens)
        if key not in self._limits:
            lately = self._lately.get((way, span), ())
            if len(lately) < NEEDED_CALLS:
                return None
            seconds = [each_s * max(1.0, tokens / each_tokens) for each_tokens, each_s in lately]
            median_s = statistics.median(seconds)
            deviation_s = NORMAL * statistics.median(abs(each - median_s) for each in seconds)
            self._limits[key] = 2 * (median_s + 2 * deviation_s) + SLACK_S
        return self._limits[key]


class Patience:
    """How much longer to look for a server for one piece of work: the clock starts with the first fault."""

    def __init__(self, limit_s: float, busy_limit_s: float) -> None:
        """``limit_s`` is for servers that fail or are gone; those that say that they are busy are alive and may say so for ``busy_limit_s``."""
        self._limit_s, self._busy_limit_s = limit_s, busy_limit_s
        self._busy_since: float | None = None
        self._began = now()
        self._ends_at: float | None = None
        self._failed: set[str] = set()
        self._tries = 0
        self.last_fault: PeerFault | None = None
        self.allowance = 1.0
        """How many times the usual limit a call may take: doubled each time one was given up, so that a swarm that is slow as a whole gets there."""

    def blame(self, fault: PeerFault) -> bool:
        """Start the clock, and remember why; whether to give up: the time is over, and this server has failed here before.

        Without it, servers that describe themselves well and fail every call could be asked in turns for ever.
        """
        again = fault.peer in self._failed
        self._failed.add(fault.peer)
        self._tries += 1
        self.last_fault = fault
        if self._ends_at is None:  # a silence that has been waited out counts
            self._ends_at = now() + self._limit_s - min(now() - self._began, MAX_SILENCE_S, self._limit_s / 2)
        return (again and self.remaining_s() <= 0) or self._tries >= MAX_TRIES

    def count(self, fault: PeerFault) -> bool:
        """A server lacks something and gets it next: no reason to hurry; whether that has been so too often."""
        self._tries += 1
        self.last_fault = fault
        return self._tries >= MAX_TRIES

    def wait_for(self, seconds: float, fault: PeerFault) -> bool:
        """A server is alive and asks for a wait: the clock stops until the next fault; whether such waits have lasted too long in all."""
        self.last_fault, self._ends_at = fault, None
        if self._busy_since is None:
            self._busy_since = now()
        return now() + seconds - self._busy_since >= self._busy_limit_s

    def slower(self) -> None:
        """A call was given up for being slow: the next may take twice as long."""
        self.allowance *= 2

    @property
    def ends_at(self) -> float:
        """When it ends; starts the clock."""
        if self._ends_at is None:
            self._ends_at = now() + self._limit_s
        return self._ends_at

    def remaining_s(self) -> float:
        """Seconds left; starts the clock."""
        return self.ends_at - now()

    def exhausted(self, error: BlocksUnserved) -> BlocksUnserved:
        """The error to raise, with all that is known."""
        because = f"; last failure: {self.last_fault}" if self.last_fault else ""
        return BlocksUnserved(f"{error.detail}; waited {self._limit_s:.0f} s{because}", error.missing)
