"""Servers add the gradients of micro-batches, so that they travel once per backward; what dies in between changes no bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import swarmtune
from servers.handler import CallHandler
from swarmtune.errors import SwarmError
from swarmtune.remote.batch import KeptGraph, KwargPlan, Leg
from swarmtune.remote.gradients import PassGradients
from swarmtune.swarm import Swarm
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import ServerInfo
from tests.harness import Faults, batch, loopback, lora, remote, same_bits, set_values, step

MICRO = 4
REPLICAS = ["0:2", "2:4", "0:2", "2:4"]


def handlers(swarm: Swarm) -> list[CallHandler]:
    return list(swarm._transport.handlers.values())  # type: ignore[attr-defined]


def prepared(path: Path, swarm: Swarm) -> torch.nn.Module:
    model = remote(path, swarm, lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    return model


def held(swarm: Swarm) -> int:
    return sum(handler._span.sums.held_bytes for handler in handlers(swarm))


def never_adds(swarm: Swarm) -> None:
    for handler in handlers(swarm):
        handler._span.sums.budget_bytes = -1


@pytest.fixture(scope="module")
def quiet(bloom: Path) -> dict[str, Tensor]:
    """Added by the client."""
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        never_adds(swarm)
        return step(prepared(bloom, swarm), batch())[2]


def test_gradients_travel_once_per_backward_and_are_those_that_the_client_would_add(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        assert same_bits(quiet, step(model, batch())[2])
        size = sum(parameter.nbytes for parameter in model.adapter.parameters())
        assert swarm.traffic().payload["down kwarg gradients"] == size
        assert held(swarm) == 0
        never_adds(swarm)
        step(model, batch())
        assert swarm.traffic().payload["down kwarg gradients"] == size + MICRO * size


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("call", range(2 * MICRO, 4 * MICRO))
def test_a_server_that_dies_with_a_half_of_a_sum(bloom: Path, quiet: dict[str, Tensor], call: int, phase: str) -> None:
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, faults=Faults(**{phase: {call}})) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert swarm.traffic().retries >= 1


def test_micro_batches_of_several_servers_are_added_here(bloom: Path, quiet: dict[str, Tensor]) -> None:
    faults = Faults(after={2})
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, faults=faults) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
    # Nobody is asked for a sum that cannot come, as that would have to be asked for again.
    assert sum(kind.endswith("backward") for kind, _ in faults.log) == 2 * MICRO


def test_a_sum_is_asked_for_where_all_graphs_are_on_one_connection() -> None:
    plan = KwargPlan("prompt", {}, BlockSpan(0, 2), True)
    for other, expected in ((("one", 1), True), (("two", 1), False), (("one", 2), False)):
        found, hidden = PassGradients([plan], 2, 1), torch.zeros(1, 1, 1)
        for micro, (peer, generation) in enumerate((("one", 1), other)):
            found.ran(micro, [Leg(BlockSpan(0, 2), hidden, KeptGraph(peer, 7 + micro, generation))])
        assert (found.wanted(0, BlockSpan(0, 2)) is not None) == expected


def test_a_server_that_adds_others_than_the_pass_is_not_believed(bloom: Path, quiet: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback(bloom, REPLICAS, micro_batch_tokens=10) as swarm:
        liar = handlers(swarm)[1]
        add = liar._span._added

        def short(graph: object, call: object, result: object, client: str) -> object:
            found = add(graph, call, result, client)  # type: ignore[arg-type]
            return dataclasses.replace(found, summed=found.summed[:-1]) if found.summed else found

        monkeypatch.setattr(liar._span, "_added", short)
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])


def test_the_rows_of_a_prompt_for_each_row_come_back_with_their_micro_batch(bloom: Path) -> None:
    found = []
    for budget_bytes in (-1, 1 << 30):
        with loopback(bloom, micro_batch_tokens=10) as swarm:
            for handler in handlers(swarm):
                handler._span.sums.budget_bytes = budget_bytes
            body = remote(bloom, swarm).body
            hidden = torch.randn(4, 10, 48, generator=torch.Generator().manual_seed(1))
            values = torch.Generator().manual_seed(2)
            shared = torch.randn(3, 48, generator=values).requires_grad_()
            rows = torch.randn(4, 3, 48, generator=values).requires_grad_()
            kwargs = [swarmtune.Kwarg("prompt", shared, blocks="0:2"), swarmtune.Kwarg("prompt", rows, {"batch": 0}, blocks="2:4")]
            body(hidden, kwargs=kwargs).square().sum().backward()
            found.append({"shared": shared.grad, "rows": rows.grad})
    assert same_bits(*found)


def test_a_server_of_before_returns_each(bloom: Path, quiet: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    info = CallHandler.info.fget

    def described(handler: CallHandler) -> ServerInfo:
        return dataclasses.replace(info(handler), features=())

    monkeypatch.setattr(CallHandler, "info", property(described))
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])


def test_a_client_that_goes_leaves_no_gradients_behind(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10, faults=Faults(before=set(range(13, 40))), patience_s=0.2) as swarm:
        own = handlers(swarm)
        with pytest.raises(SwarmError):
            step(prepared(bloom, swarm), batch())
        swarm.loop.run(swarm._transport.close())  # type: ignore[attr-defined]
        assert [handler._span.sums.held_bytes for handler in own] == [0, 0]
