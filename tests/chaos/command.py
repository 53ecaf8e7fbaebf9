"""The command line of the nemesis."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import time
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
VERBS = {
    "simulate": (10_000, "kills, and as many other faults, at numbered points of steps, on a simulated clock"),
    "servers": (300, "SIGKILL a server in each step, at a seeded moment of it; never the last one of its blocks"),
    "cuts": (10_000, "cut streams at any byte of our frames, in both directions; some are damaged, stalled or slowed down"),
    "daemons": (100, "kill the p2p daemons of the client and of servers; some are frozen"),
    "client": (50, "kill the training command, also inside checkpoints, and resume it until it is finished"),
    "soak": (20, "train for an hour with a fault every few minutes; memory, descriptors and threads must not grow"),
    "cycles": (200, "start and end servers and a client in every way; nothing of theirs may stay"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one campaign; 0 when its verdict is good."""
    options = parser().parse_args(argv)
    if options.verb == "judge":
        return judge(options.file)
    if options.log is None:
        options.log = Path("runs") / "chaos" / f"{options.verb}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    options.log = options.log.absolute()
    options.log.mkdir(parents=True, exist_ok=True)
    # What the library says of the faults belongs in a file; there is much of it.
    logging.basicConfig(
        filename=options.log / "client.log", filemode="w", level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    print(f"{options.verb}: {options.count} faults, seed {options.seed}, log in {options.log}", flush=True)
    return importlib.import_module(f"tests.chaos.{options.verb}").run(options)


def parser() -> argparse.ArgumentParser:
    """The options of each verb."""
    made = argparse.ArgumentParser(prog="scripts/chaos", description="Faults on purpose, seeded and counted, and a verdict on what came of them.")
    verbs = made.add_subparsers(dest="verb", required=True)
    found: dict[str, argparse.ArgumentParser] = {}
    for verb, (count, what) in VERBS.items():
        found[verb] = verbs.add_parser(verb, help=what, description=what)
        found[verb].add_argument("--count", type=int, default=count, help=f"faults to make (default: {count})")
        found[verb].add_argument("--seed", type=int, default=1, help="of everything that is drawn")
        found[verb].add_argument("--log", type=Path, default=None, help="directory for faults, history, verdict and logs")
    found["servers"].add_argument("--mix", action="store_true", help="also freeze servers (SIGSTOP), some of which are killed while frozen")
    found["servers"].add_argument("--hard", action="store_true", help="kill as soon as another server runs, whether the client can know that or not")
    found["servers"].add_argument("--replicas", type=int, default=2, help="servers of each span")
    found["simulate"].add_argument("--pairs", action="store_true", help="each fault at each point, alone and with each fault at each later point")
    found["daemons"].add_argument("--whose", choices=("both", "client", "server"), default="both", help="whose daemons")
    found["daemons"].add_argument("--pause-s", type=float, default=0.0, help="after each step: 0 kills daemons that have only just been replaced")
    found["client"].add_argument("--steps", type=int, default=40, help="optimizer steps of one run")
    found["soak"].add_argument("--minutes", type=float, default=60.0, help="how long")
    found["soak"].add_argument("--pause-s", type=float, default=0.2, help="between steps")
    judging = verbs.add_parser("judge", help="print the verdict on a history file; 1 if anything is found")
    judging.add_argument("file", type=Path)
    return made


def judge(path: Path) -> int:
    """Judge a history that a client wrote."""
    from swarmtune.errors import UsageError
    from swarmtune.remote.verdict import judge as judge_history

    try:
        verdict = judge_history(path)
    except UsageError as error:
        print(error)
        return 2
    for name in ("lost", "doubled", "out_of_plan", "over_deadline", "unended"):
        for sentence in getattr(verdict, name):
            print(f"{name}: {sentence}")
    print(json.dumps({"clean": verdict.clean, **verdict.counts()}))
    return 0 if verdict.clean else 1
