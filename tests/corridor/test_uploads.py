"""Adapters travel once per optimizer step, by the digest of their content; what a server has let go is sent again, and no bit changes."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from servers.handler import CallHandler
from swarmtune.errors import SwarmError
from swarmtune.remote.events import EventKind
from swarmtune.remote.uploads import MAX_LOSSES, TOGETHER_S, Uploads, content_digest
from swarmtune.swarm import Swarm
from swarmtune.types import BlockSpan
from swarmtune.wire.frames import Encoded, Incoming
from swarmtune.wire.messages import CallKwarg, ServerInfo, SpanCall
from tests.harness import Faults, batch, loopback, lora, remote, same_bits, set_values, step


def handlers(swarm: Swarm) -> list[CallHandler]:
    return list(swarm._transport.handlers.values())  # type: ignore[attr-defined]


def prepared(path: Path, swarm: Swarm) -> torch.nn.Module:
    model = remote(path, swarm, lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    return model


def sent(swarm: Swarm) -> int:
    return swarm.traffic().payload["up kwargs"]


def resent(swarm: Swarm) -> int:
    return swarm.traffic().events[EventKind.RESENT].count


@pytest.fixture(scope="module")
def quiet(bloom: Path) -> dict[str, Tensor]:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        for handler in handlers(swarm):
            handler.tensors.budget_bytes = 0
        return step(prepared(bloom, swarm), batch())[2]


def test_an_adapter_travels_once_for_each_optimizer_step_whatever_is_accumulated(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        size = sum(parameter.nbytes for parameter in model.adapter.parameters())
        optimizer = torch.optim.SGD(model.adapter.parameters(), lr=0.1)
        for number in range(1, 4):
            for _ in range(2):
                model(**batch()).loss.backward()
            with torch.no_grad():
                model(**batch())
            assert sent(swarm) == number * size
            optimizer.step()
            optimizer.zero_grad()
        assert resent(swarm) == 0


def test_equal_tensors_travel_once_and_are_waited_for_by_nobody(bloom: Path) -> None:
    with loopback(bloom, ["0:4"], micro_batch_tokens=10) as swarm:
        model = remote(bloom, swarm, lora("bloom"))  # fresh: the second matrices are all zeros
        began = time.monotonic()
        step(model, batch())
        assert time.monotonic() - began < 4
        tensors = {content_digest(parameter): parameter.nbytes for parameter in model.adapter.parameters()}
        assert len(tensors) < len(list(model.adapter.parameters()))
        assert sent(swarm) == sum(tensors.values())
        assert resent(swarm) == 0


def test_only_what_changed_travels_again(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        model = prepared(bloom, swarm)
        first, *_ = model.adapter.parameters()
        step(model, batch())
        before = sent(swarm)
        first.data += 1.0  # which autograd does not see
        step(model, batch())
        assert sent(swarm) - before == first.nbytes


def test_what_a_server_has_let_go_is_sent_again_and_said(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, micro_batch_tokens=10, max_in_flight=1) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        lost = handlers(swarm)[0]
        budget, lost.tensors.budget_bytes = lost.tensors.budget_bytes, 0
        lost.tensors.put("client", {"0" * 32: torch.ones(1)})
        assert len(lost.tensors) == 0
        lost.tensors.budget_bytes = budget
        began = time.monotonic()
        loss.backward()
        model(**batch())
        assert time.monotonic() - began < 3, "what has been let go is not waited for"
        assert resent(swarm) == 1
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})


def test_a_server_without_room_gets_everything_with_every_call(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        for handler in handlers(swarm):
            handler.tensors.budget_bytes = 1000
        for _ in range(MAX_LOSSES + 2):
            assert same_bits(quiet, step(model, batch())[2])
            time.sleep(TOGETHER_S)
        assert all(handler.tensors.held_bytes <= 1000 for handler in handlers(swarm))
        before = resent(swarm)
        step(model, batch())
        assert 0 < resent(swarm) == before, "after a few losses it is not tried any more"


def test_tensors_of_a_client_that_goes_are_freed(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        step(prepared(bloom, swarm), batch())
        own = handlers(swarm)
        assert all(len(handler.tensors) == 8 for handler in own)
        swarm.loop.run(swarm._transport.close())  # type: ignore[attr-defined]
        assert [(len(handler.tensors), handler.tensors.held_bytes) for handler in own] == [(0, 0), (0, 0)]


def test_a_server_of_before_gets_plain_calls(bloom: Path, quiet: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    info = CallHandler.info.fget
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        old = handlers(swarm)[0]

        def described(handler: CallHandler) -> ServerInfo:
            return dataclasses.replace(info(handler), features=()) if handler is old else info(handler)

        monkeypatch.setattr(CallHandler, "info", property(described))
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert len(old.tensors) == 0


@pytest.mark.parametrize("call", range(6))
def test_the_server_that_was_given_the_adapter_dies(bloom: Path, quiet: dict[str, Tensor], call: int) -> None:
    with loopback(bloom, ["0:2", "2:4", "0:2", "2:4"], micro_batch_tokens=10, faults=Faults(before={call})) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])


def test_a_digest_tells_types_shapes_and_values_apart() -> None:
    values = torch.arange(12, dtype=torch.float32)
    found = {content_digest(tensor) for tensor in (values, values.view(3, 4), values.view(4, 3), values.to(torch.bfloat16), values + 1, values[:0])}
    assert len(found) == 6
    assert content_digest(values.view(3, 4).T) == content_digest(values.view(3, 4).T.contiguous())


def test_what_another_step_is_bringing_is_not_waited_for(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may never come: a step that is interrupted ends on the loop only after the next one has begun there."""
    with loopback(bloom, ["0:4"], micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        transport: Any = swarm._transport
        call, stuck = transport.call, threading.Event()

        async def lost(peer: str, request: Encoded, timeout_s: float) -> Incoming:
            if not stuck.is_set():
                stuck.set()
                await asyncio.sleep(3600)
            return await call(peer, request, timeout_s)

        def never_ends() -> None:
            with pytest.raises(SwarmError):
                model(**batch())

        monkeypatch.setattr(transport, "call", lost)
        monkeypatch.setattr("servers.handler.HOLD_S", 60.0)
        first = threading.Thread(target=never_ends)
        first.start()
        assert stuck.wait(10)
        began = time.monotonic()
        step(model, batch())
        assert time.monotonic() - began < 30
        assert resent(swarm) == 0
    first.join(10)
    assert not first.is_alive()


def test_what_counts_as_brought_is_a_matter_of_steps() -> None:
    kwarg = CallKwarg("param.w", torch.zeros(2), {}, BlockSpan(0, 1), True, digest="d" * 32)
    call, uploads = SpanCall(BlockSpan(0, 1), "m", torch.zeros(1, 1, 2), (kwarg,)), Uploads()

    def carries(of_step: int) -> bool:
        return uploads.by_reference("peer", 0, call, of_step).kwargs[0].carried

    assert [carries(1), carries(1), carries(2), carries(2)] == [True, False, True, False]
    uploads.failed("peer", call, 1)
    assert not carries(2), "it comes with a call of its own"
    uploads.failed("peer", call, 2)
    assert carries(2)
    uploads.arrived("peer", 0, call)
    assert not carries(3)
    uploads.failed("peer", call, 3)
    assert carries(3), "nobody knows whether the server is still the one"
