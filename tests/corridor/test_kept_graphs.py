"""Graphs that forwards leave behind: the forward runs once, the backward sends only a gradient; a lost graph costs time and changes no bit."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swarmtune
from servers.graphs import GraphGone, Tape
from servers.handler import CallHandler
from swarmtune.remote.events import EventKind
from swarmtune.swarm import Swarm
from swarmtune.types import BlockSpan
from swarmtune.wire.frames import parse_json
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import ServerInfo
from tests.harness import Faults, batch, local_peft, loopback, lora, remote, same_bits, set_values, step, trainable

BLOCKS = 4
one_by_one = partial(loopback, chaining=False)
"""Chains keep graphs too; here each call is looked at by itself."""


def handlers(swarm: Swarm) -> list[CallHandler]:
    return list(swarm._transport.handlers.values())  # type: ignore[attr-defined]


def kept(swarm: Swarm) -> int:
    return sum(len(handler.graphs) for handler in handlers(swarm))


def limit(swarm: Swarm, budget_bytes: int) -> None:
    for handler in handlers(swarm):
        handler.graphs.budget_bytes = budget_bytes


def recomputed(swarm: Swarm) -> int:
    return swarm.traffic().events[EventKind.RECOMPUTED].count


def forwards(swarm: Swarm) -> int:
    return sum(server.block_forwards for server in swarm.traffic().servers)


def prepared(path: Path, swarm: Swarm, config: Any = None) -> torch.nn.Module:
    model = remote(path, swarm, config or lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    return model


@pytest.fixture(scope="module")
def quiet(bloom: Path) -> dict[str, Tensor]:
    local = local_peft(bloom, lora("bloom"))
    set_values([trainable(local)])
    return step(local, batch())[2]


@pytest.mark.parametrize("rows", [4, 2], ids=["one micro-batch", "two"])
def test_each_block_runs_forward_once_and_the_backward_sends_only_a_gradient(bloom: Path, rows: int) -> None:
    with one_by_one(bloom, micro_batch_tokens=10 * rows) as swarm:
        model = prepared(bloom, swarm)
        step(model, batch())
        traffic = swarm.traffic()
        assert forwards(swarm) == BLOCKS * 4 // rows
        assert kept(swarm) == 0
    hidden_bytes = 4 * 10 * 48 * 4
    adapter_bytes = sum(parameter.nbytes for parameter in model.adapter.parameters())
    assert traffic.payload["up hidden"] == traffic.payload["down hidden"] == traffic.payload["up gradient"] == 2 * hidden_bytes
    assert traffic.payload["down gradient"] == hidden_bytes, "below block 0 nothing learns"
    assert traffic.payload["up kwargs"] == adapter_bytes, "once for each optimizer step"


@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("budget_bytes", [0, 100_000, 300_000, 1 << 30])
def test_gradients_do_not_depend_on_what_is_kept(models: dict[str, Path], family: str, budget_bytes: int) -> None:
    local = local_peft(models[family], lora(family))
    set_values([trainable(local)])
    expected = step(local, batch(padding="left"))
    with one_by_one(models[family]) as swarm:
        limit(swarm, budget_bytes)
        found = step(prepared(models[family], swarm, lora(family)), batch(padding="left"))
        assert forwards(swarm) == BLOCKS * (1 if budget_bytes == 1 << 30 else 2) or budget_bytes == 300_000
        assert all(handler.graphs.held_bytes <= budget_bytes for handler in handlers(swarm))
        assert recomputed(swarm) == 0, "what was not kept is not asked for"
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])


def test_graphs_that_are_lost_are_computed_again_and_said(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with one_by_one(bloom) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        assert kept(swarm) == 2
        handlers(swarm)[1].gone("client")
        loss.backward()
        assert recomputed(swarm) == 1
        assert forwards(swarm) == BLOCKS + 2
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})


@pytest.mark.parametrize(("budget_bytes", "told"), [(0, 2), (1 << 30, 0)])
def test_servers_without_room_for_a_graph_are_told_once(bloom: Path, caplog: pytest.LogCaptureFixture, budget_bytes: int, told: int) -> None:
    with caplog.at_level(logging.WARNING, "swarmtune"), loopback(bloom) as swarm:
        limit(swarm, budget_bytes)
        model = prepared(bloom, swarm)
        for _ in range(2):
            step(model, batch())
    assert caplog.text.count("had no room for the graph of") == told


def test_more_room_is_not_asked_for_where_it_would_not_help(bloom: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server keeps no graph either whose gradients would be too large for one answer."""
    for module in ("servers.span", "swarmtune.remote.chain"):
        monkeypatch.setattr(f"{module}.fits_an_answer", lambda _: False)
    with caplog.at_level(logging.WARNING, "swarmtune"), loopback(bloom) as swarm:
        step(prepared(bloom, swarm), batch())
    assert "had no room" not in caplog.text


def test_a_server_that_loses_graphs_in_each_step_is_told_once(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = []
    with caplog.at_level(logging.WARNING, "swarmtune"), one_by_one(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        limit(swarm, min(handler.graphs.held_bytes for handler in handlers(swarm)) // 2)
        loss.backward()
        for _ in range(3):
            step(model, batch())
            said.append(caplog.text.count("loses graphs before their backwards come"))
    assert said == [0, 2, 2]


def test_a_full_budget_evicts_and_never_fails(bloom: Path) -> None:
    with one_by_one(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        step(model, batch())
        quiet = step(model, batch())[2]
        loss = model(**batch()).loss
        sizes = [handler.graphs.held_bytes for handler in handlers(swarm)]
        loss.backward()
        for handler, size in zip(handlers(swarm), sizes, strict=True):
            handler.graphs.budget_bytes = size // 2  # of four micro-batches, two fit
        before = forwards(swarm)
        assert same_bits(quiet, step(model, batch())[2])
        assert [handler.graphs.evicted for handler in handlers(swarm)] == [2, 2]
        assert recomputed(swarm) == 4
        assert forwards(swarm) - before == BLOCKS * 4 + 2 * 4


def test_graphs_of_a_client_that_goes_are_freed(bloom: Path) -> None:
    with one_by_one(bloom) as swarm:
        loss = prepared(bloom, swarm)(**batch()).loss
        assert kept(swarm) == 2
        freed = handlers(swarm)
        swarm.loop.run(swarm._transport.close())  # type: ignore[attr-defined]
        assert [len(handler.graphs) for handler in freed] == [0, 0]
        assert loss.requires_grad


def test_a_graph_that_nobody_comes_back_for_is_released_with_the_next_forward(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with one_by_one(bloom) as swarm:
        model = prepared(bloom, swarm)
        for _ in range(3):
            model(**batch())  # its loss is dropped
            gc.collect()
        assert kept(swarm) == 2
        assert same_bits(quiet, step(model, batch())[2])
        assert kept(swarm) == 0


def test_a_graph_that_is_too_old_is_freed_and_the_backward_goes_on(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with one_by_one(bloom) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        for handler in handlers(swarm):
            handler.graphs.ttl_s = 0.01
        time.sleep(0.02)
        for handler in handlers(swarm):
            handler.graphs.expire()
        assert kept(swarm) == 0
        loss.backward()
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})


def test_a_second_backward_through_the_same_forward_gives_the_same_bits(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with one_by_one(bloom) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})
        assert recomputed(swarm) == 0, "a graph that was used is not asked for again"


def test_nothing_is_kept_where_nothing_learns(bloom: Path) -> None:
    with one_by_one(bloom, ["0:1", "1:2", "2:4"]) as swarm:
        model = prepared(bloom, swarm)
        model.requires_grad_(False)
        model(**batch())
        assert kept(swarm) == 0
        with torch.no_grad():
            prepared(bloom, swarm)(**batch())
        assert kept(swarm) == 0


def test_nothing_is_kept_below_the_lowest_trained_block(bloom: Path) -> None:
    upper = lora("bloom", layers_to_transform=[3])
    with one_by_one(bloom, ["0:2", "2:4"]) as swarm, one_by_one(bloom, ["3:4", "0:3"]) as alone:
        loss = prepared(bloom, swarm, upper)(**batch()).loss
        assert [len(handler.graphs) for handler in handlers(swarm)] == [0, 1]
        own = prepared(bloom, alone, upper)(**batch()).loss
        one, two = handlers(alone)[0].graphs.held_bytes, handlers(swarm)[1].graphs.held_bytes
        assert one == two > 0, "block 2 leaves nothing behind"
        loss.backward()
        own.backward()
        assert "down gradient" not in swarm.traffic().payload, "nobody needs the gradient by the input of block 2"


def test_the_input_of_the_body_gets_its_gradient_through_kept_graphs(bloom: Path) -> None:
    prompts = swarmtune.DeepPromptConfig(num_tokens=3)
    found = []
    for budget_bytes in (0, 1 << 30):
        with one_by_one(bloom) as swarm:
            limit(swarm, budget_bytes)
            torch.manual_seed(0)
            model = remote(bloom, swarm, prompts)
            found.append(step(model, batch())[2])
            assert forwards(swarm) == BLOCKS * (1 if budget_bytes else 2)
    assert same_bits(*found)


def test_dropout_masks_of_a_kept_graph_are_those_of_a_recomputed_one(bloom: Path) -> None:
    found = []
    for budget_bytes in (0, 1 << 30):
        with one_by_one(bloom) as swarm:
            limit(swarm, budget_bytes)
            model = prepared(bloom, swarm, lora("bloom", lora_dropout=0.3)).train()
            torch.manual_seed(4)
            found.append(step(model, batch())[2])
    assert same_bits(*found)


def test_servers_of_before_and_servers_that_keep_graphs_work_together(bloom: Path, quiet: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    info = CallHandler.info.fget
    with one_by_one(bloom) as swarm:
        old = handlers(swarm)[0]

        def described(handler: CallHandler) -> ServerInfo:
            return dataclasses.replace(info(handler), features=()) if handler is old else info(handler)

        monkeypatch.setattr(CallHandler, "info", property(described))
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert forwards(swarm) == BLOCKS + 2


def test_a_kept_graph_does_not_hold_the_message_that_brought_its_tensors(bloom: Path) -> None:
    with one_by_one(bloom, ["0:4"]) as swarm:
        model = prepared(bloom, swarm)
        span = handlers(swarm)[0]._span
        calls, real = [], span.forward
        span.forward = lambda call, client="": (calls.append(call), real(call, client))[1]  # type: ignore[method-assign]
        loss = model(**batch()).loss
        (own,) = span.graphs._kept.values()
        (_, graph), brought = next(iter(own.values())), {kwarg.tensor.untyped_storage().data_ptr() for kwarg in calls[0].kwargs}
        assert graph.leaves
        assert brought.isdisjoint(leaf.untyped_storage().data_ptr() for _, _, leaf in graph.leaves)
        loss.backward()


def test_a_server_that_was_replaced_during_a_call_is_not_taken_for_the_same(bloom: Path) -> None:
    """It has described itself well since, over its new connection; but a handle that came over the old one means nothing to it."""
    with one_by_one(bloom, ["0:4"]) as swarm:
        quiet = step(prepared(bloom, swarm), batch())[2]
    with one_by_one(bloom, ["0:4", "0:4"]) as swarm:
        model = prepared(bloom, swarm)
        (opened,) = swarm._models.values()
        transport, replaced = swarm._transport, []
        call, generation = transport.call, transport.generation
        transport.generation = lambda peer: generation(peer) + replaced.count(peer)  # type: ignore[method-assign]

        async def swapped(peer: str, request: Any, timeout_s: float) -> Any:
            answer = await call(peer, request, timeout_s)
            if not replaced and parse_json(request.header)["kind"] == "forward":
                replaced.append(peer)
                opened.directory.known[peer].generation += 1
            return answer

        transport.call = swapped  # type: ignore[method-assign]
        assert same_bits(quiet, step(model, batch())[2])
        assert swarm.traffic().events[EventKind.CUT_OFF].count == 1


def test_a_graph_is_freed_as_soon_as_it_is_let_go_and_counts_what_it_holds(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[weakref.ref[Tensor]] = []
    pack = Tape._pack

    def watched(tape: Tape, tensor: Tensor) -> tuple[Tensor, int] | None:
        packed = pack(tape, tensor)
        assert packed is not None
        saved.append(weakref.ref(packed[0]))
        return packed

    monkeypatch.setattr(Tape, "_pack", watched)
    with one_by_one(bloom, ["0:4"]) as swarm:
        loss = prepared(bloom, swarm)(**batch()).loss
        handler = handlers(swarm)[0]
        frozen = {tensor.untyped_storage().data_ptr() for _, block in handler._span.weights.blocks.items() for tensor in block.state_dict().values()}
        storages = [tensor.untyped_storage() for ref in saved for tensor in [ref()] if tensor is not None]
        alive = {storage.data_ptr(): storage.nbytes() for storage in storages}
        own = {address: size for address, size in alive.items() if address not in frozen}
        assert len(own) > 20
        assert sum(own.values()) <= handler.graphs.held_bytes <= sum(own.values()) + 4 * 4 * 10 * 48 * 4 + 2 * 4 * 4 * 48 * 5 * 4
        del storages
        gc.disable()
        try:
            handler.gone("client")
            assert [ref for ref in saved if ref() is not None] == [], "no cycle keeps the graph"
        finally:
            gc.enable()
        loss.backward()


@pytest.mark.parametrize("call", range(4))
def test_the_server_of_any_call_dies_over_kept_graphs(bloom: Path, quiet: dict[str, Tensor], call: int) -> None:
    with one_by_one(bloom, ["0:2", "2:4", "0:2", "2:4"], faults=Faults(after={call})) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert swarm.traffic().retries == 1


def test_a_handle_of_other_blocks_is_refused(bloom: Path) -> None:
    """Or the gradients of one block would be filed as those of another."""
    with one_by_one(bloom, ["0:4"]) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        (handler,) = handlers(swarm)
        (own,) = handler.graphs._kept.values()
        ((handle, (_, graph)),) = own.items()
        (client,) = handler.graphs._kept
        call = KeptCall(BlockSpan(0, 2), handler.info.model, handle, torch.zeros_like(graph.output_BTH))
        with pytest.raises(GraphGone, match="does not fit"):
            handler._span.kept_backward(call, client)
        loss.backward()
        assert recomputed(swarm) == 1
