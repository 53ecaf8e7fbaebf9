"""``scripts/bench train --curves``: seconds per step over tokens per step, with 1, 2, 4 and 8 servers, local PEFT beside each.

A step of more tokens than ``PIECE_TOKENS`` is taken in pieces whose gradients add up, on both sides alike: its activations would not fit otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bench_model import local_peft, lora, reference_model, spans_of, thread_budget, token_ids, trainer
from bench_place import Preset, serving
from bench_report import Panel, Report, Row, say, setting
from torch import nn

import swarmtune
from swarmtune.swarm import Swarm

SERVERS = (1, 2, 4, 8)
TOKENS = (128, 512, 2048, 8192, 32768, 131072)
PIECE_TOKENS = 8192
MARGIN = 1.3
"""A point is begun only where so many times what it should take is left."""


@dataclass(frozen=True, slots=True)
class Point:
    """Seconds per step, median of the rounds."""

    servers: int
    tokens: int
    local_s: float
    swarm_s: float

    @property
    def ratio(self) -> float:
        """The swarm's speed over that of local PEFT."""
        return self.local_s / self.swarm_s


def measure(options: argparse.Namespace, directory: Path, preset: Preset) -> Report:
    """All points that the budget allows, those of each number of servers with an equal share of what is left."""
    path = reference_model(options.hidden, options.layers, directory / "model")
    local = local_peft(path, options.dtype)
    counts = [count for count in SERVERS if count <= options.layers]
    points: list[Point] = []
    ends_at = time.monotonic() + options.budget_s
    with thread_budget(options):
        for number, count in enumerate(counts):
            until = time.monotonic() + max(0.0, ends_at - time.monotonic()) / (len(counts) - number)
            with (
                serving(path, spans_of(options.layers, count), options, directory, preset.link) as place,
                place.connect(micro_batch_tokens=options.micro_batch_tokens) as swarm,
            ):
                points += curve(options, count, local, path, swarm, until)
    says = [preset.says, f"{options.threads} threads", f"micro-batches of {options.micro_batch_tokens} tokens", f"rows of {options.sequence}"]
    name = "_".join(["bench_curves", options.preset, *([] if options.dtype == "float32" else [options.dtype])])
    return Report("curves", name, f"{setting(options, *says)}, seconds per step", rows_of(points), panels_of(points))


def curve(options: argparse.Namespace, count: int, local: nn.Module, path: Path, swarm: Swarm, until: float) -> list[Point]:
    """The points of one number of servers, from few tokens to many, as far as they can be done by ``until``; the first one always is."""
    remote = swarmtune.load_causal_lm(path, swarm, adapter=lora())
    points: list[Point] = []
    turn_s = 0.0
    for tokens in TOKENS:
        rows = max(1, tokens // options.sequence)
        if points:
            expected_s = turn_s * (options.rounds + 1) * rows * options.sequence / points[-1].tokens
            if time.monotonic() + MARGIN * expected_s > until:
                say("curves", preset=options.preset, servers=count, tokens=tokens, left_out=f"it would take about {expected_s:.0f} s")
                break
        point, turn_s = one_point(options, count, local, remote, rows)
        found = {"local_s": round(point.local_s, 4), "swarm_s": round(point.swarm_s, 4), "ratio": round(point.ratio, 4)}
        say("curves", preset=options.preset, servers=count, tokens=point.tokens, **found)
        points.append(point)
    return points


def one_point(options: argparse.Namespace, count: int, local: nn.Module, remote: nn.Module, rows: int) -> tuple[Point, float]:
    """Local PEFT and swarm in turns over a batch of ``rows``, after one step of each that is not counted; also the seconds of one turn of both."""
    ids = token_ids(rows, options.sequence)
    piece_rows = max(1, PIECE_TOKENS // options.sequence)
    sides = {"local": trainer(local, ids, piece_rows), "swarm": trainer(remote, ids, piece_rows)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + 1):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return Point(count, ids.numel(), medians["local"], medians["swarm"]), sum(medians.values())


def rows_of(points: list[Point]) -> list[Row]:
    """One line per point."""
    return [
        {
            "figure": f"{point.servers} server{'s' if point.servers > 1 else ''}, {point.tokens} tokens: swarm s, local PEFT s, swarm / local PEFT",
            "value": f"{point.swarm_s:.3f}, {point.local_s:.3f}, {point.ratio:.3f}",
            "ratio": round(point.ratio, 4),
        }
        for point in points
    ]


def panels_of(points: list[Point]) -> list[Panel]:
    """Seconds and ratios over tokens."""
    counts = sorted({point.servers for point in points})
    tokens = sorted({point.tokens for point in points})
    here = [statistics.median(point.local_s for point in points if point.tokens == each) for each in tokens]
    seconds, ratios = {"local PEFT": (tokens, here)}, {}
    for count in counts:
        own = [point for point in points if point.servers == count]
        name, x = f"{count} server{'s' if count > 1 else ''}", [point.tokens for point in own]
        seconds[name] = (x, [point.swarm_s for point in own])
        ratios[name] = (x, [point.ratio for point in own])
    return [
        Panel("seconds per step", series=seconds, x="tokens per step", y="s", log=True),
        Panel("speed against local PEFT", series=ratios, x="tokens per step", y="swarm / local PEFT", log=True, rule=1.0),
    ]
