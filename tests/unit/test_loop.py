"""The asyncio thread: what is begun ends, also when the loop does."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from swarmtune.errors import SwarmError
from swarmtune.transport.loop import LoopThread


async def stubborn() -> None:
    """Takes a while to end."""
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.5)


def test_what_is_begun_while_the_loop_closes_is_refused_and_nobody_waits_for_ever() -> None:
    loop = LoopThread().start()
    first = loop.begin(stubborn())
    time.sleep(0.1)
    closing = threading.Thread(target=loop.close)
    closing.start()
    time.sleep(0.1)
    with pytest.raises(SwarmError, match="closed"):
        loop.run(asyncio.sleep(0))
    closing.join(10)
    assert not closing.is_alive()
    assert first.done()


def test_a_coroutine_that_does_not_let_itself_be_cancelled_leaves_no_waiter(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    monkeypatch.setattr("swarmtune.transport.loop.CLOSE_TIMEOUT_S", 1.0)
    loop = LoopThread().start()
    future = loop.begin(deaf())
    time.sleep(0.1)
    loop.close()
    loop.wait(future)
    with pytest.raises(SwarmError, match="closed during a call"):
        future.result(5)


def test_to_close_twice_is_no_harm() -> None:
    loop = LoopThread().start()
    assert loop.run(asyncio.sleep(0, "done")) == "done"
    loop.close()
    loop.close()
