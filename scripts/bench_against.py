"""``scripts/bench against``: this code and that of another commit, each with servers of its own, taking turns step by step in one run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench_model import middle_half, reference_model
from bench_report import TURN, Panel, Report, Row, setting

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import json, sys, time, torch
from peft import LoraConfig
import swarmtune

if __name__ == "__main__":
    path, spans, threads, rows, sequence = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    with swarmtune.LocalSwarm(path, spans, dtype="float32", threads=threads) as local, swarmtune.connect(local.initial_peers) as swarm:
        model = swarmtune.load_causal_lm(path, swarm, adapter=LoraConfig(r=8, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
        ids = torch.randint(0, 4096, (rows, sequence), generator=torch.Generator().manual_seed(1))
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            print(json.dumps(time.perf_counter() - began), flush=True)
"""


class Side:
    """A process that trains on request, with the code of one tree."""

    def __init__(self, tree: Path, script: Path, words: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), *words], env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def steps(self, count: int) -> float:
        """Seconds of ``count`` steps."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("one side ended, see above")
        return float(json.loads(line))

    def close(self) -> None:
        """End it and its servers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@contextlib.contextmanager
def tree_of(commit: str, directory: Path) -> Iterator[Path]:
    """The files of a commit, in a worktree that goes away again."""
    tree = directory / "against"
    subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), commit], check=True, capture_output=True)
    try:
        yield tree
    finally:
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True, capture_output=True)


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """Seconds of a step of both sides, for the reference batch and for a tiny one; each turn goes to both, in alternating order."""
    path = reference_model(options.hidden, options.layers, directory / "model")
    script = directory / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    half = options.layers // 2
    rows: list[Row] = []
    series: dict[str, tuple[list[int], list[float]]] = {}
    with tree_of(options.commit, directory) as tree:
        for what, batch, sequence, steps in (
            ("reference batch", options.rows, options.sequence, options.steps),
            ("one row of 8 tokens", 1, 8, 20 * options.steps),
        ):
            words = [str(path), f"0:{half},{half}:{options.layers}", str(options.threads), str(batch), str(sequence)]
            with contextlib.ExitStack() as stack:
                sides = {name: Side(where, script, words) for name, where in (("this", ROOT), (options.commit, tree))}
                for side in sides.values():
                    stack.callback(side.close)
                for side in sides.values():
                    side.steps(steps)
                seconds: dict[str, list[float]] = {name: [] for name in sides}
                for turn in range(options.rounds):
                    for name in list(sides) if turn % 2 else list(sides)[::-1]:
                        seconds[name].append(sides[name].steps(steps) / steps)
                        said = {"bench": "against", "turn": turn, "what": what, "side": name, "step_s": round(seconds[name][-1], 4)}
                        print(json.dumps(said), flush=True)
            ratios = [this / other for this, other in zip(seconds["this"], seconds[options.commit], strict=True)]
            series[what] = (list(range(1, options.rounds + 1)), ratios)
            rows += [
                {"figure": f"{what}: step of this commit, s", "value": round(statistics.median(seconds["this"]), 4)},
                {"figure": f"{what}: step of {options.commit}, s", "value": round(statistics.median(seconds[options.commit]), 4)},
                {"figure": f"{what}: this / {options.commit}, median of {options.rounds} turns", "value": round(statistics.median(ratios), 4)},
                {"figure": f"{what}: the middle half of those ratios", "value": middle_half(ratios)},
            ]
    panel = Panel(f"seconds of a step, this / {options.commit}", series=series, x=TURN, y="ratio", rule=1.0)
    return Report("against", "bench_against", f"{setting(options)}, 2 servers, against {options.commit}", rows, [panel])
