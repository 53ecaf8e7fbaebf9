"""``scripts/bench call``: what one call costs beyond its work, with tiny tensors through one block."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from bench_model import per_call, reference_model, thread_budget
from bench_place import complete, serving
from bench_report import Panel, Report, Row
from transformers import AutoModelForCausalLM

import swarmtune

HIDDEN = 64


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """Seconds of a forward call of one token, and of the same block here, in turns."""
    preset = complete(options)
    path = reference_model(HIDDEN, 1, directory / "model")
    count = 40 * options.rounds
    with thread_budget(options), serving(path, ["0:1"], options, directory, preset.link) as place, place.connect() as swarm, torch.no_grad():
        body = swarmtune.load_causal_lm(path, swarm).body
        block = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype)).transformer.eval()
        hidden = torch.randn(1, 1, HIDDEN, dtype=getattr(torch, options.dtype))
        remote_s = per_call(lambda: body(hidden), count)
        before = swarm.traffic()
        body(hidden)
        after = swarm.traffic()
        local_s = per_call(lambda: block(inputs_embeds=hidden, use_cache=False), count)
    remote, local = statistics.median(remote_s), statistics.median(local_s)
    rows: list[Row] = [
        {"figure": "one block here, tiny tensor, ms", "value": round(local * 1e3, 3)},
        {"figure": "one remote call, tiny tensor, ms", "value": round(remote * 1e3, 3)},
        {"figure": "the slowest of a hundred remote calls, ms", "value": round(statistics.quantiles(remote_s, n=100)[-1] * 1e3, 3)},
        {"figure": "overhead of the corridor, ms there and back", "value": round((remote - local) * 1e3, 3)},
        {"figure": "remote call / block here", "value": round(remote / local, 2)},
        {"figure": "bytes up, down of one call", "value": f"{after.bytes_up - before.bytes_up}, {after.bytes_down - before.bytes_down}"},
        {"figure": "of these tensors, up and down", "value": sum(after.payload.values()) - sum(before.payload.values())},
    ]
    shares = [index / (count - 1) for index in range(count)]
    series = {name: ([each * 1e3 for each in sorted(times)], shares) for name, times in (("remote call", remote_s), ("block here", local_s))}
    name = "bench_call" if options.preset == "loopback" else f"bench_call_{options.preset}"
    says = f"call, {preset.says}, {options.dtype}, one block of hidden size {HIDDEN}, one token"
    return Report("call", name, says, rows, [Panel("share of calls that took at most so long", series=series, x="ms", y="share")])
