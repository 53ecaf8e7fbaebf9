"""All servers are restarted one after another under a training that goes on: no step fails, and the weights are those of the quiet run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import swarmtune
from swarmtune.remote.events import EventKind
from swarmtune.remote.verdict import judge
from tests.chaos.training import MICRO_BATCH_TOKENS, Training
from tests.harness import loopback

pytestmark = pytest.mark.swarm


SPANS = ["0:2", "2:4", "0:2"]
"""One half has a replica; for the other one, steps wait until its server is back."""


def test_a_rolling_restart_of_all_servers_fails_no_step(bloom: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    with (
        swarmtune.LocalSwarm(bloom, SPANS, dtype="float32", threads=1) as local,
        swarmtune.connect(local.initial_peers, micro_batch_tokens=MICRO_BATCH_TOKENS, patience_s=60.0, history=history) as swarm,
        loopback(bloom, micro_batch_tokens=MICRO_BATCH_TOKENS) as quiet,
    ):
        loud, still = Training(bloom, swarm, 1), Training(bloom, quiet, 1)
        codes: list[int] = []

        def roll() -> None:
            for server in local.servers:
                process = server._process
                server.stop()
                assert process is not None
                codes.append(process.returncode)
                server.restart()

        rolling = threading.Thread(target=roll)
        rolling.start()
        steps = 0
        while rolling.is_alive() or steps < 20:
            loud.step(steps)
            still.step(steps)
            steps += 1
            time.sleep(0.05)
        rolling.join()
        events = swarm.traffic().events
        assert codes == [0] * len(SPANS)
        assert all(torch.equal(weight, still.weights()[name]) for name, weight in loud.weights().items())
    verdict = judge(history)
    assert verdict.clean, verdict
    assert (verdict.passes, verdict.given_up) == (2 * steps, 0)
    assert events[EventKind.WAITED].count >= 1  # for the half without a replica
    assert events[EventKind.FAILED].lost_s < 10
