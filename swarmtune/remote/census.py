"""Where the servers of a swarm differ: pure functions over what they say of themselves, for errors, warnings and ``swarmtune doctor``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from swarmtune.types import BlockSpan
from swarmtune.wire.messages import ServerInfo

MAX_NAMED = 6
SHORT_DIGITS = 8


def short(peer: str) -> str:
    """A peer id as people compare it: its last digits."""
    return peer if len(peer) <= 2 * SHORT_DIGITS else f"…{peer[-SHORT_DIGITS:]}"


def label(peer: str, info: ServerInfo) -> str:
    """A server's name, if it has one, and its short peer id, which nobody else can take."""
    return f"{info.name} ({short(peer)})" if info.name else short(peer)


def listed(names: Iterable[str]) -> str:
    """Names in a sentence; many are cut short."""
    names = list(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def by_model(servers: Mapping[str, ServerInfo]) -> dict[tuple[str, int], list[str]]:
    """Peers by the model that they hold: digest of its configuration and number of blocks."""
    found: dict[tuple[str, int], list[str]] = {}
    for peer, info in sorted(servers.items()):
        found.setdefault((info.model, info.num_blocks), []).append(peer)
    return found


def models_sentence(servers: Mapping[str, ServerInfo]) -> str:
    """Which models there are, and who holds them."""
    return "; ".join(
        f"model {model} with {num_blocks} blocks by {listed(label(peer, servers[peer]) for peer in peers)}"
        for (model, num_blocks), peers in by_model(servers).items()
    )


def weight_clashes(servers: Mapping[str, ServerInfo]) -> list[tuple[BlockSpan, tuple[tuple[str, ...], ...]]]:
    """Blocks for which servers of one model hold different weights: maximal spans, each with its groups of peers, the largest first."""
    holders: dict[int, dict[str, list[str]]] = {}
    for peer, info in sorted(servers.items()):
        for block, digest in enumerate(info.block_digests, info.span.start):
            holders.setdefault(block, {}).setdefault(digest, []).append(peer)
    found: list[tuple[BlockSpan, tuple[tuple[str, ...], ...]]] = []
    for block, groups in sorted(holders.items()):
        if len(groups) < 2:
            continue
        parties = tuple(sorted((tuple(group) for group in groups.values()), key=lambda group: (-len(group), group)))
        if found and found[-1][0].stop == block and found[-1][1] == parties:
            found[-1] = (BlockSpan(found[-1][0].start, block + 1), parties)
        else:
            found.append((BlockSpan(block, block + 1), parties))
    return found


def clashes_sentence(servers: Mapping[str, ServerInfo]) -> str:
    """Who disagrees with whom on which blocks; empty where nobody does."""
    return "; ".join(
        f"blocks {span}: " + " against ".join(listed(label(peer, servers[peer]) for peer in group) for group in groups)
        for span, groups in weight_clashes(servers)[:MAX_NAMED]
    )


def numeric_differences(servers: Mapping[str, ServerInfo]) -> dict[str, dict[str, list[str]]]:
    """The facts in which numeric classes differ: fact to value to peers."""
    facts = sorted({fact for info in servers.values() for fact in info.numeric})
    found: dict[str, dict[str, list[str]]] = {}
    for fact in facts:
        values: dict[str, list[str]] = {}
        for peer, info in sorted(servers.items()):
            values.setdefault(info.numeric.get(fact, "not said"), []).append(peer)
        if len(values) > 1:
            found[fact] = values
    return found


def numeric_sentence(servers: Mapping[str, ServerInfo]) -> str:
    """What differs between the numeric classes, with who has what."""
    differences = numeric_differences(servers)
    if not differences:
        return "they do not say in what"
    return "; ".join(
        f"{fact} is " + ", ".join(f"{value} on {listed(label(peer, servers[peer]) for peer in peers)}" for value, peers in values.items())
        for fact, values in differences.items()
    )
