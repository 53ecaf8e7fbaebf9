"""The device worker: order, priority, limits, cancellation, and an end."""

from __future__ import annotations

import asyncio
import gc
import pickle
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


def test_a_full_queue_says_busy_and_takes_jobs_again_later(executor: Executor) -> None:
    async def main() -> None:
        gate, first = await occupy(executor)
        waiting = [
            asyncio.create_task(executor.submit(lambda: None, priority=1, timeout_s=5, client=str(number))) for number in range(module.MAX_QUEUED)
        ]
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


def submit(executor: Executor, run: Callable[[], object], client: str, priority: int = 1, timeout_s: float = 8) -> asyncio.Task[object]:
    return asyncio.create_task(executor.submit(run, priority=priority, timeout_s=timeout_s, client=client))


def test_one_client_fills_no_more_than_its_share_and_others_still_come_in(executor: Executor) -> None:
    async def main() -> None:
        gate, first = await occupy(executor)
        many = [submit(executor, lambda: None, "many") for _ in range(module.MAX_QUEUED_PER_CLIENT)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="32 jobs of this client"):
            await executor.submit(lambda: None, priority=0, timeout_s=5, client="many")
        few = submit(executor, lambda: 7, "few")
        await asyncio.sleep(0)
        assert executor.queued == module.MAX_QUEUED_PER_CLIENT + 1
        gate.set()
        assert await few == 7
        await asyncio.gather(first, *many)

    run(main)


def test_where_all_is_full_the_client_with_most_jobs_makes_room(executor: Executor) -> None:
    async def main() -> None:
        gate, first = await occupy(executor)
        greedy = {name: [submit(executor, lambda: None, name) for _ in range(module.MAX_QUEUED_PER_CLIENT)] for name in ("a", "b")}
        await asyncio.sleep(0)
        assert executor.queued == module.MAX_QUEUED
        late = [submit(executor, lambda: 1, "late") for _ in range(4)]
        await asyncio.sleep(0.01)
        assert executor.queued == module.MAX_QUEUED
        gate.set()
        assert await asyncio.gather(*late) == [1] * 4
        answers = await asyncio.gather(first, *greedy["a"], *greedy["b"], return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Busy)]
        assert len(refused) == 4
        assert all("most of them are of this client" in str(each) for each in refused)
        assert isinstance(greedy["a"][-1].exception(), Busy), "the latest ones go"

    run(main)


def test_clients_take_turns_by_the_seconds_that_they_had(executor: Executor) -> None:
    """One client's jobs are four times as long as the other's: so it has a fourth as many of the first ones."""

    async def main() -> None:
        done: list[str] = []

        def job(name: str, seconds: float) -> Callable[[], None]:
            def work() -> None:
                time.sleep(seconds)
                done.append(name)

            return work

        gate, first = await occupy(executor)
        jobs = [submit(executor, job("long", 0.04), "long") for _ in range(12)]
        jobs += [submit(executor, job("short", 0.01), "short") for _ in range(16)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *jobs)
        assert done.index("short") <= 1, "whoever came first must not be finished first"
        at = max(index for index, name in enumerate(done) if name == "short")
        assert 2 <= done[:at].count("long") <= 7
        assert done[at + 1 :] == ["long"] * (12 - done[:at].count("long"))

    run(main)


def test_a_newcomer_takes_turns_with_a_client_that_had_the_device_for_long(executor: Executor) -> None:
    async def main() -> None:
        done: list[str] = []
        gate, first = await occupy(executor)
        old = [submit(executor, lambda: done.append("old"), "old") for _ in range(10)]
        await asyncio.sleep(0)
        executor._clients["old"].served_s = 100.0
        new = [submit(executor, lambda: (time.sleep(0.3), done.append("new")), "new") for _ in range(10)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *old, *new)
        assert done[:2] == ["new"] * 2, "it has been served less"
        assert done.index("old") <= 6, f"and yet the others must not wait for all of it: {done}"

    run(main)


def test_what_was_served_is_forgotten_by_halves() -> None:
    client = module._Client(at=100.0, served_s=8.0)
    assert client.served(100.0 + module.HALF_LIFE_S) == pytest.approx(4.0)
    assert client.served(100.0 + 3 * module.HALF_LIFE_S) == pytest.approx(1.0)


def test_of_one_client_backwards_go_first_and_another_client_does_not_wait_for_them(executor: Executor) -> None:
    async def main() -> None:
        done: list[str] = []
        gate, first = await occupy(executor)
        jobs = [submit(executor, lambda: (time.sleep(0.02), done.append("forward")), "a", 1) for _ in range(3)]
        jobs += [submit(executor, lambda: (time.sleep(0.02), done.append("backward")), "a", 0) for _ in range(3)]
        jobs += [submit(executor, lambda: done.append("other"), "b", 1)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *jobs)
        assert [name for name in done if name != "other"] == ["backward"] * 3 + ["forward"] * 3
        assert done.index("other") <= 1

    run(main)


def test_a_job_that_would_begin_too_late_is_refused_at_once(executor: Executor) -> None:
    async def main() -> None:
        for _ in range(3):
            await executor.submit(lambda: time.sleep(0.1), priority=1, timeout_s=5, client="a")
        gate, first = await occupy(executor)
        waiting = [submit(executor, lambda: time.sleep(0.1), "a") for _ in range(10)]
        await asyncio.sleep(0)
        began = time.monotonic()
        with pytest.raises(Busy, match=r"about 1\.\d s, and the caller waits 0\.4 s") as refused:
            await executor.submit(lambda: None, priority=1, timeout_s=0.4, client="a")
        assert time.monotonic() - began < 0.2
        assert refused.value.retry_s == pytest.approx(0.65, abs=0.3)
        fine = submit(executor, lambda: 3, "b", timeout_s=0.6)  # its turn comes before those ten
        gate.set()
        assert await fine == 3
        await asyncio.gather(first, *waiting)

    run(main)


def test_jobs_whose_time_has_passed_fill_no_queue(executor: Executor) -> None:
    async def main() -> None:
        gate, first = await occupy(executor)
        late = [submit(executor, lambda: None, "a", timeout_s=0.02) for _ in range(module.MAX_QUEUED_PER_CLIENT)]
        await asyncio.sleep(0.05)
        alive = submit(executor, lambda: 5, "a")
        await asyncio.sleep(0)
        assert executor.queued == 1
        gate.set()
        assert await alive == 5
        assert all(isinstance(each, Expired) for each in await asyncio.gather(*late, return_exceptions=True))
        await first

    run(main)


def test_a_caller_who_leaves_frees_its_slot_at_once(executor: Executor) -> None:
    async def main() -> None:
        gate, first = await occupy(executor)
        jobs = [submit(executor, lambda: None, "a") for _ in range(module.MAX_QUEUED_PER_CLIENT)]
        await asyncio.sleep(0)
        jobs[3].cancel()
        await asyncio.gather(jobs[3], return_exceptions=True)
        assert executor.queued == module.MAX_QUEUED_PER_CLIENT - 1
        jobs[3] = submit(executor, lambda: None, "a")
        gate.set()
        await asyncio.gather(first, *jobs)

    run(main)


def test_the_books_of_many_clients_stay_small(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 8)

    async def main() -> None:
        for number in range(40):
            await executor.submit(lambda: None, priority=1, timeout_s=5, client=str(number))
        assert len(executor._clients) <= 8

    run(main)


@pytest.mark.parametrize(("seconds", "said"), [(0.0, 0.05), (0.7, 0.7), (99.0, 10.0)])
def test_the_time_to_ask_again_is_bounded_and_travels_with_the_error(seconds: float, said: float) -> None:
    error = pickle.loads(pickle.dumps(Busy("why", seconds)))
    assert (str(error), error.retry_s) == ("why", said)


def test_whatever_a_job_raises_ends_only_that_job() -> None:
    class Stop(BaseException):
        pass

    def bad() -> None:
        raise Stop

    async def submit(executor: Executor) -> str:
        with pytest.raises(Stop):
            await executor.submit(bad, priority=0, timeout_s=5)
        return await executor.submit(lambda: "alive", priority=0, timeout_s=5)

    executor = Executor().start()
    assert asyncio.run(submit(executor)) == "alive"
    executor.close()
