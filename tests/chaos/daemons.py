"""``scripts/chaos daemons``: our own p2p daemons are killed, the client's and the servers'; some are frozen."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
import time
from collections import defaultdict

import swarmtune
from swarmtune.local_swarm import ManagedServer
from swarmtune.swarm import Swarm
from tests.chaos.campaign import Campaign, quantiles
from tests.chaos.fleet import Fleet
from tests.chaos.hooks import Calls, route_of
from tests.chaos.processes import daemon_of, runs, send, stopped
from tests.chaos.servers import CALL_TIMEOUT_S, QUIET_STEPS, START_BOUND_S, wait_for_spare
from tests.chaos.training import MICRO_BATCH_TOKENS, SPANS, STEP_BOUND_S, Pair, pair, tiny_model

FREEZE_SHARE = 0.2
THAW_S = 20.0
"""A frozen daemon that nobody has replaced by then goes on."""
LOOK_EVERY_S = 0.2
GOAL_S = 3.0


class Daemons:
    """Kills daemons, and measures how long it takes from there to the end of the next call that was begun since."""

    def __init__(self, campaign: Campaign, fleet: Fleet, swarm: Swarm, calls: Calls) -> None:
        self._campaign, self._fleet, self._swarm = campaign, fleet, swarm
        self.recovery_s: dict[str, list[float]] = defaultdict(list)
        self._open: list[tuple[str, float]] = []
        self._frozen: dict[int, float] = {}
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look_after, daemon=True)
        self._watch.start()
        calls.succeeded = self._succeeded

    @property
    def open(self) -> bool:
        """Whether no call has been begun and done since a strike."""
        return bool(self._open)

    def strike(self, server: ManagedServer | None, freeze: bool) -> None:
        """Kill or freeze the daemon of a server, or of this process."""
        pid = daemon_of(os.getpid() if server is None else server.pid)
        whose = "client" if server is None else "server"
        if pid is None:
            self._campaign.counts["no daemon there"] += 1
            return
        if not send(pid, signal.SIGSTOP if freeze else signal.SIGKILL):
            return
        kind = f"{whose} {'freezes' if freeze else 'kills'}" + " beside a frozen one" * any(map(stopped, list(self._frozen)))
        self._open = [*self._open, (kind, time.monotonic())]
        if freeze:
            self._frozen[pid] = time.monotonic()
        self._campaign.fault(kind, daemon=pid, server=None if server is None else self._fleet.number(server))

    def _succeeded(self, began: float, ended: float) -> None:
        found, self._open = self._open, [each for each in self._open if each[1] >= began]
        for kind, at in found:
            if at < began:
                self.recovery_s[kind].append(ended - at)
                self._campaign.note("recovered", kind=kind, seconds=round(ended - at, 3))

    def _look_after(self) -> None:
        """A server that ends with its daemon is started again; a frozen daemon that is still there goes on."""
        while not self._ended.wait(LOOK_EVERY_S):
            for server in self._fleet.ended():
                self._campaign.counts["servers ended with their daemon"] += 1
                self._fleet.restart_ended(server)
            for pid, since in list(self._frozen.items()):
                if not runs(pid):
                    del self._frozen[pid]
                elif time.monotonic() - since > THAW_S:
                    del self._frozen[pid]
                    if stopped(pid) and send(pid, signal.SIGCONT):
                        self._campaign.counts["frozen daemons that nobody replaced"] += 1

    def close(self) -> None:
        """No daemon stays frozen."""
        self._ended.set()
        self._watch.join()
        for pid in self._frozen:
            if stopped(pid):
                send(pid, signal.SIGCONT)


def run(options: argparse.Namespace) -> int:
    """The campaign."""
    campaign = Campaign("daemons", options.count, options.seed, options.log)
    with campaign.running(), contextlib.ExitStack() as stack:
        path = tiny_model(options.log)
        spans = [span for span in SPANS for _ in range(2)]
        with campaign.bound("the start of the servers", START_BOUND_S):
            local = stack.enter_context(swarmtune.LocalSwarm(path, spans, dtype="float32", threads=1, log_dir=options.log))
            swarm = stack.enter_context(
                swarmtune.connect(local.initial_peers, micro_batch_tokens=MICRO_BATCH_TOKENS, call_timeout_s=CALL_TIMEOUT_S, history=campaign.history)
            )
            both = stack.enter_context(pair(campaign, path, swarm))
        fleet = Fleet(campaign, local)
        stack.callback(fleet.close)
        calls = Calls().attach(swarm)
        daemons = Daemons(campaign, fleet, swarm, calls)
        stack.callback(daemons.close)
        train(campaign, fleet, swarm, both, daemons, options)
        campaign.facts["recovery_s"] = {kind: quantiles(seconds) for kind, seconds in sorted(daemons.recovery_s.items())}
        kills = [seconds for kind, found in daemons.recovery_s.items() if kind.endswith("kills") for seconds in found]  # alone
        campaign.facts["recovery_of_kills_s"] = quantiles(kills)
        campaign.facts["goal_met"] = bool(kills) and quantiles(kills)["p95"] < GOAL_S
    return campaign.finish()


def train(campaign: Campaign, fleet: Fleet, swarm: Swarm, both: Pair, daemons: Daemons, options: argparse.Namespace) -> None:
    """Steps until all faults have been made, one in each at a seeded moment, and one more."""
    began = time.monotonic()
    for _ in range(QUIET_STEPS):
        both.step()
    step_s = (time.monotonic() - began) / QUIET_STEPS
    random = campaign.random
    while campaign.counts["faults"] < campaign.wanted:
        target = random.choice(("client", "server")) if options.whose == "both" else options.whose
        server = None
        if target == "server":
            with campaign.bound("the wait for a server that can be spared", START_BOUND_S):
                wait_for_spare(campaign, fleet, swarm)
            on_route = [server for server in fleet.spare() if server.peer_id in route_of(swarm, MICRO_BATCH_TOKENS)]
            server = random.choice(on_route or fleet.spare() or [None])
        retries = swarm.traffic().retries
        timer = threading.Timer(random.uniform(0, step_s), daemons.strike, (server, random.random() < FREEZE_SHARE))
        timer.start()
        try:
            both.step()
        finally:
            timer.join()
        if daemons.open:  # it came when no call was asked any more: what passes until the next step is ours
            with campaign.bound("a call after a strike", STEP_BOUND_S):
                both.loud.probe()
        time.sleep(options.pause_s)
        campaign.counts["hits"] += swarm.traffic().retries > retries
    both.step()
