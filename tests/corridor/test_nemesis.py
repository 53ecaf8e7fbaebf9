"""The nemesis sees what it is there for: wrong weights, a ledger that was passed by, a hang; its proxy cuts where it says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swarmtune.remote.batch import Leg
from swarmtune.remote.gradients import PassGradients
from swarmtune.remote.ledger import History, Ledger, Page
from swarmtune.transport.base import TransportError
from swarmtune.transport.connection import Connection
from swarmtune.wire.codec import Message, encode
from swarmtune.wire.frames import Encoded, FrameKind, Incoming
from swarmtune.wire.messages import SpanResult
from tests.chaos.campaign import Campaign
from tests.chaos.cuts import DAMAGE, PLACES
from tests.chaos.proxy import Frame, FrameFault, ProxiedStream
from tests.chaos.training import MICRO_BATCH_TOKENS, SPANS, Pair, pair
from tests.harness import loopback


@contextlib.contextmanager
def training(bloom: Path, log: Path) -> Iterator[Pair]:
    """A loud and a quiet training, both in this process; the loud one writes a history."""
    campaign = Campaign("servers", 1, 1, log)
    with loopback(bloom, SPANS, micro_batch_tokens=MICRO_BATCH_TOKENS) as swarm:
        swarm._ledger = Ledger(History(campaign.history))
        with contextlib.closing(swarm._ledger), pair(campaign, bloom, swarm) as both:
            campaign.fault("kills")
            yield both


def verdict(both: Pair) -> dict[str, Any]:
    code = both.campaign.finish()
    found: dict[str, Any] = json.loads((both.campaign.directory / "verdict.json").read_text())
    assert code == (found["verdict"] != "good")
    return found


def only_loud(both: Pair, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that is not empty while the loud training is at work."""
    loud: list[bool] = []
    step = both.loud.step

    def noted(*words: Any) -> None:
        loud.append(True)
        try:
            step(*words)
        finally:
            loud.clear()

    monkeypatch.setattr(both.loud, "step", noted)
    return loud


def test_a_training_without_faults_is_good(bloom: Path, tmp_path: Path) -> None:
    with training(bloom, tmp_path) as both:
        for _ in range(3):
            both.step()
    found = verdict(both)
    assert (found["verdict"], found["steps"], found["passes"]) == ("good", 3, 6)


def test_one_gradient_that_is_applied_twice_makes_the_verdict_bad(bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = PassGradients.collect
    with training(bloom, tmp_path) as both:
        loud = only_loud(both, monkeypatch)

        def twice(self: PassGradients, batch: Any, leg: Leg, grad_BTH: Any, result: SpanResult, *span: Any) -> None:
            if loud and both.campaign.steps == 1 and leg.span.start == 0 and result.kwarg_grads:
                index, grad = next(iter(result.kwarg_grads.items()))
                result = replace(result, kwarg_grads={**result.kwarg_grads, index: 2 * grad})
            collect(self, batch, leg, grad_BTH, result, *span)

        monkeypatch.setattr(PassGradients, "collect", twice)
        for _ in range(3):
            both.step()
    found = verdict(both)
    assert (found["verdict"], found["bitwise"], found["different"][:1]) == ("bad", False, [1])


@pytest.mark.parametrize(("breach", "finding"), [("skipped", "lost"), ("doubled", "doubled")])
def test_a_ledger_that_is_passed_by_makes_the_verdict_bad(
    bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breach: str, finding: str
) -> None:
    """What the client itself would stop is let through here, to see that the history tells it, too."""

    def accept(self: Page, number: int, micro: int, span: Any, replay: bool) -> None:
        if breach == "skipped" and number == 0:
            return self.fail(number, "its answer was used all the same")
        self.write("accept", "forward" if number < 2 else "backward", number=number)
        if breach == "doubled" and number == 1:
            again = self.ask(micro, "forward", span, "peer0", 1.0, replay)
            self.write("accept", "forward" if number < 2 else "backward", number=again)
        return None

    monkeypatch.setattr(Page, "accept", accept)
    monkeypatch.setattr(Page, "end", lambda self, way, lowest=0: self.write("end", way, way=way, lowest=lowest))
    with training(bloom, tmp_path) as both:
        both.step()
    found = verdict(both)
    assert found["verdict"] == "bad"
    assert found[finding] >= 1
    assert found["bitwise"]


def test_a_step_that_never_ends_is_a_hang_and_the_campaign_goes_on(bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with training(bloom, tmp_path) as both:
        both.step()
        transport: Any = both.loud.model.body._chain._transport
        call, hung = transport.call, []

        async def silent(peer: str, request: Encoded, timeout_s: float) -> Incoming:
            if not hung:
                hung.append(peer)
                await asyncio.sleep(3600)
            return await call(peer, request, timeout_s)

        monkeypatch.setattr(transport, "call", silent)
        began = time.monotonic()
        with both.campaign.running():
            both.step(bound_s=5.0)  # what comes after must not take that long on a busy machine
        assert time.monotonic() - began < 30
    found = verdict(both)
    assert (found["verdict"], found["hangs"], found["bitwise"], found["steps"]) == ("bad", 1, True, 2)
    assert "in step" in (tmp_path / "stacks.txt").read_text()


# --- the proxy -----------------------------------------------------------------------------------------------------------------


async def exchange(choose: Any) -> tuple[Incoming, int]:
    """One call with two tensors each way, through a proxy; the answer, and how many calls the other side saw."""
    seen = 0
    message = encode(Message("info", {}, {"a": torch.arange(100.0), "b": torch.arange(7.0)}), answer_bytes=1 << 20)

    async def answer(peer: str, incoming: Incoming) -> Encoded:
        nonlocal seen
        seen += 1
        return message

    ends = [await asyncio.open_connection(sock=end) for end in socket.socketpair()]
    stream: Any = ProxiedStream(*ends[0], choose)
    client, server = Connection(stream.reader, stream, peer="server"), Connection(*ends[1], peer="client", handler=answer)
    try:
        async with asyncio.timeout(20):
            opened = await asyncio.gather(client.open(), server.open(), return_exceptions=True)
            for failure in opened:
                if isinstance(failure, BaseException):
                    raise failure
            return await client.request(message, 10.0), seen
    finally:
        await client.close()
        await server.close()


def once(direction: str, where: Any, kind: str, offset: str) -> Any:
    """Chooses the first frame that fits, and the first, the last or the middle byte there."""
    made: list[Frame] = []

    def choose(frame: Frame) -> FrameFault | None:
        if made or frame.direction != direction or (found := where(frame)) is None:
            return None
        made.append(frame)
        return FrameFault(kind, {"first": found[0], "last": found[1], "middle": sum(found) // 2}[offset], 0.05)

    choose.made = made  # type: ignore[attr-defined]
    return choose


@pytest.mark.parametrize("offset", ["first", "middle", "last"])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("place", PLACES)
def test_a_cut_in_any_place_ends_the_call_and_is_never_a_short_success(place: str, direction: str, offset: str) -> None:
    choose = once(direction, PLACES[place], "cut", offset)
    if place == "hello" and direction == "down" and offset == "last":
        return  # the whole hello passes: the cut comes after it
    if place == "after the message" and direction == "down":
        incoming, _ = asyncio.run(exchange(choose))
        assert incoming.received == len(incoming.body)
    else:
        with pytest.raises(TransportError):
            asyncio.run(exchange(choose))
    assert choose.made


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("kind", ["flip", "drop"])
def test_damage_is_never_a_success(kind: str, direction: str) -> None:
    choose = once(direction, lambda frame: DAMAGE[kind](frame) if frame.kind is FrameKind.DATA else None, kind, "middle")
    with pytest.raises(TransportError):
        asyncio.run(exchange(choose))
    assert choose.made


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("kind", ["stall", "trickle"])
def test_a_delay_changes_nothing(kind: str, direction: str) -> None:
    choose = once(direction, DAMAGE[kind], kind, "middle")
    incoming, seen = asyncio.run(exchange(choose))
    assert (seen, incoming.received) == (1, len(incoming.body))
    assert choose.made


def test_a_client_that_does_not_check_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of the trailer, a dropped frame is a success with other numbers: what the campaign calls a silent truncation."""
    monkeypatch.setattr(Incoming, "end", lambda self, payload: None)
    incoming, _ = asyncio.run(exchange(once("down", DAMAGE["drop"], "drop", "middle")))
    assert incoming.received < len(incoming.body)
