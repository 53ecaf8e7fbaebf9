"""Where the time of runs went: bars of seconds, for the picture and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarmtune.plotting.runs import Run, ServerTotals

PARTS = {"network": "#0072B2", "queue": "#E69F00", "compute": "#009E73", "own work": "#CC79A7", "waiting for the swarm": "#999999"}
"""What a second can go into, and its colour."""
MAX_SERVERS = 16
"""Servers with a bar of their own; the rest shares one."""
CAPTION = (
    "The client's bar is wall time of training. A server's bar adds up all its calls; several may be under way at once, "
    "so the servers' times together may exceed the client's."
)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: a label and seconds per part, in the order in which they are stacked."""

    label: str
    seconds: dict[str, float]


def bars_of(runs: Sequence[Run], names: Sequence[str]) -> list[Bar]:
    """One run: its client and each of its servers. Several: the client of each, and its servers together."""
    if len(runs) == 1:
        return [*_client_bar(runs[0], "client"), *(_server_bar(server, server.label) for server in _busiest(runs[0].servers))]
    bars: list[Bar] = []
    for run, name in zip(runs, names, strict=True):
        bars += _client_bar(run, f"{name}: client")
        if run.servers:
            bars.append(_server_bar(_together(run.servers, "servers"), f"{name}: {_count(len(run.servers))}"))
    return bars


def _client_bar(run: Run, label: str) -> list[Bar]:
    if run.train_s is None or run.swarm_s is None:
        return []
    return [Bar(label, {"own work": max(run.train_s - run.swarm_s, 0.0), "waiting for the swarm": run.swarm_s})]


def _server_bar(server: ServerTotals, label: str) -> Bar:
    return Bar(label, {"network": server.network_s or 0.0, "queue": server.queue_s or 0.0, "compute": server.compute_s or 0.0})


def _busiest(servers: Sequence[ServerTotals]) -> list[ServerTotals]:
    """The servers in their order, those with the least time put together when there are too many."""
    if len(servers) <= MAX_SERVERS:
        return list(servers)
    ranked = sorted(servers, key=lambda server: server.seconds, reverse=True)
    rest = ranked[MAX_SERVERS - 1 :]
    return [*ranked[: MAX_SERVERS - 1], _together(rest, f"{len(rest)} other servers")]


def _together(servers: Sequence[ServerTotals], label: str) -> ServerTotals:
    return ServerTotals(
        label,
        sum(server.network_s or 0.0 for server in servers),
        sum(server.queue_s or 0.0 for server in servers),
        sum(server.compute_s or 0.0 for server in servers),
    )


def _count(servers: int) -> str:
    return "1 server" if servers == 1 else f"{servers} servers"
