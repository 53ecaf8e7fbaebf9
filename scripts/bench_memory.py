"""``scripts/bench memory``: the most memory that servers and a client take beyond the weights, while loading and while training.

What the interpreter and the libraries take is measured by the same run over a model of hidden size ``FLOOR_HIDDEN``, and left out. A peak is the
kernel's (``VmHWM`` of ``/proc/PID/status``), set back before each phase through ``/proc/PID/clear_refs``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_child import child
from bench_model import HEADS, VOCABULARY, reference_model, spans_of
from bench_place import complete, serving
from bench_report import Panel, Report, Row, say, setting
from transformers import AutoModelForCausalLM, BloomConfig

from servers.memory import IDLE_S
from swarmtune.errors import UsageError

FLOOR_HIDDEN = 64


@dataclass(frozen=True, slots=True)
class Seen:
    """Bytes of one process: the most until it was ready, what it held then, the most while training, what it held then, and once it was idle."""

    loading: int
    ready: int
    training: int
    after: int
    idle: int


@dataclass(frozen=True, slots=True)
class Run:
    """One model: every server and the client.

    Attributes:
        client_weights: bytes of stem, head and adapter, as the client holds them.
        reset: whether the peaks of training could be told from those of loading.
    """

    servers: tuple[Seen, ...]
    client: Seen
    client_weights: int
    reset: bool


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """The model asked for, and a tiny one for what is not its own."""
    if not Path("/proc/self/status").exists():
        raise UsageError("memory reads /proc/PID/status, which this system does not have: run it on Linux")
    complete(options)
    spans = spans_of(options.layers, options.servers)
    tiny = one_run(options, spans, FLOOR_HIDDEN, directory / "tiny")
    real = one_run(options, spans, options.hidden, directory / "model") if options.hidden != FLOOR_HIDDEN else tiny
    blocks = max(int(span.split(":")[1]) - int(span.split(":")[0]) for span in spans)
    per_block, everything = weights(options.hidden, options.layers, options.dtype)
    held, tiny_held = blocks * per_block, blocks * weights(FLOOR_HIDDEN, options.layers, options.dtype)[0]
    rows: list[Row] = [{"figure": "weights of a server, of the whole model, MB", "value": f"{mb(held)}, {mb(everything)}"}]
    bars: dict[str, float] = {}
    sides = {
        "server": (worst(tiny.servers), worst(real.servers), held - tiny_held, held),
        "client": (tiny.client, real.client, real.client_weights - tiny.client_weights, everything),
    }
    for who, (floor, seen, own, whole) in sides.items():
        own_rows, own_bars = rows_of(who, floor, seen, own, whole)
        rows, bars = rows + own_rows, bars | own_bars
    rows.insert(1, {"figure": "weights that the client holds (stem, head, adapter), MB", "value": mb(real.client_weights)})
    if not real.reset:
        rows.append({"figure": "the kernel does not set peaks back here", "value": "those of training include loading"})
    says = f"{setting(options)}, {options.servers} servers, {options.rows} x {options.sequence} tokens, micro-batches of {options.micro_batch_tokens}"
    return Report("memory", "bench_memory", says, rows, [Panel("peak beyond weights and libraries, MB", bars=bars)])


def rows_of(who: str, floor: Seen, seen: Seen, own: int, whole: int) -> tuple[list[Row], dict[str, float]]:
    """What one side took beyond ``own`` bytes of weights; shares are of ``whole``: a server's weights, or the model's for the client."""
    of = "its weights" if who == "server" else "the model"
    rows, bars = [], {}
    for phase in ("loading", "training"):
        peak, least = getattr(seen, phase), getattr(floor, phase)
        beyond = peak - least - own
        figure = f"{who}, {phase}: peak beyond weights and libraries, MB; share of {of}"
        rows.append({"figure": figure, "value": f"{mb(beyond)}; {beyond / whole:.1%}", "ratio": round(beyond / whole, 4)})
        rows.append({"figure": f"{who}, {phase}: peak in all, of which libraries, MB", "value": f"{mb(peak)}, {mb(least)}"})
        bars[f"{who}, {phase}"] = beyond / 1e6
    for when, name in (("after training", "after"), *([("when idle after that", "idle")] if who == "server" else [])):
        kept = getattr(seen, name) - seen.ready - (getattr(floor, name) - floor.ready)
        rows.append({"figure": f"{who}: kept {when} beyond what it held before, MB; share of {of}", "value": f"{mb(kept)}; {kept / whole:.1%}"})
    return rows, bars


def mb(size: int) -> str:
    """Megabytes."""
    return f"{size / 1e6:.1f}"


def worst(servers: tuple[Seen, ...]) -> Seen:
    """The largest number of any server, in each phase."""
    return Seen(*(max(getattr(seen, phase) for seen in servers) for phase in ("loading", "ready", "training", "after", "idle")))


def weights(hidden: int, layers: int, dtype: str) -> tuple[int, int]:
    """Bytes of one block, and of the whole model."""
    with torch.device("meta"):
        config = BloomConfig(hidden_size=hidden, n_layer=layers, n_head=HEADS, vocab_size=VOCABULARY)
        model = AutoModelForCausalLM.from_config(config)
    itemsize = getattr(torch, dtype).itemsize
    block = sum(parameter.numel() for parameter in model.transformer.h[0].parameters()) * itemsize
    return block, sum(parameter.numel() for parameter in model.parameters()) * itemsize


def one_run(options: argparse.Namespace, spans: list[str], hidden: int, directory: Path) -> Run:
    """Servers and a client in a process of its own; their peaks until they are ready, and while they train."""
    path = reference_model(hidden, options.layers, directory)
    words = (path, options.rows, options.sequence, options.micro_batch_tokens, options.threads)
    with child("bench_client.py", words, directory) as trains, serving(path, spans, options, directory) as place:
        ready = {pid: status(pid) for pid in place.pids}
        reset = all([set_back(pid) for pid in place.pids])
        first, last = trains.ask(",".join(place.addresses) + "\n0"), trains.ask(options.steps)
        trained = {pid: status(pid) for pid in place.pids}
        time.sleep(2.2 * IDLE_S)
        idle = {pid: status(pid)["VmRSS"] for pid in place.pids}
    servers = tuple(Seen(ready[pid]["VmHWM"], ready[pid]["VmRSS"], trained[pid]["VmHWM"], trained[pid]["VmRSS"], idle[pid]) for pid in place.pids)
    seen = Seen(first["VmHWM"], first["VmRSS"], last["VmHWM"], last["VmRSS"], last["VmRSS"])
    for number, each in enumerate((*servers, seen)):
        who = f"server {spans[number]}" if number < len(servers) else "client"
        say("memory", hidden=hidden, process=who, **{name: getattr(each, name) for name in Seen.__slots__})
    return Run(servers, seen, first["weights"], reset and bool(first["reset"]))


def status(pid: int | str = "self") -> dict[str, int]:
    """Bytes that a process holds now (``VmRSS``) and held at most (``VmHWM``)."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmHWM", "VmRSS"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def set_back(pid: int | str = "self") -> bool:
    """Let the peak of a process be what it holds now; whether the kernel does that."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True
