"""Failover from one numeric class to another: two real servers that compute with different instructions."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import swarmtune
from tests.harness import batch, lora, remote, set_values, step, worst_difference

pytestmark = pytest.mark.swarm

BOUND = 1e-6
"""Of the norm of a gradient, in float32 (docs/reliability.md)."""


def test_failover_across_classes_stays_within_its_bound_and_is_said(
    bloom: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with swarmtune.LocalSwarm(bloom, ["0:4"], dtype="float32", threads=1) as modern:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
        monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
        with (
            swarmtune.LocalSwarm(bloom, ["0:4"], dtype="float32", threads=1) as old,
            swarmtune.connect([*modern.initial_peers, *old.initial_peers]) as swarm,
            caplog.at_level(logging.WARNING, "swarmtune"),
        ):
            model = remote(bloom, swarm, lora("bloom"))
            set_values([dict(model.adapter.named_parameters())])
            before = step(model, batch())[2]
            (opened,) = swarm._models.values()
            first = opened.directory.numeric_class
            used = {hop.peer for hop in opened.chain.caller.running.values()}
            for server in (*modern.servers, *old.servers):
                if server.peer_id in used:
                    server.kill()
            after = step(model, batch())[2]
            assert opened.directory.numeric_class != first
    assert worst_difference(before, after) <= BOUND
    assert any("the numeric class of the route changed" in record.getMessage() for record in caplog.records)
