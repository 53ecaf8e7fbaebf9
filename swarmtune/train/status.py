"""What the swarm is doing, in a line: the route, retries, who is slow, and what is being waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import RenderableType
from rich.progress import Progress
from rich.text import Text

from swarmtune.notices import printable
from swarmtune.remote.events import SwarmStatus

MAX_ROUTE = 4
"""Servers of a route that a line names; of a longer one it says how many there are."""


def status_line(status: SwarmStatus) -> str:
    """All that is worth knowing now; empty before the first call."""
    hops = [f"{label} {span}" for label, span in status.route]
    route = " -> ".join(hops) if len(hops) <= MAX_ROUTE else f"{hops[0]} -> {len(hops) - 2} servers -> {hops[-1]}"
    return "  ".join(part for part in (route, *troubles(status)) if part)


def troubles(status: SwarmStatus) -> list[str]:
    """What a quiet run has none of."""
    found = []
    if status.retries:
        found.append(f"{status.retries} {'retry' if status.retries == 1 else 'retries'}")
    if status.slow:
        found.append(f"slow: {', '.join(status.slow)}")
    if status.waiting is not None:
        found.append(f"{printable(status.waiting.what, 120)}: {status.waiting.left_s():.0f} s left")
    return found


class SwarmProgress(Progress):
    """A bar with the state of the swarm below it, drawn anew while the training itself waits for a server."""

    statuses: Callable[[], Sequence[SwarmStatus]] = staticmethod(lambda: ())

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, then a line for each model."""
        yield from super().get_renderables()
        for status in self.statuses():
            if line := status_line(status):
                yield Text(line, style="yellow" if status.waiting is not None else "dim", overflow="ellipsis", no_wrap=True)
