"""``scripts/bench train``: a training step of the swarm against the same step of local PEFT, in turns, and what the step is made of."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_model import BodyClock, local_peft, lora, middle_half, reference_model, spans_of, thread_budget, token_ids, trainer
from bench_place import Place, complete, serving
from bench_report import TURN, Panel, Report, Row, say, setting
from torch import nn

import swarmtune
from swarmtune.errors import SwarmError
from swarmtune.remote.batch import micro_batches
from swarmtune.swarm import Swarm, SwarmTraffic

LOCAL, SWARM, COMPILED = "local PEFT", "swarm", "local PEFT, compiled"
BATCH = (8, 128)
"""Rows and tokens of the reference batch, which no heading names."""
COMPILE_S = 300.0
"""How long servers may take until all forwards of a step run compiled code."""
SERVER_PARTS = ("compute_s", "queue_s", "network_s", "block_forwards", "bytes_up", "bytes_down")


@dataclass(slots=True)
class Turns:
    """What local PEFT and the swarm did in turns.

    Attributes:
        seconds: per step, one number a turn, by side.
        losses: of the last step, by side.
        router_share: cores that the emulated network took meanwhile.
    """

    steps: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    router_s: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """The swarm's speed over that of local PEFT, turn by turn."""
        return [a / b for a, b in zip(self.seconds[LOCAL], self.seconds[SWARM], strict=True)]


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """One swarm, or curves over several."""
    preset = complete(options)
    if options.curves:
        import bench_curves

        return bench_curves.measure(options, directory, preset)
    spans = spans_of(options.layers, options.servers)
    path = reference_model(options.hidden, options.layers, directory / "model")
    local = local_peft(path, options.dtype, options.device)
    clock, ids = BodyClock(local), token_ids(options.rows, options.sequence).to(options.device)
    with (
        thread_budget(options),
        serving(path, spans, options, directory, preset.link) as place,
        place.connect(
            micro_batch_tokens=options.micro_batch_tokens,
            max_in_flight=options.in_flight,
            pipeline=options.pipeline,
            compile=options.compile,
            codec=options.codec,
        ) as swarm,
    ):
        torch.manual_seed(1)
        remote = swarmtune.load_causal_lm(path, swarm, adapter=lora(), device=options.device)
        sides = {LOCAL: trainer(local, ids, clock=clock), SWARM: trainer(remote, ids)}
        if options.compile == "auto":
            sides[COMPILED] = trainer(compiled(local_peft(path, options.dtype, options.device)), ids)
        for run in sides.values():
            run()
        if options.compile == "auto":
            wait_until_compiled(swarm, sides)
        clock.reset()
        before = swarm.traffic()
        turns = take_turns(sides, options, place)
        after = swarm.traffic()
        adapter_bytes = sum(parameter.nbytes for parameter in remote.adapter.parameters())
    counts = Counts(options, before, after, turns.steps, adapter_bytes)
    body_s = (clock.forward_s + clock.backward_s) / turns.steps
    rows = [*speed_rows(options, turns), *counts.rows(), *server_rows(counts, body_s, clock.forward_s / turns.steps)]
    if place.lab is not None:
        rows.append({"figure": "the emulated network's own share of the cores", "value": f"{turns.router_s / turns.wall_s:.2f} of a core"})
    batch = [] if (options.rows, options.sequence) == BATCH else [f"{options.rows} x {options.sequence} tokens"]
    says = [preset.says, *batch, f"{options.servers} servers with {options.threads} threads", f"micro-batches of {options.micro_batch_tokens} tokens"]
    says += [f"codec {options.codec}"] if options.codec != "none" else []
    says += [torch.cuda.get_device_name()] if options.device == "cuda" else []
    says += ["compiled blocks on the servers"] if options.compile == "auto" else []
    name = "_".join(
        [
            "bench_train",
            options.preset,
            *([] if options.dtype == "float32" else [options.dtype]),
            *([f"{options.rows}x{options.sequence}"] if batch else []),
            *(["compiled"] if options.compile == "auto" else []),
            *([] if options.device == "cpu" else [options.device]),
        ]
    )
    return Report("train", name, setting(options, *says), rows, panels(options, turns, counts, body_s))


def compiled(model: nn.Module) -> nn.Module:
    """The same model with its blocks compiled by torch as it comes; servers may multiply otherwise (``servers/products.py``)."""
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    torch._dynamo.config.recompile_limit = 4 * len(layers)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    return model


def wait_until_compiled(swarm: Swarm, sides: Mapping[str, Callable[[], float]]) -> None:
    """Take steps, on all sides alike, until every forward of one has run compiled code.

    Raises:
        SwarmError: that does not come.
    """
    ends_at = time.monotonic() + COMPILE_S
    while True:
        before = swarm.traffic()
        for run in sides.values():
            run()
        after = swarm.traffic()
        if 2 * (after.compiled - before.compiled) >= after.calls - before.calls:
            return
        if time.monotonic() > ends_at:
            raise SwarmError(f"the servers did not compile their blocks within {COMPILE_S:.0f} s: their logs say why")


def take_turns(sides: Mapping[str, Callable[[], float]], options: argparse.Namespace, place: Place) -> Turns:
    """Each round, every side takes its steps; who begins alternates."""
    turns = Turns(options.rounds * options.steps, {name: [] for name in sides})
    began, router_s = time.perf_counter(), place.lab.router_cpu_s() if place.lab is not None else 0.0
    for turn in range(options.rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            for _ in range(options.steps):
                turns.losses[name] = sides[name]()
            turns.seconds[name].append((time.perf_counter() - started) / options.steps)
            rate = round(options.rows * options.sequence / turns.seconds[name][-1], 1)
            say("train", preset=options.preset, turn=turn, what=name, step_s=round(turns.seconds[name][-1], 4), tok_s=rate)
        say("train", preset=options.preset, turn=turn, what="swarm / local PEFT", ratio=round(turns.ratios[-1], 4))
    turns.wall_s = time.perf_counter() - began
    turns.router_s = place.lab.router_cpu_s() - router_s if place.lab is not None else 0.0
    return turns


class Counts:
    """What the steps between two readings of a connection's totals were made of, per step and per micro-batch."""

    def __init__(self, options: argparse.Namespace, before: SwarmTraffic, after: SwarmTraffic, steps: int, adapter_bytes: int) -> None:
        self._layers, self._steps, self._adapter_bytes = options.layers, steps, adapter_bytes
        self.micro_batches = len(micro_batches(options.rows, options.sequence, options.micro_batch_tokens))
        self.hidden_bytes = options.rows * options.sequence * options.hidden * getattr(torch, options.dtype).itemsize
        self.payload = {kind: (total - before.payload.get(kind, 0)) / steps for kind, total in sorted(after.payload.items())}
        self.wire = {"up": (after.bytes_up - before.bytes_up) / steps, "down": (after.bytes_down - before.bytes_down) / steps}
        self.calls = (after.calls - before.calls) / steps
        self.retries = after.retries - before.retries
        earlier = {server.label: server for server in before.servers}
        self.servers = {
            part: sum(getattr(server, part) - (getattr(earlier[server.label], part) if server.label in earlier else 0) for server in after.servers)
            / steps
            for part in SERVER_PARTS
        }

    @property
    def in_hidden_states(self) -> dict[str, float]:
        """The payload of a micro-batch in units of its hidden states, by direction and kind; the same number as a step's in units of the batch's."""
        return {kind: size / self.hidden_bytes for kind, size in self.payload.items()}

    @property
    def block_forwards(self) -> float:
        """How often each block runs forward for a micro-batch."""
        return self.servers["block_forwards"] / (self.micro_batches * self._layers)

    def rows(self) -> list[Row]:
        """Lines of the table. X is one tensor of hidden states."""
        carried = self.in_hidden_states
        adapters = {way: sum(size for kind, size in self.payload.items() if kind.startswith(way) and "kwarg" in kind) for way in ("up", "down")}
        payload = sum(self.payload.values())
        return [
            {"figure": "micro-batches per step", "value": self.micro_batches},
            {"figure": "block forwards per micro-batch and block", "value": round(self.block_forwards, 3)},
            {"figure": "hand-offs (calls) per micro-batch", "value": round(self.calls / self.micro_batches, 2)},
            {"figure": "calls asked again", "value": self.retries},
            *({"figure": f"{kind} per micro-batch, in X", "value": round(size, 3)} for kind, size in carried.items()),
            {"figure": "hidden states and their gradients per micro-batch, in X", "value": round(without_kwargs(carried), 3)},
            {"figure": "all payload per micro-batch, in X", "value": round(sum(carried.values()), 3)},
            *(
                {"figure": f"adapter bytes {way} per optimizer step, in adapters", "value": round(size / self._adapter_bytes, 3)}
                for way, size in adapters.items()
            ),
            {
                "figure": "frames, headers and pings beside the payload, per mille of it",
                "value": round(1000 * (sum(self.wire.values()) / payload - 1), 3),
            },
        ]


def without_kwargs(carried: Mapping[str, float]) -> float:
    """What travels of hidden states and their gradients, both ways."""
    return sum(size for kind, size in carried.items() if "kwarg" not in kind)


def speed_rows(options: argparse.Namespace, turns: Turns) -> list[Row]:
    """Speed of both sides, and whether both did the same."""
    rates = {name: options.rows * options.sequence / statistics.median(times) for name, times in turns.seconds.items()}
    difference = abs(turns.losses[SWARM] - turns.losses[LOCAL]) / abs(turns.losses[LOCAL])
    return [
        {"figure": "local PEFT, training tok/s", "value": round(rates[LOCAL], 1)},
        {"figure": "swarm, training tok/s", "value": round(rates[SWARM], 1)},
        {"figure": f"swarm / local PEFT (median of {options.rounds} turns)", "value": round(statistics.median(turns.ratios), 3)},
        *compiled_rows(turns, rates),
        {"figure": "the middle half of these ratios", "value": middle_half(turns.ratios)},
        {"figure": "loss of the last step, relative difference", "value": f"{difference:.2g}"},
    ]


def compiled_rows(turns: Turns, rates: Mapping[str, float]) -> list[Row]:
    """The same against compiled blocks here, where those were measured."""
    if COMPILED not in turns.seconds:
        return []
    ratios = [here / there for here, there in zip(turns.seconds[COMPILED], turns.seconds[SWARM], strict=True)]
    return [
        {"figure": "local PEFT with compiled blocks, training tok/s", "value": round(rates[COMPILED], 1)},
        {"figure": "swarm / local PEFT with compiled blocks", "value": round(statistics.median(ratios), 3)},
    ]


def server_rows(counts: Counts, body_s: float, forward_s: float) -> list[Row]:
    """Seconds that servers computed against those of the same blocks here."""
    return [
        {"figure": "blocks here, forward and backward of a step, s", "value": round(body_s, 4)},
        {"figure": "of these, forward", "value": round(forward_s, 4)},
        {"figure": "servers, compute of a step, s (all together)", "value": round(counts.servers["compute_s"], 4)},
        {"figure": "servers' compute / blocks here", "value": round(counts.servers["compute_s"] / body_s, 3)},
        {"figure": "servers, waiting of a step's calls, s (all together)", "value": round(counts.servers["queue_s"], 4)},
        {"figure": "network and its ends, s of a step's calls (all together)", "value": round(counts.servers["network_s"], 4)},
    ]


def panels(options: argparse.Namespace, turns: Turns, counts: Counts, body_s: float) -> list[Panel]:
    """Speed by turn, payload by kind, seconds of a step."""
    tokens, numbers = options.rows * options.sequence, list(range(1, options.rounds + 1))
    speeds = {name: (numbers, [tokens / seconds for seconds in times]) for name, times in turns.seconds.items()}
    seconds = {f"{name}: a step": statistics.median(times) for name, times in turns.seconds.items()}
    seconds |= {"local PEFT: blocks": body_s, "servers: compute": counts.servers["compute_s"], "servers: queue": counts.servers["queue_s"]}
    return [
        Panel("training speed", series=speeds, x=TURN, y="tokens/s"),
        Panel("payload per micro-batch (1 is one tensor of hidden states)", bars=counts.in_hidden_states),
        Panel("seconds per step (servers: all together)", bars={**seconds, "network": counts.servers["network_s"]}),
    ]
