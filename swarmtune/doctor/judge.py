"""What a survey of a swarm means: pure functions from what was found to checks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import swarmtune
from swarmtune.discovery.records import LIFETIME_S, RENEW_EVERY_S
from swarmtune.doctor.check import Check, Status
from swarmtune.doctor.survey import Server, Survey
from swarmtune.remote.census import by_model, clashes_sentence, label, listed, numeric_differences, numeric_sentence, short
from swarmtune.types import BlockSpan, gaps
from swarmtune.wire.messages import ServerInfo

CLOCK_TOLERANCE_S = 3.0

REASONS = (
    ("must look like", "malformed", "copy the address that the server prints when it starts"),
    ("invalid multiaddr", "malformed", "copy the address that the server prints when it starts"),
    ("multihash", "malformed peer id", "copy the address that the server prints when it starts"),
    (
        "peer id mismatch",
        "another peer listens there",
        "the server was started anew with another identity, or the address mixes two servers: copy it again",
    ),
    ("connection refused", "refused: nothing listens there", "start the server, or correct the port"),
    ("no such host", "the name is not known", "correct the host name, or give the IP address"),
    ("unreachable", "no route to that network", "check the address, and that both machines are on one network"),
    ("negotiate", "something else listens there, or the peer hangs", "check that the port is that of a swarmtune server, and start it again"),
    ("", "no answer in time", "check that the machine is up, and that no firewall drops the port"),
)
"""What a refusal contains, the likely reason, and what to do; the first that fits."""


def judge(found: Survey, wanted: tuple[str, int] | None = None) -> list[Check]:
    """All checks of a swarm; ``wanted`` is the model to train: its digest and number of blocks."""
    checks = [*check_peers(found), *check_silent(found)]
    infos = {server.peer: server.info for server in found.servers}
    if not infos:
        return [*checks, Check("servers", Status.FAILED, "no server describes itself", "start servers, or give --peer the address of one that runs")]
    checks += [check_models(infos, wanted)]
    for (model, num_blocks), peers in by_model(infos).items():
        own = [server for server in found.servers if server.peer in peers]
        about = f" of {model[:8]}" if len({info.model for info in infos.values()}) > 1 else ""
        needed = wanted is None or (model, num_blocks) == wanted
        checks += [check_coverage(own, about, needed), check_weights(own, about, needed), check_numeric(own, about)]
    return [*checks, check_versions(infos), check_announced(found.servers), check_clocks(found.servers), check_speed(found)]


def check_peers(found: Survey) -> list[Check]:
    """Which of the user's addresses can be reached, and why the others cannot."""
    status = Status.WARNING if found.reached else Status.FAILED
    checks = [Check("peer", Status.OK, f"{address} answers") for address in found.reached]
    for address, refusal in found.refusals.items():
        reason, advice = next((reason, advice) for part, reason, advice in REASONS if part in refusal.lower())
        detail = refusal.partition(f"cannot be reached at {address}: ")[2] or refusal
        checks.append(Check("peer", status, f"{address} cannot be reached: {reason} ({detail})", advice))
    return checks


def check_silent(found: Survey) -> list[Check]:
    """Peers of the swarm that do not describe themselves."""
    if not found.silent:
        return []
    who = "; ".join(f"{short(peer)}: {reason}" for peer, reason in sorted(found.silent.items())[:4])
    advice = "they may have just ended, or be busy, or of another version: ask again; if you count on one, start it again"
    return [Check("silent peers", Status.WARNING, f"{len(found.silent)} peers of the swarm do not describe themselves ({who})", advice)]


def check_models(infos: dict[str, ServerInfo], wanted: tuple[str, int] | None) -> Check:
    """Which models the swarm holds, and whether the wanted one is among them."""
    models = by_model(infos)
    held = "; ".join(
        f"{model} ({num_blocks} blocks) on {listed(label(peer, infos[peer]) for peer in peers)}" for (model, num_blocks), peers in models.items()
    )
    if wanted is not None and wanted not in models:
        found = f"nobody serves your model {wanted[0]} ({wanted[1]} blocks); the swarm holds {held}"
        return Check(
            "models", Status.FAILED, found, "serve it (swarmtune serve model=... initial_peers=[...]), or train the model that the swarm holds"
        )
    if len(models) > 1:
        advice = "they differ in config.json; a run uses only servers of its own model: give each model a swarm of its own, or --model to check one"
        return Check("models", Status.WARNING, f"{len(models)} models in one swarm: {held}", advice)
    ours = "your model " if wanted else ""
    return Check("models", Status.OK, f"{ours}{held}")


def coverage(spans: Sequence[BlockSpan], num_blocks: int) -> list[tuple[BlockSpan, int]]:
    """Maximal spans of blocks with the number of servers that hold them, from the first block to the last."""
    edges = sorted({0, num_blocks, *(edge for span in spans for edge in (span.start, span.stop))})
    found: list[tuple[BlockSpan, int]] = []
    for start, stop in pairwise(edges):
        count = sum(start in span for span in spans)
        if found and found[-1][1] == count:
            start = found.pop()[0].start
        found.append((BlockSpan(start, stop), count))
    return found


def check_coverage(servers: Sequence[Server], about: str, needed: bool) -> Check:
    """Blocks that nobody serves, and blocks with one server only."""
    num_blocks, spans = servers[0].info.num_blocks, [server.info.span for server in servers]
    missing = gaps(spans, num_blocks)
    if missing:
        found = f"nobody serves blocks {listed(map(str, missing))} of 0:{num_blocks}"
        commands = f"start servers for them: swarmtune serve model=... blocks='\"{missing[0]}\"' initial_peers=[...]"
        return Check(f"coverage{about}", Status.FAILED if needed else Status.WARNING, found, commands)
    single = [span for span, count in coverage(spans, num_blocks) if count == 1]
    if single:
        found = f"all {num_blocks} blocks are served; {listed(map(str, single))} by one server only, so a run waits when that one fails"
        return Check(f"coverage{about}", Status.WARNING, found, "start a second server for these blocks")
    return Check(
        f"coverage{about}",
        Status.OK,
        f"all {num_blocks} blocks are served, each by at least {min(c for _, c in coverage(spans, num_blocks))} servers",
    )


def check_weights(servers: Sequence[Server], about: str, needed: bool) -> Check:
    """Whether all servers of a block hold the same weights."""
    clashes = clashes_sentence({server.peer: server.info for server in servers})
    if clashes:
        found = f"different weights under one configuration: {clashes}"
        status = Status.FAILED if needed else Status.WARNING
        return Check(f"weights{about}", status, found, "a run refuses this swarm: stop the servers that hold the wrong checkpoint")
    return Check(f"weights{about}", Status.OK, "servers that share blocks hold the same weights")


def check_numeric(servers: Sequence[Server], about: str) -> Check:
    """Whether the servers of a model give the same bits, and if not, why."""
    infos = {server.peer: server.info for server in servers}
    classes = {info.numeric_class for info in infos.values()}
    if len(classes) == 1:
        return Check(f"numeric class{about}", Status.OK, f"one ({classes.pop()}): any server can replace another to the bit")
    found = f"{len(classes)} classes: {numeric_sentence(infos)}"
    meaning = "calls that move from one class to another differ in the last digits, so repeated runs need not give the same bits"
    if "dtype" in numeric_differences(infos) or len({info.dtype for info in infos.values()}) > 1:
        meaning = "with different dtypes results differ visibly, and a run whose route needs several of them is refused"
    return Check(
        f"numeric class{about}",
        Status.WARNING,
        found,
        f"{meaning}; where it matters, start all servers with the same dtype, device, threads and library versions, on one make of CPU",
    )


def check_versions(infos: dict[str, ServerInfo]) -> Check:
    """Whether the servers run the swarmtune that runs here."""
    others = {peer: info for peer, info in infos.items() if info.version != swarmtune.__version__}
    if others:
        who = listed(f"{label(peer, info)} runs {info.version}" for peer, info in sorted(others.items()))
        return Check("server versions", Status.WARNING, f"here is swarmtune {swarmtune.__version__}; {who}", "update the older side if calls fail")
    return Check("server versions", Status.OK, f"all run swarmtune {swarmtune.__version__}, as here")


def check_announced(servers: Sequence[Server]) -> Check:
    """Whether the servers can be found by clients that know another one."""
    missing = [label(server.peer, server.info) for server in servers if not server.announced]
    if missing:
        advice = (
            f"wait {RENEW_EVERY_S:.0f} s and ask again; if it stays so, start the server with initial_peers of this swarm, "
            f"and check its clock: a record more than {LIFETIME_S:.0f} s off counts as expired"
        )
        return Check("announcements", Status.WARNING, f"not found in the DHT: {listed(missing)}", advice)
    return Check("announcements", Status.OK, f"all {len(servers)} servers are announced in the DHT")


def check_clocks(servers: Sequence[Server]) -> Check:
    """Whether the servers' clocks agree with ours; announcements are stored and believed by the clock."""
    known = [(server, server.ahead_s, server.ahead_error_s) for server in servers if server.ahead_s is not None and server.ahead_error_s is not None]
    if not known:
        return Check("clocks", Status.WARNING, "no server tells its time", "compare the clocks by hand")
    off = [(server, ahead) for server, ahead, error in known if abs(ahead) - error > CLOCK_TOLERANCE_S]
    if off:
        who = listed(f"{label(server.peer, server.info)} is {abs(ahead):,.1f} s {'ahead' if ahead > 0 else 'behind'}" for server, ahead in off)
        advice = f"set the clocks with NTP: a record lives {LIFETIME_S:.0f} s, so a clock that is off hides servers or keeps dead ones"
        return Check("clocks", Status.WARNING, f"against this machine's clock, {who}", advice)
    worst = max(abs(ahead) + error for _, ahead, error in known)
    return Check("clocks", Status.OK, f"{len(known)} of {len(servers)} servers tell their time; it agrees with ours to {max(worst, 0.01):.2f} s")


def check_speed(found: Survey) -> Check:
    """Whether everything was found and measured in time."""
    latencies = [server.latency_s for server in found.servers if server.latency_s is not None]
    notes = [
        note
        for note, holds in (("not all servers could be asked in time", found.cut_short), (f"{found.unmeasured} not measured", found.unmeasured))
        if holds
    ]
    if not latencies:
        return Check("latency", Status.FAILED, "no server answered the measurement", "ask again; if it stays so, the servers are overloaded or gone")
    text = f"{min(latencies) * 1000:.1f} to {max(latencies) * 1000:.1f} ms round trip"
    if notes:
        return Check("latency", Status.WARNING, "; ".join([text, *notes]), "ask again when the swarm is quieter")
    return Check("latency", Status.OK, text)
