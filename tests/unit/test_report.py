"""The minute's line says what happened since the last one."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest
import torch

from servers.executor import Executor
from servers.report import Report, resident_bytes
from tests.harness import batch, loopback, make_handler, remote


async def three_peers() -> int | None:
    return 3


def test_a_line_counts_what_came_since_the_last_one(bloom: Path) -> None:
    executor = Executor().start()
    handler = make_handler(bloom, "0:4", executor=executor)
    report = Report(handler, executor, torch.device("cpu"), three_peers)
    try:
        with loopback(bloom, handlers={"peer": handler}) as swarm:
            model = remote(bloom, swarm)
            model(**batch(rows=4, tokens=10))
            first = report.line(3)
            assert re.fullmatch(
                r"last \d+ s: 1 requests \(1 in all, 0 refused\), [\d,]+ tokens/s, memory \d+\.\d\d GB, 3 peers, 0 in the queue", first
            )
            model(**batch(rows=2, tokens=5))
            model(**batch(rows=2, tokens=5))
            handler.draining = True
            with pytest.raises(Exception, match="shutting down"):
                model(**batch(rows=2, tokens=5))
            assert handler.refused >= 1
            assert f": 2 requests (3 in all, {handler.refused} refused), " in report.line(None)
            assert ", 0 tokens/s, " in report.line(None)
            assert ", ? peers, " in report.line(None)
        assert handler.tokens == 4 * 10 + 2 * (2 * 5)
        assert report.total().startswith(f"stopped after 3 requests ({handler.refused} refused) and 60 tokens in ")
    finally:
        executor.close()


def test_lines_come_at_the_period_that_is_asked_for(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    executor = Executor()
    report = Report(make_handler(bloom, "0:1", executor=executor), executor, torch.device("cpu"), three_peers)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await report.forever(0.1)

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert 2 <= len(caplog.records) <= 5


def test_memory_is_that_of_this_process() -> None:
    before = resident_bytes()
    held = torch.ones(1 << 26)
    assert 0.8 * held.nbytes < resident_bytes() - before < 1.5 * held.nbytes
