"""``scripts/chaos soak``: an hour of training with a fault every few minutes; do memory, descriptors and threads of client and servers grow?"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import time
from pathlib import Path

import numpy as np
import psutil

import swarmtune
from tests.chaos.campaign import Campaign
from tests.chaos.fleet import Fleet
from tests.chaos.hooks import reachable
from tests.chaos.processes import daemon_of, send
from tests.chaos.servers import CALL_TIMEOUT_S, QUIET_STEPS, START_BOUND_S
from tests.chaos.training import MICRO_BATCH_TOKENS, SPANS, Pair, pair, tiny_model

SAMPLE_EVERY_S = 2.0
WARM_SHARE = 0.3
"""Of the time, left out of the slopes: allocators and caches fill."""
BOUNDS = {"rss_mb": 30.0, "descriptors": 5.0, "threads": 2.0}
"""Growth in an hour that is still called none."""
NEEDED_SAMPLES = 30


class Watch:
    """Samples of processes that live as long as the soak."""

    def __init__(self, log: Path, processes: dict[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self.rows: list[tuple[float, str, float, int, int]] = []
        self._file = open(log / "samples.csv", "w", newline="", encoding="utf-8")  # noqa: SIM115  # open as long as the campaign
        self._writer = csv.writer(self._file)
        self._writer.writerow(["seconds", "process", *BOUNDS])
        self._began = time.monotonic()
        self._sampled_at = 0.0

    def sample(self) -> None:
        """One row for each process, every few seconds."""
        at = time.monotonic()
        if at - self._sampled_at < SAMPLE_EVERY_S:
            return
        self._sampled_at = at
        for name, process in self._processes.items():
            with process.oneshot():
                row = (round(at - self._began, 2), name, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
            self.rows.append(row)
            self._writer.writerow(row)
        self._file.flush()

    def slopes(self) -> dict[str, dict[str, float]]:
        """Growth in an hour of each figure of each process, by least squares over what comes after the warm-up."""
        found: dict[str, dict[str, float]] = {}
        last_s = max(row[0] for row in self.rows)
        for name in self._processes:
            late = np.array([[row[0], *row[2:]] for row in self.rows if row[1] == name and row[0] >= WARM_SHARE * last_s])
            found[name] = {
                quantity: round(float(np.polyfit(late[:, 0] / 3600, late[:, index], 1)[0]), 3) if len(late) > 2 else 0.0
                for index, quantity in enumerate(BOUNDS, 1)
            }
        return found

    def ends(self) -> dict[str, dict[str, float]]:
        """The first and the last value of each."""
        found = {}
        for name in self._processes:
            own = [row for row in self.rows if row[1] == name]
            found[name] = {
                f"{quantity}_{which}": round(row[index], 1)
                for which, row in (("first", own[0]), ("last", own[-1]))
                for index, quantity in enumerate(BOUNDS, 2)
            }
        return found

    def draw(self, path: Path) -> None:
        """A picture: one panel for each figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 8), layout="constrained")
        panels = figure.subplots(len(BOUNDS), 1, sharex=True)
        for index, (quantity, panel) in enumerate(zip(BOUNDS, panels, strict=True), 2):
            for name in self._processes:
                own = [row for row in self.rows if row[1] == name]
                panel.plot([row[0] / 60 for row in own], [row[index] for row in own], label=name, linewidth=1)
            panel.set_ylabel(quantity.replace("rss_mb", "resident MB"))
            panel.set_ylim(bottom=0)
        panels[0].legend(fontsize="small")
        panels[-1].set_xlabel("minutes")
        figure.savefig(path, dpi=110)

    def close(self) -> None:
        """End the file."""
        self._file.close()


def run(options: argparse.Namespace) -> int:
    """The campaign."""
    campaign = Campaign("soak", options.count, options.seed, options.log)
    with campaign.running(), contextlib.ExitStack() as stack:
        path = tiny_model(options.log)
        with campaign.bound("the start of the servers", START_BOUND_S):
            local = stack.enter_context(swarmtune.LocalSwarm(path, [*SPANS, *SPANS], dtype="float32", threads=1, log_dir=options.log))
            swarm = stack.enter_context(
                swarmtune.connect(local.initial_peers, micro_batch_tokens=MICRO_BATCH_TOKENS, call_timeout_s=CALL_TIMEOUT_S, history=campaign.history)
            )
            both = stack.enter_context(pair(campaign, path, swarm))
        fleet = Fleet(campaign, local)
        stack.callback(fleet.close)
        stay = local.servers[: len(SPANS)]  # these are not killed, so that their slopes mean something; their daemons are
        watch = Watch(options.log, {"client": os.getpid(), **{f"server {server.span}": server.pid for server in stay}})
        stack.callback(watch.close)
        train(campaign, options, fleet, swarm, both, watch, local)
        judge(campaign, watch, options.log)
    return campaign.finish()


def train(
    campaign: Campaign, options: argparse.Namespace, fleet: Fleet, swarm: swarmtune.Swarm, both: Pair, watch: Watch, local: swarmtune.LocalSwarm
) -> None:
    """Steps with pauses until the time is over, with the wanted faults spread over it."""
    for _ in range(QUIET_STEPS):
        both.step()
    began, length_s = time.monotonic(), options.minutes * 60
    due_s = [length_s * (number + 1) / (campaign.wanted + 1) for number in range(campaign.wanted)]
    while (passed_s := time.monotonic() - began) < length_s or due_s:
        if due_s and passed_s >= due_s[0]:
            fleet.reachable = swarm.loop.run(reachable(swarm))
            if strike(campaign, fleet, local):
                del due_s[0]
        both.step()
        watch.sample()
        time.sleep(options.pause_s)
    campaign.facts["retries"] = swarm.traffic().retries


def strike(campaign: Campaign, fleet: Fleet, local: swarmtune.LocalSwarm) -> bool:
    """One fault: a server that may die does, or a daemon of anybody; whether it was possible now."""
    kind = campaign.random.choice(("kills", "client daemons", "server daemons"))
    if kind == "kills":
        mortal = [server for server in fleet.spare() if server in local.servers[len(SPANS) :]]
        if not mortal or not fleet.kill(victim := campaign.random.choice(mortal)):
            return False
        campaign.fault(kind, server=fleet.number(victim))
        return True
    owner = os.getpid() if kind == "client daemons" else campaign.random.choice(local.servers[: len(SPANS)]).pid
    daemon = daemon_of(owner)
    if daemon is None or not send(daemon, 9):
        return False
    campaign.fault(kind, daemon=daemon)
    return True


def judge(campaign: Campaign, watch: Watch, log: Path) -> None:
    """Slopes into the verdict; growth is an error where there are samples enough to tell."""
    slopes = watch.slopes()
    campaign.facts |= {"growth_an_hour": slopes, "ends": watch.ends()}
    watch.draw(log / "soak.png")
    if len(watch.rows) / len(slopes) < NEEDED_SAMPLES:
        return
    hours = watch.rows[-1][0] / 3600
    for name, found in slopes.items():
        for quantity, growth in found.items():
            if growth * min(1.0, hours) > BOUNDS[quantity]:
                campaign.error(f"{name}: {quantity} grow by {growth:.1f} in an hour")
