"""The device worker: order, priority, limits, cancellation, and an end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest

from servers import executor as module
from servers.executor import Busy, Executor, Expired


class Held:
    """Stands for the tensors of a job."""


@pytest.fixture
def executor() -> Iterator[Executor]:
    worker = Executor().start()
    yield worker
    worker.close(5)
    assert not worker._thread.is_alive()


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(8):
            await main()

    asyncio.run(bounded())


async def occupy(executor: Executor) -> tuple[threading.Event, asyncio.Task[bool]]:
    """Keep the worker busy until the event is set; returns once it is."""
    begun, gate = threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return gate.wait(8)

    task = asyncio.create_task(executor.submit(wait, priority=0, timeout_s=8))
    await asyncio.to_thread(begun.wait, 8)
    return gate, task


def test_jobs_run_on_one_thread_which_is_not_the_loops(executor: Executor) -> None:
    async def main() -> None:
        names = await asyncio.gather(*(executor.submit(lambda: threading.current_thread().name, priority=1, timeout_s=5) for _ in range(20)))
        assert set(names) == {"swarmtune-device"}

    run(main)


def test_lower_numbers_go_first_and_equals_keep_their_order(executor: Executor) -> None:
    async def main() -> None:
        done: list[tuple[int, int]] = []
        gate, first = await occupy(executor)
        jobs = []
        for number, priority in enumerate([1, 0, 2, 1, 0, 2, 1, 0]):
            jobs.append(
                asyncio.create_task(
                    executor.submit(lambda priority=priority, number=number: done.append((priority, number)), priority=priority, timeout_s=5)
                )
            )
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *jobs)
        assert done == sorted(done)
        assert len(done) == 8

    run(main)


def test_a_full_queue_says_busy_and_takes_jobs_again_later(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        gate, first = await occupy(executor)
        waiting = [asyncio.create_task(executor.submit(lambda: None, priority=1, timeout_s=5)) for _ in range(module.MAX_QUEUED)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="64 jobs are waiting"):
            await executor.submit(lambda: None, priority=0, timeout_s=5)
        gate.set()
        await asyncio.gather(first, *waiting)
        assert await executor.submit(lambda: 5, priority=1, timeout_s=5) == 5

    run(main)


def test_a_job_whose_deadline_passes_in_the_queue_is_never_run(executor: Executor) -> None:
    async def main() -> None:
        ran: list[int] = []
        gate, first = await occupy(executor)
        late = asyncio.create_task(executor.submit(lambda: ran.append(1), priority=1, timeout_s=0.02))
        await asyncio.sleep(0.05)
        gate.set()
        with pytest.raises(Expired):
            await late
        await first
        assert not ran

    run(main)


def test_a_job_of_a_caller_who_left_is_not_run_and_holds_nothing(executor: Executor) -> None:
    async def main() -> None:
        ran: list[int] = []
        gate, first = await occupy(executor)
        held = Held()
        seen = weakref.ref(held)
        left = asyncio.create_task(executor.submit(lambda held=held: ran.append(1), priority=1, timeout_s=5))
        del held
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        del left
        await asyncio.sleep(0.01)
        gc.collect()
        assert seen() is None, "a dropped job keeps its tensors in the queue"
        gate.set()
        await first
        await executor.submit(lambda: None, priority=2, timeout_s=5)
        assert not ran

    run(main)


def test_leaving_a_job_that_runs_does_not_disturb_the_next(executor: Executor) -> None:
    async def main() -> None:
        gate, first = await occupy(executor)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        following = asyncio.create_task(executor.submit(lambda: 7, priority=1, timeout_s=5))
        await asyncio.sleep(0.01)
        assert not following.done()
        gate.set()
        assert await following == 7

    run(main)


@pytest.mark.parametrize("error", [ValueError("a"), RuntimeError("b"), MemoryError(), RecursionError(), KeyError("k"), AssertionError()], ids=repr)
def test_a_job_that_fails_fails_alone(executor: Executor, error: Exception) -> None:
    def fail() -> None:
        raise error

    async def main() -> None:
        with pytest.raises(type(error)):
            await executor.submit(fail, priority=0, timeout_s=5)
        assert await executor.submit(lambda: 3, priority=0, timeout_s=5) == 3

    run(main)


def test_an_idle_worker_holds_neither_the_last_job_nor_its_result(executor: Executor) -> None:
    async def main() -> None:
        seen = weakref.ref(await executor.submit(Held, priority=0, timeout_s=5))
        for _ in range(200):
            gc.collect()
            if seen() is None:
                return
            await asyncio.sleep(0.005)
        raise AssertionError("the worker keeps the last result")

    run(main)


def test_close_finishes_the_running_job_drops_the_others_and_ends_the_thread() -> None:
    async def main() -> None:
        executor = Executor().start()
        gate, first = await occupy(executor)
        dropped = asyncio.create_task(executor.submit(lambda: None, priority=0, timeout_s=5))
        await asyncio.sleep(0)
        threading.Timer(0.05, gate.set).start()
        await asyncio.to_thread(executor.close, 5)
        assert not executor._thread.is_alive()
        assert await first
        with pytest.raises(asyncio.CancelledError):
            await dropped
        began = time.monotonic()
        with pytest.raises(Busy, match="no more jobs"):
            await executor.submit(lambda: None, priority=0, timeout_s=5)
        assert time.monotonic() - began < 1

    run(main)
