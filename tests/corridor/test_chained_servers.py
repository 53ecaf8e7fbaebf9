"""Servers hand hidden states and gradients on to each other: the client moves three or four of them, whatever the number of servers."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swarmtune
from servers.handler import CallHandler
from swarmtune.errors import SwarmError, WireError
from swarmtune.remote.chain import REMEMBERED
from swarmtune.swarm import Swarm
from swarmtune.transport.base import TransportError
from swarmtune.types import Copies
from swarmtune.wire.codec import Message
from swarmtune.wire.kept import KeptCall
from swarmtune.wire.messages import CallKind
from swarmtune.wire.relay import COPIES, PASSES_ON, take_relay
from tests.harness import Faults, batch, local_peft, loopback, lora, remote, same_bits, save_tiny, set_values, step, trainable

HIDDEN_BYTES = 4 * 10 * 48 * 4
SPANS = {2: ["0:2", "2:4"], 4: ["0:1", "1:2", "2:3", "3:4"]}


def handlers(swarm: Swarm) -> list[CallHandler]:
    return list(swarm._transport.handlers.values())  # type: ignore[attr-defined]


def prepared(path: Path, swarm: Swarm, config: Any = None) -> torch.nn.Module:
    model = remote(path, swarm, config or lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    return model


def moved(swarm: Swarm) -> dict[str, float]:
    """Hidden states and gradients through the client, in hidden states of the whole batch."""
    payload = swarm.traffic().payload
    return {kind: payload.get(kind, 0) / HIDDEN_BYTES for kind in ("up hidden", "down hidden", "up gradient", "down gradient", "up relayed")}


def forwards(swarm: Swarm) -> int:
    return sum(server.block_forwards for server in swarm.traffic().servers)


def nobody_reaches(swarm: Swarm) -> None:
    async def fails(*_: object) -> None:
        raise TransportError("no way there")

    for handler in handlers(swarm):
        handler.deliver = fails  # type: ignore[assignment]


@pytest.fixture(scope="module")
def quiet(bloom: Path) -> dict[str, Tensor]:
    local = local_peft(bloom, lora("bloom"))
    set_values([trainable(local)])
    return step(local, batch())[2]


@pytest.mark.parametrize("servers", [2, 4])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_the_client_moves_three_hidden_states_for_any_number_of_servers(models: dict[str, Path], family: str, servers: int) -> None:
    local = local_peft(models[family], lora(family))
    set_values([trainable(local)])
    expected = step(local, batch(padding="left"))
    with loopback(models[family], SPANS[servers]) as swarm:
        found = step(prepared(models[family], swarm, lora(family)), batch(padding="left"))
        assert moved(swarm) == {"up hidden": 1, "down hidden": 1, "up gradient": 1, "down gradient": 0, "up relayed": 0}
        assert sum(server.block_forwards for server in swarm.traffic().servers) == 4
        assert swarm.traffic().retries == 0
    assert torch.equal(expected[0], found[0])
    assert same_bits(expected[2], found[2])


def test_the_gradient_by_the_input_is_the_fourth(bloom: Path) -> None:
    found = []
    for chaining in (False, True):
        with loopback(bloom, SPANS[4], chaining=chaining) as swarm:
            hidden = torch.randn(4, 10, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
            prompt = torch.randn(3, 48, generator=torch.Generator().manual_seed(2)).requires_grad_()
            remote(bloom, swarm).body(hidden, kwargs=[swarmtune.Kwarg("prompt", prompt, blocks="1:3")]).square().sum().backward()
            found.append({"hidden": hidden.grad, "prompt": prompt.grad})
            assert moved(swarm)["down gradient"] == (1 if chaining else 4)
    assert same_bits(*found)


def test_micro_batches_in_chains_give_the_bits_of_calls_one_by_one(bloom: Path) -> None:
    found = []
    for chaining in (False, True):
        with loopback(bloom, SPANS[4], micro_batch_tokens=10, chaining=chaining) as swarm:
            model = prepared(bloom, swarm)
            found.append(step(model, batch())[2])
            if chaining:
                assert moved(swarm)["up hidden"] == 1
                assert swarm.traffic().payload["down kwarg gradients"] == sum(each.nbytes for each in model.adapter.parameters())
    assert same_bits(*found)


def test_servers_that_cannot_reach_each_other_go_by_way_of_the_client(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, SPANS[4]) as swarm:
        model = prepared(bloom, swarm)
        nobody_reaches(swarm)
        assert same_bits(quiet, step(model, batch())[2])
        assert moved(swarm)["up relayed"] == 6, "the first forward and the first backward find out"
        assert same_bits(quiet, step(model, batch())[2])
        assert moved(swarm)["up relayed"] == 6, "after that the client does not try for a while"
        assert swarm.traffic().retries == 0


def test_servers_of_before_are_called_one_by_one(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, SPANS[4]) as swarm:
        for handler in handlers(swarm):
            handler.deliver = None
            assert PASSES_ON not in handler.info.features
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert moved(swarm)["up hidden"] == 4


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("call", range(8))
def test_any_server_of_a_chain_dies(bloom: Path, quiet: dict[str, Tensor], call: int, phase: str) -> None:
    spans = [*SPANS[4], *SPANS[4]]
    with loopback(bloom, spans, faults=Faults(**{phase: {call}}), patience_s=10) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert swarm.traffic().retries >= 1


def test_a_chain_that_fails_with_half_of_the_sums_is_done_again(bloom: Path) -> None:
    with loopback(bloom, SPANS[2], micro_batch_tokens=10) as swarm:
        quiet = step(prepared(bloom, swarm), batch())[2]
    for call in range(8, 16):
        with loopback(bloom, [*SPANS[2], *SPANS[2]], micro_batch_tokens=10, faults=Faults(after={call}), patience_s=10) as swarm:
            assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2]), call


def test_nothing_is_kept_or_moved_below_the_lowest_trained_block(bloom: Path) -> None:
    upper = lora("bloom", layers_to_transform=[2])
    local = local_peft(bloom, upper)
    set_values([trainable(local)])
    expected = step(local, batch())[2]
    with loopback(bloom, SPANS[4]) as swarm:
        assert same_bits(expected, step(prepared(bloom, swarm, upper), batch())[2])
        assert moved(swarm) == {"up hidden": 1, "down hidden": 1, "up gradient": 1, "down gradient": 0, "up relayed": 0}
        asked = {server.span.start: server.calls for server in swarm.traffic().servers}
        assert asked == {0: 1, 1: 1, 2: 2, 3: 2}


def test_no_room_for_graphs_is_slower_and_right(bloom: Path, quiet: dict[str, Tensor]) -> None:
    for poor in ([0], [1], [0, 1, 2, 3]):
        with loopback(bloom, SPANS[4]) as swarm:
            for index in poor:
                handlers(swarm)[index].graphs.budget_bytes = 0
            assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
            assert all(len(handler.mailbox) == 0 for handler in handlers(swarm))


def test_graphs_that_are_lost_in_a_chain_are_computed_again(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, SPANS[4]) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        handlers(swarm)[1].gone("client")
        loss.backward()
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})
        assert sum(len(handler.mailbox) for handler in handlers(swarm)) == 0


def test_copies_come_to_the_client_and_change_no_bit(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, SPANS[4], copies=Copies.ALL) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert moved(swarm) == {"up hidden": 1, "down hidden": 4, "up gradient": 1, "down gradient": 0, "up relayed": 0}
        assert forwards(swarm) == 4
        assert swarm.traffic().retries == 0


def test_calls_with_copies_have_deadlines_of_their_own(bloom: Path) -> None:
    """Their download takes its time, for which no server is to blame."""
    for copies in (Copies.NONE, Copies.ALL):
        with loopback(bloom, SPANS[4], copies=copies) as swarm:
            step(prepared(bloom, swarm), batch())
            known = {way for way, _ in next(iter(swarm._models.values())).chain.caller._times._lately}
            assert known == {"forward with copies" if copies is Copies.ALL else "forward", "backward"}


def test_nothing_is_copied_that_no_backward_needs(bloom: Path) -> None:
    with loopback(bloom, SPANS[4], copies=Copies.ALL) as swarm:
        step(prepared(bloom, swarm, lora("bloom", layers_to_transform=[2])), batch())
        assert moved(swarm)["down hidden"] == 3, "the output, and what enters blocks 2 and 3"
        with torch.no_grad():
            remote(bloom, swarm)(**batch())
        assert moved(swarm)["down hidden"] == 4


@pytest.mark.parametrize("poor", [[0], [1], [3], [0, 1, 2, 3]], ids=str)
def test_where_graphs_find_no_room_copies_save_a_third_forward(bloom: Path, quiet: dict[str, Tensor], poor: list[int]) -> None:
    seen = {}
    for copies in Copies:
        with loopback(bloom, SPANS[4], copies=copies) as swarm:
            for index in poor:
                handlers(swarm)[index].graphs.budget_bytes = 0
            model, counts = prepared(bloom, swarm), [0]
            for _ in range(3):
                assert same_bits(quiet, step(model, batch())[2])
                counts.append(forwards(swarm))
            seen[copies] = [after - before for before, after in itertools.pairwise(counts)]
    assert seen[Copies.ALL] == [4 + len(poor)] * 3
    assert seen[Copies.AUTO][1:] == [4 + len(poor)] * 2, "the first step finds out"
    assert min(seen[Copies.NONE]) > 4 + len(poor)


def takes_its_time(handler: CallHandler) -> None:
    """Its backwards take longer than a word of another server, which they need not on a busy machine."""
    execute = handler._execute

    async def later(peer: str, call: Any) -> Any:
        if isinstance(call, KeptCall):
            await asyncio.sleep(0.5)
        return await execute(peer, call)

    handler._execute = later  # type: ignore[method-assign]


def test_copies_begin_when_a_graph_has_been_lost(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, SPANS[4]) as swarm:
        model = prepared(bloom, swarm)
        takes_its_time(handlers(swarm)[3])
        loss = model(**batch()).loss
        handlers(swarm)[1].gone("client")
        loss.backward()
        before = moved(swarm)["down hidden"]
        assert same_bits(quiet, step(model, batch())[2])
        assert moved(swarm)["down hidden"] - before == 3, "the output, and what went in and out of the one that lost"


def test_copies_end_when_graphs_are_found_again(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, SPANS[4]) as swarm:
        model = prepared(bloom, swarm)
        handlers(swarm)[1].graphs.budget_bytes = 0
        step(model, batch())
        handlers(swarm)[1].graphs.budget_bytes = 1 << 30
        downs = []
        for _ in range(REMEMBERED + 1):
            before = moved(swarm)["down hidden"]
            assert same_bits(quiet, step(model, batch())[2])
            downs.append(moved(swarm)["down hidden"] - before)
        assert downs[0] == 3
        assert downs[-1] == 1


@pytest.mark.parametrize("lost", range(4))
def test_a_graph_that_is_lost_in_a_chain_costs_its_own_server_and_the_last(bloom: Path, quiet: dict[str, Tensor], lost: int) -> None:
    """Those between have waited for the gradient, and keep theirs."""
    with loopback(bloom, SPANS[4], copies=Copies.ALL) as swarm:
        model = prepared(bloom, swarm)
        takes_its_time(handlers(swarm)[3])
        model.zero_grad()
        loss = model(**batch()).loss
        handlers(swarm)[lost].gone("client")
        loss.backward()
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})
        assert forwards(swarm) <= 4 + len({lost, 3})
        assert moved(swarm)["down gradient"] == {0: 2, 1: 3, 2: 2, 3: 1}[lost], "all but the last and the one that lost go back as chains"
        assert sum(len(handler.graphs) for handler in handlers(swarm)) <= 1
        step(model, batch())
        assert sum(len(handler.graphs) for handler in handlers(swarm)) == 0, "what was left was given back"


def test_a_server_with_room_for_some_graphs_is_copied_for_all_along(bloom: Path) -> None:
    seen = {}
    for copies in Copies:
        with loopback(bloom, SPANS[4], micro_batch_tokens=10, copies=copies) as swarm:
            model = prepared(bloom, swarm)
            step(model, batch())
            (own,) = {graph.held_bytes for graph in held_graphs(swarm, model)}
            handlers(swarm)[1].graphs.budget_bytes = int(2.5 * own)
            counts = []
            for _ in range(4):
                before = forwards(swarm)
                step(model, batch())
                counts.append(forwards(swarm) - before)
            seen[copies] = counts[1:]
    assert max(max(seen[Copies.ALL]), max(seen[Copies.AUTO])) < min(seen[Copies.NONE]), seen


def held_graphs(swarm: Swarm, model: torch.nn.Module) -> list[Any]:
    """Of the second server, in a forward."""
    loss = model(**batch()).loss
    found = [graph for own in handlers(swarm)[1].graphs._kept.values() for _, graph in own.values()]
    loss.backward()
    return found


@pytest.mark.parametrize("chaining", [True, False], ids=["chain", "one by one"])
def test_a_backward_that_fails_gives_back_what_it_leaves(bloom: Path, chaining: bool) -> None:
    with loopback(bloom, SPANS[4], faults=Faults(before={4}), patience_s=0.3, chaining=chaining) as swarm:
        model = prepared(bloom, swarm)
        loss = model(**batch()).loss
        with pytest.raises(SwarmError):
            loss.backward()
        released = next(iter(swarm._models.values())).chain.caller._released
        left = {handle for handler in handlers(swarm) for own in handler.graphs._kept.values() for handle in own}
        assert left
        assert left <= {handle for handles in released.values() for handle in handles}


@pytest.mark.parametrize(("copies", "down"), [(Copies.AUTO, 3), (Copies.ALL, 8)])
def test_one_poor_server_of_eight_leaves_the_others_in_chains(tmp_path: Path, copies: Copies, down: int) -> None:
    path = save_tiny("bloom", tmp_path / "bloom", layers=8)
    with loopback(path, [f"{block}:{block + 1}" for block in range(8)], copies=copies) as swarm:
        handlers(swarm)[1].graphs.budget_bytes = 0
        model = prepared(path, swarm)
        step(model, batch())
        before = moved(swarm)
        step(model, batch())
        after = moved(swarm)
        assert {kind: after[kind] - before[kind] for kind in after} == {
            "up hidden": 2, "down hidden": down, "up gradient": 3, "down gradient": 2, "up relayed": 0
        }  # fmt: skip


def test_a_server_that_makes_no_copies_is_one_piece_with_the_next(bloom: Path, quiet: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    features = CallHandler._features
    first = {}
    monkeypatch.setattr(
        CallHandler, "_features", lambda handler: tuple(each for each in features(handler) if each != COPIES or handler._info.span.start != 1)
    )
    for poor in (None, 0, 1, 2):
        with loopback(bloom, SPANS[4], copies=Copies.ALL) as swarm:
            if poor is not None:
                handlers(swarm)[poor].graphs.budget_bytes = 0
            assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
            first[poor] = forwards(swarm)
            assert poor is not None or moved(swarm)["down hidden"] == 3
    assert first[None] == 4
    assert first[0] == 5


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("call", range(8))
def test_any_server_of_a_chain_with_copies_dies(bloom: Path, quiet: dict[str, Tensor], call: int, phase: str) -> None:
    spans = [*SPANS[4], *SPANS[4]]
    with loopback(bloom, spans, faults=Faults(**{phase: {call}}), patience_s=10, copies=Copies.ALL) as swarm:
        assert same_bits(quiet, step(prepared(bloom, swarm), batch())[2])
        assert swarm.traffic().retries >= 1
        if call >= 4:  # in the backward: no block below is run again for its output alone
            assert forwards(swarm) <= 8


def test_a_second_backward_has_its_copies(bloom: Path, quiet: dict[str, Tensor]) -> None:
    with loopback(bloom, SPANS[4], copies=Copies.ALL) as swarm:
        model = prepared(bloom, swarm)
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        once = {name: parameter.grad.clone() for name, parameter in model.adapter.named_parameters()}
        model.zero_grad()
        loss.backward()
        assert same_bits(once, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})
        assert same_bits(quiet, once)
        assert forwards(swarm) == 8


@pytest.mark.parametrize("fields", [{"copy": True}, {"copy": 1, "send": ["peer", "0" * 32]}, {"copy": None, "send": ["peer", "0" * 32]}], ids=str)
def test_a_copy_is_asked_for_beside_send_and_in_no_other_way(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="copy must be true or false"):
        take_relay(Message(CallKind.FORWARD, fields, {}))


def test_an_evaluation_goes_through_the_chain_too(tmp_path: Path) -> None:
    path = save_tiny("gpt2", tmp_path / "gpt2")
    with loopback(path, SPANS[4]) as swarm, torch.no_grad():
        model = remote(path, swarm)
        first = model(**batch()).logits
        assert moved(swarm)["up hidden"] == moved(swarm)["down hidden"] == 1
    with loopback(path, ["0:4"]) as swarm, torch.no_grad():
        assert torch.equal(first, remote(path, swarm)(**batch()).logits)
