"""Every fault at every point of a step, on a simulated clock: the gradients are those of the quiet step to the bit, and nobody hangs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarmtune.errors import BlocksUnserved
from swarmtune.remote.chain import Chain
from swarmtune.remote.gradients import PassGradients
from swarmtune.remote.ledger import Page
from swarmtune.wire.codec import encode
from swarmtune.wire.frames import Encoded, Incoming
from swarmtune.wire.messages import Fault as FaultMessage
from swarmtune.wire.messages import FaultCode, SpanResult
from tests.simulation import COMPUTE_S, PHASES, STALL_S, Fault, Simulator, World

HOWS: list[dict[str, bool]] = [{}, {"warm": True}, {"cold": True}, {"pipelined": True}, {"copies": True}, {"poor": True}, {"tight": True}]
STRIDES = (2, 8, 6, 3, 5, 8, 8)
PAIRS = 50
SEEDS = 40


@pytest.fixture(scope="module")
def simulator(bloom: Path) -> Simulator:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Simulator(bloom)
    torch.set_num_threads(threads)
    return made


def wrong(simulator: Simulator, faults: list[Fault], **how: Any) -> str:
    outcome = simulator.run(faults, **how)
    found = simulator.wrong(outcome)
    return f"{faults} {how}: {found}" if found else ""


def test_the_quiet_step_is_quiet(simulator: Simulator) -> None:
    assert simulator.wrong(simulator.quiet) == ""
    assert (simulator.quiet.retries, simulator.quiet.verdict.failed, simulator.quiet.events) == (0, 0, [])
    assert {sender.split()[1] for sender in simulator.quiet.senders} >= {"client", "server"}
    assert any(sender.split()[1].startswith("peer") for sender in simulator.quiet.senders), "servers hand on to each other"


def test_servers_with_room_for_one_graph_run_again_what_they_have_evicted(simulator: Simulator) -> None:
    spans = {span.span: span for _, _, span in simulator._parts}.values()

    def block_forwards(**how: bool) -> int:
        before = sum(span.block_forwards for span in spans)
        assert simulator.wrong(simulator.run([], **how)) == ""
        return sum(span.block_forwards for span in spans) - before

    evicted = sum(span.graphs.evicted for span in spans)
    assert block_forwards() < block_forwards(tight=True) < block_forwards(poor=True)
    assert sum(span.graphs.evicted for span in spans) > evicted


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_any_one_fault_at_any_point_leaves_the_bits_alone(simulator: Simulator, how: dict[str, bool]) -> None:
    every = simulator.every_fault(**how)[:: STRIDES[HOWS.index(how)]]  # the campaign of docs/reliability.md tries all of them
    outcomes = [(fault, simulator.run([fault], steps=1, **how)) for fault in every]
    assert [(fault, found) for fault, outcome in outcomes if (found := simulator.wrong(outcome))] == []
    assert all(outcome.struck == 1 for _, outcome in outcomes)
    assert {fault.kind for fault, outcome in outcomes if outcome.retries} >= {"kill", "cut", "stall", "freeze"}


def test_any_two_faults_leave_the_bits_alone(simulator: Simulator) -> None:
    """A sample; the campaign of docs/reliability.md tries all of them."""
    source = random.Random(7)
    firsts = simulator.every_fault()
    pairs = []
    while len(pairs) < PAIRS:
        first = source.choice(firsts)
        pipelined = source.random() < 0.5
        later = simulator.every_second_fault(first, pipelined=pipelined)
        pairs += [([first, second], pipelined) for second in source.sample(later, min(5, len(later)))]
    assert [found for pair, pipelined in pairs if (found := wrong(simulator, pair, steps=1, pipelined=pipelined))] == []


def test_seeded_storms_leave_the_bits_alone(simulator: Simulator) -> None:
    for seed in range(SEEDS):
        faults, how = simulator.random_faults(seed)
        assert wrong(simulator, faults, **how) == "", f"seed {seed}"


def test_a_seed_is_the_same_run_twice(simulator: Simulator) -> None:
    faults, how = simulator.random_faults(11)
    first, second = simulator.run(faults, **how), simulator.run(faults, **how)
    assert (first.seconds, first.points, first.retries, first.events) == (second.seconds, second.points, second.retries, second.events)


def test_servers_that_never_come_back_end_the_step_within_the_patience_and_restore_the_gradients(simulator: Simulator) -> None:
    for point in range(simulator.run([], steps=1).points):
        outcome = simulator.run([Fault(point, "kill", "before"), Fault(point + 1, "kill", "before")], steps=1, restart_s=None)
        assert max(outcome.seconds) < 40
        assert outcome.left == []
        assert outcome.verdict.clean, outcome.verdict
        if outcome.errors:
            assert isinstance(outcome.errors[0], BlocksUnserved)
            assert all(parameter.grad is None for parameter in simulator._model.adapter.parameters())


def test_a_frozen_server_is_left_within_twice_the_usual_time_and_two_seconds(simulator: Simulator) -> None:
    usual_s = max(simulator.quiet.seconds)
    for point in range(simulator.quiet.points // 2):
        outcome = simulator.run([Fault(point, "freeze", "before")], steps=1, warm=True)
        assert simulator.wrong(outcome) == ""
        assert outcome.seconds[0] - usual_s <= 2 * usual_s + 2, point


@pytest.mark.parametrize("warm", [False, True])
def test_a_server_ten_times_slower_costs_one_slow_step(simulator: Simulator, warm: bool) -> None:
    used = simulator.quiet.senders[0].split()[0]
    outcome = simulator.run([], steps=8, warm=warm, slow={used: 10.0})
    assert simulator.wrong(outcome) == ""
    usual_s = simulator.quiet.seconds[0]
    slow_steps = [seconds for seconds in outcome.seconds if seconds > 1.5 * usual_s]
    assert len(slow_steps) == 1
    assert slow_steps[0] < usual_s + 2 * 10 * COMPUTE_S + 1


def test_a_slow_server_is_tried_again_after_a_while(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of it fades, because it may have become faster."""
    monkeypatch.setattr("swarmtune.remote.route.HALF_LIFE_S", 1.0)
    monkeypatch.setattr("swarmtune.remote.route.HALF_LIFE_CALLS", 0)
    used = simulator.quiet.senders[0].split()[0]
    outcome = simulator.run([], steps=60, slow={used: 10.0})
    slow_steps = [seconds for seconds in outcome.seconds if seconds > 1.5 * simulator.quiet.seconds[0]]
    assert 2 <= len(slow_steps) <= 8


def test_a_swarm_that_is_slow_as_a_whole_gets_there(simulator: Simulator) -> None:
    """Each call takes longer than its like did, on every replica: giving up is no use, and must not go on for ever."""
    outcome = simulator.run([], steps=2, warm=True, slow=dict.fromkeys(("peer0", "peer1", "peer2", "peer3"), 200.0))
    assert simulator.wrong(outcome) == ""


def test_a_busy_server_is_asked_again_when_it_says_so_and_is_not_blamed(simulator: Simulator) -> None:
    def busy(world: World, chain: Chain) -> None:
        for name, handler in list(world.handlers.items()):
            world.handlers[name] = BusyFor(handler, 3)

    outcome = simulator.run([], steps=1, cold=True, prepare=busy)
    assert simulator.wrong(outcome) == ""
    kinds = [event.split()[0] for event in outcome.events]
    assert kinds.count("busy") >= 6
    assert set(kinds) <= {"busy", "cut_off", "waited"}  # the connections are new, so the servers describe themselves first
    assert outcome.seconds[0] < 5


class BusyFor:
    """A handler that has no room for its first calls."""

    def __init__(self, handler: Any, times: int) -> None:
        self.handler, self.times = handler, times

    async def __call__(self, peer: str, incoming: Incoming) -> Encoded:
        if incoming.header["kind"] != "info" and self.times:
            self.times -= 1
            return encode(FaultMessage(FaultCode.BUSY, "no room", retry_ms=200).to_message())
        answer: Encoded = await self.handler(peer, incoming)
        return answer


def test_a_draining_server_is_left_at_once_and_costs_no_ban(simulator: Simulator) -> None:
    used = simulator.quiet.senders[0].split()[0]

    def drain(world: World, chain: Chain) -> None:
        world.handlers[used].draining = True  # type: ignore[attr-defined]

    outcome = simulator.run([], steps=2, prepare=drain)
    assert simulator.wrong(outcome) == ""
    assert 1 <= outcome.retries <= 2  # two micro-batches ask it at once
    assert max(outcome.seconds) < simulator.quiet.seconds[0] + 0.1


# --- the instruments see what they are there for -------------------------------------------------------------------------------


def test_a_gradient_that_is_counted_twice_is_seen(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = PassGradients.collect

    def twice(self: PassGradients, batch: Any, leg: Any, grad_BTH: Any, result: SpanResult, *span: Any) -> None:
        doubled = {index: 2 * grad for index, grad in result.kwarg_grads.items()}
        collect(self, batch, leg, grad_BTH, replace(result, kwarg_grads=doubled), *span)

    monkeypatch.setattr(PassGradients, "collect", twice)
    assert "gradients differ" in wrong(simulator, [])


def test_a_result_that_nobody_accepted_is_seen(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Page.accept

    def forget_one(self: Page, number: int, micro: int, *rest: Any) -> None:
        if number:
            accept(self, number, micro, *rest)

    monkeypatch.setattr(Page, "accept", forget_one)
    assert "lacks blocks" in wrong(simulator, [])


def test_a_span_that_is_accepted_twice_is_stopped(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Page.accept

    def twice(self: Page, *rest: Any) -> None:
        accept(self, *rest)
        accept(self, *rest)

    monkeypatch.setattr(Page, "accept", twice)
    assert "counted twice" in wrong(simulator, [])


def test_a_client_that_waits_for_ever_is_seen(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pings, a reply that is lost is waited for until the call's own deadline."""
    monkeypatch.setattr("swarmtune.transport.connection.SILENCE_S", 1e9)
    assert "simulated seconds" in wrong(simulator, [Fault(2, "stall", "before")], steps=1, restart_s=None) or STALL_S < 50


def test_kinds_and_phases_are_all_tried(simulator: Simulator) -> None:
    tried: Mapping[str, set[str]] = {kind: {fault.phase for fault in simulator.every_fault() if fault.kind == kind} for kind in PHASES}
    assert tried == {kind: set(phases) for kind, phases in PHASES.items()}
