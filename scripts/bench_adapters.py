"""``scripts/bench adapters``: what a new adapter configuration costs a server, and switching between known ones, for every group of conf/adapter."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench_model import per_call, reference_model
from bench_place import complete
from bench_report import Panel, Report, setting

from servers.program import Programs
from servers.weights import load_blocks
from swarmtune.adapters.adapter import offline_adapter
from swarmtune.config import load_config
from swarmtune.config import options as names_in
from swarmtune.skeleton import check_identity
from swarmtune.skeleton import load_config as load_model_config
from swarmtune.train.library_keys import peft_config
from swarmtune.types import BlockSpan


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """Seconds until a server can run a configuration that it has not seen, and of finding one that it has, by adapter group."""
    complete(options)
    path = str(reference_model(options.hidden, options.layers, directory / "model"))
    config, cpu = load_model_config(path), torch.device("cpu")
    site, span = check_identity(config), BlockSpan(0, options.layers // options.servers)
    weights = load_blocks(path, config, site, span, getattr(torch, options.dtype), cpu)
    rows, switches, bars = [], [], {}
    for name in names_in("adapter"):
        words = {"adalora": ["adapter.tinit=0", "adapter.tfinal=1"], "trainable_tokens": ["adapter.token_indices=[5]"]}.get(name, [])
        if name in ("saved", "adaption_prompt"):
            continue  # no configuration of its own; not for a BLOOM
        chosen = peft_config(load_config(["recipe=lora_bloom", f"adapter={name}", *words]).adapter)
        spec = offline_adapter(config, chosen, path).spec
        if spec is None:
            continue  # nothing of it is on the servers
        seconds = []
        for _ in range(options.rounds):
            programs = Programs(config, site, weights, getattr(torch, options.dtype), cpu)
            programs.get(span, None)
            began = time.perf_counter()
            programs.get(span, spec)
            seconds.append(time.perf_counter() - began)
        switches.append(statistics.median(per_call(lambda kept=programs, wanted=spec: (kept.get(span, None), kept.get(span, wanted)))) / 2)
        rows.append(
            {
                "figure": f"{name}: new configuration, ms (median, largest)",
                "value": f"{statistics.median(seconds) * 1e3:.0f}, {max(seconds) * 1e3:.0f}",
            }
        )
        bars[name] = statistics.median(seconds) * 1e3
        rows[-1]["value"] += f"; {programs.own_bytes / 1e6:.1f} MB kept"
    rows.append(
        {
            "figure": "switching between two known ones, us (median, largest)",
            "value": f"{statistics.median(switches) * 1e6:.0f}, {max(switches) * 1e6:.0f}",
        }
    )
    says = f"{setting(options)}, {span.stop} of {options.layers} blocks"
    return Report("adapters", "bench_adapters", says, rows, [Panel("a new configuration, ms", bars=bars)])
