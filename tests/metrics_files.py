"""Run directories as training writes them, with numbers that a test can foresee."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVER_COLUMNS = ("network_s", "queue_s", "compute_s", "bytes_up", "bytes_down", "calls", "failures")


def metric_rows(steps: int, labels: Sequence[str], *, lr: float = 1e-3, validate_every: int = 50, seed: int = 0) -> list[dict[str, float]]:
    """Rows of a run of ``steps`` steps: a validation first and after every ``validate_every`` steps."""
    draw = random.Random(seed)
    rows: list[dict[str, float]] = [{"step": 0, "epoch": 0, "val_loss": 4.1, "val_ppl": math.exp(4.1)}]
    train_s = swarm_s = 0.0
    up = down = 0
    for step in range(steps):
        spent = 0.5 + 0.1 * draw.random()
        train_s, swarm_s = train_s + spent, swarm_s + 0.8 * spent
        up, down = up + 6_467_316, down + 3_213_012
        loss = 2.5 + 1.6 * math.exp(-step * lr * 20) + draw.gauss(0, 0.15)
        row: dict[str, float] = {"step": step, "epoch": 0, "train_loss": loss, "lr": lr, "tokens_per_s": 1024 / spent}
        row |= {
            "bytes_up": up,
            "bytes_down": down,
            "retries": step // 70,
            "time/train_s": train_s,
            "time/swarm_s": swarm_s,
            "time/wall_s": train_s + 9,
        }
        for index, label in enumerate(labels):
            shares = (0.2 + 0.05 * index, 0.04 * index, 0.35)
            row |= {f"server/{label}/{name}": share * train_s for name, share in zip(SERVER_COLUMNS, shares, strict=False)}
            row |= {f"server/{label}/bytes_up": up / len(labels), f"server/{label}/bytes_down": down / len(labels)}
            row |= {f"server/{label}/calls": 2 * step + 2, f"server/{label}/failures": index}
        rows.append(row)
        if (step + 1) % validate_every == 0:
            held_out = 2.6 + 1.5 * math.exp(-step * lr * 20)
            rows.append({"step": step, "epoch": 0, "val_loss": held_out, "val_ppl": math.exp(held_out)})
            up, down = up + 9_000_000, down + 5_000_000
    return rows


def write_metrics(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def write_run(
    path: Path,
    *,
    steps: int = 200,
    labels: Sequence[str] = ("blocks0-2.Q1w2e3", "blocks2-4.R4t5y6"),
    lr: float = 1e-3,
    finished: bool = True,
    seed: int = 0,
) -> list[dict[str, float]]:
    """A run directory; gives the rows of its ``metrics.csv``."""
    path.mkdir(parents=True)
    rows = metric_rows(steps, labels, lr=lr, seed=seed)
    write_metrics(path / "metrics.csv", rows)
    lines = (
        "recipe: lora_bloom",
        "model:",
        "  path: pkg://swarmtune/assets/pocket_bloom",
        "optimizer:",
        f"  lr: {lr!r}",
        "seed: 0",
        f"run_dir: {path}",
    )
    (path / "config.yaml").write_text("\n".join(lines) + "\n")
    if finished:
        (path / "summary.json").write_text(json.dumps(summary_of(rows, labels)))
    return rows


def summary_of(rows: Sequence[Mapping[str, float]], labels: Sequence[str]) -> dict[str, Any]:
    last = [row for row in rows if "train_loss" in row][-1]
    held_out = [row for row in rows if "val_loss" in row]
    servers = {
        label: {"peer": f"peer-{index}", "span": f"{2 * index}:{2 * index + 2}"} | {name: last[f"server/{label}/{name}"] for name in SERVER_COLUMNS}
        for index, label in enumerate(labels)
    }
    ends = {"val_loss_before": held_out[0]["val_loss"], "val_loss_after": held_out[-1]["val_loss"]}
    ends |= {"val_ppl_before": held_out[0]["val_ppl"], "val_ppl_after": held_out[-1]["val_ppl"]}
    totals = {name: last[name] for name in ("bytes_up", "bytes_down", "retries")}
    sizes = {"trainable_params": 114_688, "total_params": 3_453_184}
    run = {"recipe": "lora_bloom", "model": "pocket_bloom", "steps": last["step"] + 1, "tokens_per_s": 1861.5, "seconds": last["time/train_s"] + 12}
    return {**run, **ends, **totals, **sizes, "servers": servers}
