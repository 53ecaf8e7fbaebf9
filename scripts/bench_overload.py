"""``scripts/bench overload``: more and more clients train over the same two servers at once; what they get done together must not shrink."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from bench_model import reference_model
from bench_report import Panel, Report

import swarmtune

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, LAYERS = 256, 4
CLIENTS = (1, 2, 4, 8, 16)
ROWS, TOKENS, SECONDS, PER_PROCESS = 2, 64, 8.0, 8

WORKER = """
import json, sys, threading, time, torch
from peft import LoraConfig
import swarmtune

def main(path, addresses, clients, rows, tokens, seconds):
    torch.set_num_threads(1)
    gate, found = threading.Barrier(clients + 1), [None] * clients
    ids = torch.randint(0, 4096, (rows, tokens), generator=torch.Generator().manual_seed(1))

    def train(number):
        with swarmtune.connect(addresses, patience_s=120.0) as swarm:
            model = swarmtune.load_causal_lm(path, swarm, adapter=LoraConfig(r=8, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)

            def step():
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()

            step()
            gate.wait()
            gate.wait()
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                step()
                steps += 1
            spent, traffic = time.perf_counter() - began, swarm.traffic()
            busy = {str(kind): tally.count for kind, tally in traffic.events.items()}
            found[number] = {"tok_s": steps * rows * tokens / spent, "retries": traffic.retries, "events": busy}

    threads = [threading.Thread(target=train, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    gate.wait()
    print("ready", flush=True)
    sys.stdin.readline()
    gate.wait()
    for thread in threads:
        thread.join()
    print(json.dumps(found), flush=True)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
"""


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """One row per number of clients."""
    path = reference_model(HIDDEN, LAYERS, directory / "model")
    script = directory / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    runs = []
    with swarmtune.LocalSwarm(path, [f"0:{LAYERS // 2}", f"{LAYERS // 2}:{LAYERS}"], dtype="float32", threads=options.threads) as local:
        for clients in CLIENTS:
            found = _train(script, path, local.initial_peers, clients)
            rates = [each["tok_s"] for each in found]
            memory = sum(psutil.Process(server.pid).memory_info().rss for server in local.servers)
            run = {
                "clients": clients,
                "tok_s": round(sum(rates), 1),
                "fairness": round(sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates)), 4),
                "retries": sum(each["retries"] for each in found),
                "busy": sum(each["events"].get("busy", 0) for each in found),
                "failed": sum(each["events"].get("failed", 0) for each in found),
                "rss_mb": round(memory / 1e6),
            }
            print(json.dumps({"bench": "overload", **run}), flush=True)
            runs.append(run)
    peak = max(run["tok_s"] for run in runs)
    rows = [
        {
            "figure": f"{run['clients']} clients: tok/s, share of the peak, Jain's fairness",
            "value": f"{run['tok_s']}, {run['tok_s'] / peak:.3f}, {run['fairness']}; {run['retries']} retries, {run['busy']} busy, "
            f"{run['failed']} failed; servers hold {run['rss_mb']} MB",
        }
        for run in runs
    ]
    panel = Panel("done together", series={"tok/s": (CLIENTS, [run["tok_s"] for run in runs])}, x="clients", y="tokens/s")
    says = f"overload, float32, 2 servers of 2 blocks of hidden size {HIDDEN}, {ROWS} x {TOKENS} tokens per client"
    return Report("overload", "bench_overload", says, rows, [panel])


def _train(script: Path, path: Path, addresses: list[str] | tuple[str, ...], clients: int) -> list[dict[str, Any]]:
    """What each client did; they begin together, at most eight in a process."""
    shares = [min(PER_PROCESS, clients - start) for start in range(0, clients, PER_PROCESS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [str(path), ",".join(addresses)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", str(script), *words, str(share), str(ROWS), str(TOKENS), str(SECONDS)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for share in shares
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("the clients did not start, see above")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [each for answer in answers for each in answer]
