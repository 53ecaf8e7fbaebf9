"""``scripts/chaos simulate``: steps on a simulated clock, with faults at numbered points; with ``--pairs``, each one and each two of them."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch

from tests.chaos.campaign import Campaign
from tests.chaos.training import tiny_model
from tests.simulation import Fault, Simulator

MAX_WRONG = 20


def run(options: argparse.Namespace) -> int:
    """The campaign: ``count`` kills in seeded storms, with as many other faults, or all of the first step one by one and two by two."""
    logging.getLogger("swarmtune").setLevel(logging.ERROR)  # a simulated hour of warnings for each second
    torch.set_num_threads(1)
    campaign = Campaign("simulate pairs" if options.pairs else "simulate", options.count, options.seed, options.log)
    with campaign.running():
        simulator = Simulator(tiny_model(options.log))
        cases = every_pair(simulator) if options.pairs else storms(simulator, options.seed)
        slowest_s = 0.0
        for faults, how in cases:
            outcome = simulator.run(faults, **how)
            for fault in faults[: outcome.struck]:
                campaign.fault(fault.kind, counted=options.pairs or fault.kind == "kill", point=fault.point, phase=fault.phase)
            wrong = simulator.wrong(outcome)
            if wrong:
                campaign.error(f"{faults} {how}: {wrong}")
            campaign.compare("gradients differ" not in wrong)
            slowest_s = max(slowest_s, *outcome.seconds)
            campaign.facts |= {"slowest_step_simulated_s": round(slowest_s, 1)}
            if len(campaign.errors) >= MAX_WRONG or (not options.pairs and campaign.counts["faults"] >= campaign.wanted):
                break
        if options.pairs:
            campaign.wanted = campaign.counts["faults"]
    return campaign.finish()


def storms(simulator: Simulator, seed: int) -> Iterator[tuple[list[Fault], dict[str, Any]]]:
    """One to four faults in two steps, of ever new seeds."""
    for number in itertools.count():
        yield simulator.random_faults(seed * 1_000_000 + number)


def every_pair(simulator: Simulator) -> Iterator[tuple[list[Fault], dict[str, Any]]]:
    """Each fault at each point of a step, alone, over connections that are open, and over new ones; then with each fault at each later point."""
    for how in ({}, {"warm": True}, {"cold": True}, {"pipelined": True}, {"copies": True}, {"poor": True}, {"tight": True}):
        for fault in simulator.every_fault(**how):
            yield [fault], {"steps": 1, **how}
    for pipelined in (False, True):
        for first in simulator.every_fault(pipelined=pipelined):
            for second in simulator.every_second_fault(first, pipelined=pipelined):
                yield [first, second], {"steps": 1, "pipelined": pipelined}
