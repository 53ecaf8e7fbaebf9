"""How long a call may take, and how long a client looks for a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtune.errors import BlocksUnserved, PeerBusy, PeerFault
from swarmtune.remote.deadlines import MAX_TRIES, NEEDED_CALLS, SLACK_S, CallTimes, Patience
from swarmtune.types import BlockSpan
from tests.simulation import VirtualLoop

SPAN = BlockSpan(0, 4)


def on_the_clock(run: Callable[[], Any]) -> Any:
    async def main() -> Any:
        result = run()
        return await result if asyncio.iscoroutine(result) else result

    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def times_of(seconds: list[float], tokens: int = 100) -> CallTimes:
    times = CallTimes()
    for each in seconds:
        times.add("forward", SPAN, tokens, each)
    return times


def test_there_is_no_limit_before_enough_calls_are_known() -> None:
    times = times_of([1.0] * (NEEDED_CALLS - 1))
    assert times.limit_s("forward", SPAN, 100) is None
    times.add("forward", SPAN, 100, 1.0)
    assert times.limit_s("forward", SPAN, 100) == 2 * 1.0 + SLACK_S


def test_each_span_and_direction_has_its_own_history() -> None:
    times = times_of([1.0] * 9)
    assert times.limit_s("backward", SPAN, 100) is None
    assert times.limit_s("forward", BlockSpan(0, 3), 100) is None


def test_one_outlier_does_not_move_the_limit() -> None:
    assert times_of([1.0] * 9 + [300.0]).limit_s("forward", SPAN, 100) == times_of([1.0] * 10).limit_s("forward", SPAN, 100)


def test_times_of_smaller_calls_are_scaled_up_and_of_larger_ones_never_down() -> None:
    times = times_of([1.0] * 9)
    assert times.limit_s("forward", SPAN, 1000) == 2 * 10.0 + SLACK_S
    assert times.limit_s("forward", SPAN, 1) == 2 * 1.0 + SLACK_S


@given(st.lists(st.floats(0.001, 100.0), min_size=NEEDED_CALLS, max_size=40))
def test_the_limit_is_beyond_twice_what_half_of_the_calls_took(seconds: list[float]) -> None:
    limit_s = times_of(seconds).limit_s("forward", SPAN, 100)
    assert limit_s is not None
    lately = sorted(seconds[-32:])
    assert limit_s >= 2 * lately[(len(lately) - 1) // 2] + SLACK_S


def fault(peer: str = "peer") -> PeerFault:
    return PeerFault(peer, SPAN, "gone")


def test_patience_starts_with_the_first_fault_and_ends() -> None:
    async def run() -> list[bool]:
        patience = Patience(10.0, 60.0)
        await asyncio.sleep(1000.0)  # before anything went wrong
        found = [patience.blame(fault())]
        await asyncio.sleep(4.0)
        found.append(patience.blame(fault()))
        await asyncio.sleep(7.0)
        return [*found, patience.blame(fault())]

    assert on_the_clock(run) == [False, False, True]


def test_a_first_failure_after_the_end_is_not_the_last_try() -> None:
    async def run() -> list[bool]:
        patience = Patience(10.0, 60.0)
        patience.blame(fault("one"))
        await asyncio.sleep(20.0)
        return [patience.blame(fault("two")), patience.blame(fault("two"))]

    assert on_the_clock(run) == [False, True]


def test_ever_new_servers_that_fail_are_not_asked_for_ever() -> None:
    def run() -> int:
        patience = Patience(1e6, 60.0)
        return next(number for number in range(10 * MAX_TRIES) if patience.blame(fault(f"peer{number}")))

    assert on_the_clock(run) == MAX_TRIES - 1


def test_busy_servers_do_not_use_up_the_patience_but_their_own() -> None:
    async def run() -> tuple[float, list[bool]]:
        patience, answers = Patience(10.0, 60.0), []
        patience.blame(fault())
        for _ in range(9):
            await asyncio.sleep(6.0)  # the call itself, until it was turned away
            answers.append(patience.wait_for(1.0, PeerBusy("peer", SPAN, "no room", 1.0)))
            left_s = patience.remaining_s()
            await asyncio.sleep(1.0)
        return left_s, answers

    assert on_the_clock(run) == (10.0, [False] * 8 + [False])


def test_servers_that_are_busy_for_ever_end_a_call() -> None:
    async def run() -> int:
        patience = Patience(10.0, 60.0)
        for number in range(1000):
            if patience.wait_for(1.0, PeerBusy("peer", SPAN, "no room", 1.0)):
                return number
            await asyncio.sleep(7.0)
        return -1

    assert on_the_clock(run) == 9


def test_the_last_failure_is_told() -> None:
    def run() -> BlocksUnserved:
        patience = Patience(10.0, 60.0)
        patience.blame(fault())
        return patience.exhausted(BlocksUnserved("nobody serves blocks 0:4", (SPAN,)))

    error = on_the_clock(run)
    assert str(error) == "nobody serves blocks 0:4; waited 10 s; last failure: peer peer failed blocks 0:4: gone"
    assert error.missing == (SPAN,)


@pytest.mark.parametrize("count", [1, 3])
def test_a_call_given_up_for_being_slow_lets_the_next_take_twice_as_long(count: int) -> None:
    def run() -> float:
        patience = Patience(10.0, 60.0)
        for _ in range(count):
            patience.slower()
        return patience.allowance

    assert on_the_clock(run) == 2.0**count
