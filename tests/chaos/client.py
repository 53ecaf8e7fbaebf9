"""``scripts/chaos client``: a training command is killed and resumed until it is finished; its adapter must be that of the unbroken run."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

import swarmtune
from tests.chaos.campaign import ROOT, Campaign, environment
from tests.chaos.processes import descendants, runs
from tests.chaos.servers import START_BOUND_S

POCKET = ROOT / "swarmtune" / "assets" / "pocket_bloom"
MOMENTS = {"in a step": 0.35, "in a checkpoint": 0.45, "while starting": 0.1, "at the end": 0.1}
MAX_NEW_STEPS = 6
LIFE_BOUND_S = 240.0
"""A start takes seconds, a step less than one."""
GONE_BOUND_S = 15.0
POLL_S = 0.001


class Life:
    """One process of the training command, from its start to its end."""

    def __init__(self, words: list[str], cwd: Path, log: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swarmtune.cli", *words],
            cwd=cwd, env={**environment(), "XDG_CACHE_HOME": str(cwd / "cache")},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self.steps: list[int] = []
        self.began = time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def _read(self, log: Path) -> None:
        assert self._process.stdout is not None
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"--- process {self.pid}\n")
            for line in self._process.stdout:
                file.write(line)
                if found := re.match(r"step (\d+)/", line):
                    self.steps.append(int(found[1]))

    @property
    def code(self) -> int | None:
        """Exit code; ``None`` while it runs."""
        return self._process.poll()

    def kill(self) -> bool:
        """SIGKILL; whether it was still running."""
        alive = self.code is None
        if alive:
            self._process.kill()
        self.wait(GONE_BOUND_S)
        return alive

    def wait(self, seconds: float) -> None:
        """Until it has ended, and all that it said has been read."""
        self._process.wait(seconds)
        self._reader.join(seconds)
        assert self._process.stdout is not None
        self._process.stdout.close()


def run(options: argparse.Namespace) -> int:
    """The campaign."""
    campaign = Campaign("client", options.count, options.seed, options.log)
    with campaign.running(), contextlib.ExitStack() as stack:
        with campaign.bound("the start of the servers", START_BOUND_S):
            local = stack.enter_context(swarmtune.LocalSwarm(POCKET, ["0:2", "2:4"], dtype="float32", threads=1, log_dir=options.log))
        name = time.strftime("%H%M%S")
        words = ["recipe=lora_bloom", f"trainer.max_steps={options.steps}", "trainer.limit_val_batches=1", "data.batch_size=2"]
        words += ["callbacks.checkpoint_every_steps=1", "callbacks.progress=lines", "callbacks.line_every_s=0.001", "resume=auto"]
        words += ["swarm=join", f"swarm.initial_peers=[{','.join(repr(address) for address in local.initial_peers)}]"]
        with campaign.bound("the unbroken run", LIFE_BOUND_S), started([*words, f"run_dir={name}-quiet"], options.log) as life:
            while life.code is None:
                time.sleep(0.05)
                campaign.tell()
        if life.code != 0:
            raise RuntimeError(f"the unbroken run ended with code {life.code}: see {options.log / 'runs.txt'}")
        number = 0
        while campaign.counts["faults"] < campaign.wanted:
            number += 1
            run_dir = f"{name}-{number}"
            finish_one(campaign, [*words, f"run_dir={run_dir}"], options.log, options.log / run_dir, options.steps)
            with_same = same_adapter(options.log / f"{name}-quiet", options.log / run_dir)
            campaign.counts["runs finished"] += 1
            campaign.note("finished", run=run_dir, same=with_same)
            campaign.compare(with_same)
    return campaign.finish()


@contextlib.contextmanager
def started(words: list[str], log: Path) -> Iterator[Life]:
    """A life that does not outlive this block."""
    life = Life(words, log, log / "runs.txt")
    try:
        yield life
    finally:
        life.kill()


def finish_one(campaign: Campaign, words: list[str], log: Path, run_dir: Path, max_steps: int) -> None:
    """Lives of one run until one ends by itself."""
    random = campaign.random
    while True:
        moment = random.choices(list(MOMENTS), list(MOMENTS.values()))[0] if campaign.counts["faults"] < campaign.wanted else ""
        checkpoints = run_dir / "checkpoints"
        stale = partials(checkpoints)  # what the last life left behind
        with campaign.bound(f"a life of {run_dir.name}", LIFE_BOUND_S), started(words, log) as life:
            wait_for(moment, life, checkpoints, stale, max_steps, campaign)
            family = [life.pid, *descendants(life.pid)]
            partial = partials(checkpoints) - stale
            if life.kill():
                kind = moment if moment != "in a checkpoint" or partial else "right after a checkpoint"
                told = {"partial": sorted(partial), "life_s": round(time.monotonic() - life.began, 2)}
                campaign.fault(f"kills {kind}", run=run_dir.name, steps=life.steps[-1:], **told)
            elif moment:
                campaign.note("missed", moment=moment, steps=life.steps[-1:])
            if life.code not in (0, -signal.SIGKILL):
                raise RuntimeError(f"a life of {run_dir.name} ended with code {life.code}: see {log / 'runs.txt'}")
        left_behind(campaign, family)
        campaign.tell()
        if life.code == 0 or (run_dir / "summary.json").exists():  # one that was killed after its last file is finished, too
            return


def wait_for(moment: str, life: Life, checkpoints: Path, stale: set[str], max_steps: int, campaign: Campaign) -> None:
    """Until the moment to kill, or the end of the life."""
    random = campaign.random
    new_steps, fraction = random.randrange(MAX_NEW_STEPS), random.random()
    due_at = 0.0
    while life.code is None:
        now = time.monotonic()
        if due_at:
            if now >= due_at:
                return
        elif moment == "while starting":
            due_at = life.began + 0.3 + 5 * fraction
        elif moment == "in a step" and len(life.steps) > new_steps:
            due_at = now + 0.5 * fraction
        elif moment == "in a checkpoint" and len(life.steps) > new_steps and partials(checkpoints) - stale:
            due_at = now + 0.02 * fraction * (fraction > 0.3)
        elif moment == "at the end" and life.steps[-1:] == [max_steps]:
            due_at = now + 0.8 * fraction
        time.sleep(POLL_S)


def partials(checkpoints: Path) -> set[str]:
    """Names of checkpoints that are being written."""
    try:
        return {name for name in os.listdir(checkpoints) if name.startswith(".step=")}
    except OSError:
        return set()


def left_behind(campaign: Campaign, family: list[int]) -> None:
    """What a killed client had started must go by itself."""
    ends_at = time.monotonic() + GONE_BOUND_S
    while any(runs(pid) for pid in family):
        if time.monotonic() > ends_at:
            campaign.error(f"processes {[pid for pid in family if runs(pid)]} outlived their client")
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def same_adapter(quiet: Path, loud: Path) -> bool:
    """Whether two runs have written the same adapter, to the bit."""
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (quiet, loud))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
