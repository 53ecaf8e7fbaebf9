"""``scripts/chaos servers``: one SIGKILL of a server in each step, at a seeded moment of it; with ``--mix``, freezes besides."""

from __future__ import annotations

import argparse
import contextlib
import time

import swarmtune
from swarmtune.local_swarm import ManagedServer
from swarmtune.swarm import Swarm
from tests.chaos.campaign import Campaign, quantiles
from tests.chaos.fleet import Fleet
from tests.chaos.hooks import Calls, look_again, reachable, route_of
from tests.chaos.training import MICRO_BATCH_TOKENS, SPANS, Pair, pair, tiny_model

MOMENTS = ("before forward", "during forward", "between", "during backward")
CALLS_A_PASS = 4
QUIET_STEPS = 5
"""At first, so that it is known what calls take."""
START_BOUND_S, SPARE_BOUND_S = 300.0, 180.0
LOOK_EVERY_S = 0.5
CALL_TIMEOUT_S = 60.0
"""For the deadline to mean something in a campaign of minutes."""
FREEZE_SHARE = 0.15


class Plan:
    """The fault of one step: when, and on which of the servers at work."""

    def __init__(self, campaign: Campaign, fleet: Fleet, calls: Calls, swarm: Swarm) -> None:
        self._campaign, self._fleet, self._calls, self._swarm = campaign, fleet, calls, swarm
        self._way, self._nth, self._fraction, self._freeze = "", 0, 0.0, False
        self._moment = ""
        self.made = 0.0
        """Monotonic instant of the fault of this step; 0 before."""
        calls.asked = self._asked

    def begin(self, *, freeze: bool) -> None:
        """Draw the fault of the next step, and make it at once where that is its moment."""
        random = self._campaign.random
        self._moment, self._nth, self._fraction = random.choice(MOMENTS), random.randrange(CALLS_A_PASS), random.random()
        self._freeze, self.made = freeze, 0.0
        self._way = self._moment.partition("during ")[2]
        if self._moment == "before forward":
            self.hit_route(self._moment)

    def between(self) -> None:
        """Between forward and backward."""
        if self._moment == "between":
            self.hit_route(self._moment)

    def hit_route(self, moment: str) -> None:
        """A fault on a server that the next call would go to, or on any that can be spared."""
        on_route = [self._fleet.of(peer) for peer in route_of(self._swarm, MICRO_BATCH_TOKENS)]
        spare = self._fleet.spare()
        for server in sorted(spare, key=lambda each: (each not in on_route, self._campaign.random.random())):
            if not self.made:
                self._make(server, moment)

    def _asked(self, way: str, peer: str) -> None:
        if way != self._way or self.made:
            return
        if self._nth:
            self._nth -= 1
            return
        self._way = ""
        server = self._fleet.of(peer)
        delay_s = self._fraction * 1.2 * self._calls.usual_s()
        if server in self._fleet.spare():
            self._swarm.loop._loop.call_later(delay_s, self._make, server, self._moment)
        else:
            self._way = way  # the next call may go to one that can be spared

    def _make(self, server: ManagedServer, moment: str) -> None:
        if self.made:
            return
        campaign, number = self._campaign, self._fleet.number(server)
        if not self._freeze:
            if self._fleet.kill(server):
                self.made = time.monotonic()
                campaign.fault("kills", server=number, moment=moment)
            return
        seconds, then_kill = campaign.random.uniform(0.2, 12.0), campaign.random.random() < 0.3
        if self._fleet.freeze(server, seconds, then_kill, lambda: campaign.fault("kills of frozen", counted=False, server=number)):
            self.made = time.monotonic()
            campaign.fault("freezes", counted=False, server=number, moment=moment, seconds=round(seconds, 3), then_kill=then_kill)


def run(options: argparse.Namespace) -> int:
    """The campaign."""
    campaign = Campaign("servers", options.count, options.seed, options.log)
    with campaign.running(), contextlib.ExitStack() as stack:
        path = tiny_model(options.log)
        spans = [span for span in SPANS for _ in range(options.replicas)]
        with campaign.bound("the start of the servers", START_BOUND_S):
            local = stack.enter_context(swarmtune.LocalSwarm(path, spans, dtype="float32", threads=1, log_dir=options.log))
            swarm = stack.enter_context(
                swarmtune.connect(local.initial_peers, micro_batch_tokens=MICRO_BATCH_TOKENS, call_timeout_s=CALL_TIMEOUT_S, history=campaign.history)
            )
            both = stack.enter_context(pair(campaign, path, swarm))
        fleet = Fleet(campaign, local, patient=not options.hard)
        stack.callback(fleet.close)
        train(campaign, fleet, swarm, both, freeze_share=FREEZE_SHARE if options.mix else 0.0)
    return campaign.finish()


def train(campaign: Campaign, fleet: Fleet, swarm: Swarm, both: Pair, freeze_share: float) -> None:
    """Steps until all faults have been made: a kill in each, or a freeze."""
    calls = Calls().attach(swarm)
    plan = Plan(campaign, fleet, calls, swarm)
    for _ in range(QUIET_STEPS):
        both.step()
    frozen_s: list[float] = []
    killed_s: list[float] = []
    while campaign.counts["faults"] < campaign.wanted:
        with campaign.bound("the wait for a server that can be spared", SPARE_BOUND_S):
            wait_for_spare(campaign, fleet, swarm)
        freeze = campaign.random.random() < freeze_share
        retries = swarm.traffic().retries
        plan.begin(freeze=freeze)
        both.step(plan.between)
        if swarm.traffic().retries > retries:
            campaign.counts["hits of freezes" if freeze else "hits"] += 1
            if plan.made:
                (frozen_s if freeze else killed_s).append(time.monotonic() - plan.made)
        if not plan.made:
            plan.hit_route("after the step")
    campaign.facts |= {"step_after_kill_s": quantiles(killed_s), "step_after_freeze_s": quantiles(frozen_s)}
    campaign.facts["retries"] = swarm.traffic().retries


def wait_for_spare(campaign: Campaign, fleet: Fleet, swarm: Swarm) -> None:
    """Until a server can be killed whose blocks another one holds that the client is connected to.

    A client looks at the swarm every ten seconds where nothing is missing; here it is asked to as soon as a server is back.
    """
    looked_at = 0.0
    while True:
        if fleet.patient:
            fleet.reachable = swarm.loop.run(reachable(swarm))
        if fleet.spare():
            return
        if fleet.patient and fleet.spare(whoever=True) and time.monotonic() - looked_at > LOOK_EVERY_S:
            swarm.loop.run(look_again(swarm))
            looked_at = time.monotonic()
        campaign.tell()
        time.sleep(0.05)
