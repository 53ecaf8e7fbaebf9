"""1F1B: each micro-batch goes back as soon as it has come forward; losses and gradients are those of the whole batch."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor

import swarmtune
from servers.handler import CallHandler
from swarmtune.errors import NonFinite, SwarmError, UsageError
from swarmtune.remote.body import attached_to
from swarmtune.remote.events import EventKind
from swarmtune.remote.ledger import History, Ledger
from swarmtune.remote.pipeline import Pipelined
from swarmtune.remote.route import Directory, Hop
from swarmtune.remote.verdict import judge
from swarmtune.swarm import Swarm
from swarmtune.types import Pipeline
from tests.harness import Faults, batch, local_peft, loopback, lora, remote, same_bits, set_values, step, worst_difference

REPLICAS = ["0:2", "2:4", "0:2", "2:4"]


def prepared(path: Path, swarm: Swarm, adapter: Any = None) -> torch.nn.Module:
    model = remote(path, swarm, adapter or lora("bloom"))
    set_values([dict(model.adapter.named_parameters())])
    return model


def pipelined(model: torch.nn.Module, given: Mapping[str, Tensor], scale: float = 1.0, factor: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients by everything that learns."""
    loss = Pipelined(model)(given, scale)
    assert loss is not None
    model.zero_grad()
    (loss * factor).backward()
    return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.adapter.named_parameters() if parameter.grad is not None}


def uneven() -> dict[str, Tensor]:
    """Micro-batches that ask for different numbers of tokens; one of them for none."""
    given = batch(rows=5, padding="left")
    given["labels"][1, 3:] = -100
    given["labels"][2] = -100
    return given


@pytest.mark.parametrize("micro_batch_tokens", [10, 20, 30])
@pytest.mark.parametrize("chaining", [True, False], ids=["chain", "one by one"])
def test_loss_and_gradients_are_the_local_ones(bloom: Path, micro_batch_tokens: int, chaining: bool) -> None:
    local = local_peft(bloom, lora("bloom"))
    with loopback(bloom, micro_batch_tokens=micro_batch_tokens, chaining=chaining) as swarm:
        model = prepared(bloom, swarm)
        learning = [parameter for parameter in local.parameters() if parameter.requires_grad]
        own = dict(model.adapter.named_parameters())
        set_values([own, dict(zip(own, learning, strict=True))])
        loss, grads = pipelined(model, uneven())
    expected = local(**uneven()).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for grad, parameter in zip(grads.values(), learning, strict=True):
        assert (grad - parameter.grad).norm() <= 1e-6 * parameter.grad.norm()


def test_gradients_are_those_of_all_forwards_then_all_backwards_to_the_bit(bloom: Path) -> None:
    """Nothing learns behind the body, and a mean over rows of equal length is the same arithmetic."""
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        assert worst_difference(step(model, batch())[2], pipelined(model, batch())[1]) < 1e-6
        first = pipelined(model, batch())
        assert same_bits(first[1], pipelined(model, batch())[1])


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("call", range(16))
def test_whatever_dies_changes_no_bit(bloom: Path, call: int, phase: str) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        quiet = pipelined(prepared(bloom, swarm), batch())
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, faults=Faults(**{phase: {call}})) as swarm:
        found = pipelined(prepared(bloom, swarm), batch())
        assert same_bits(quiet[1], found[1])
        assert quiet[0] == found[0]
        assert swarm.traffic().retries >= 1


def test_backwards_begin_before_the_last_forward(bloom: Path) -> None:
    faults = Faults()
    with loopback(bloom, ["0:4"], micro_batch_tokens=10, max_in_flight=2, faults=faults) as swarm:
        pipelined(prepared(bloom, swarm), batch(rows=6))
    kinds = [kind for kind, _ in faults.log]
    assert kinds.index("kept_backward") < len(kinds) - 1 - kinds[::-1].index("forward")
    assert kinds.count("forward") == kinds.count("kept_backward") == 6


def test_graphs_on_servers_are_bounded_by_what_is_in_flight(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    with loopback(bloom, ["0:4"], micro_batch_tokens=10, max_in_flight=2) as swarm:
        graphs = next(iter(swarm._transport.handlers.values())).graphs  # type: ignore[attr-defined]
        keep = graphs.keep
        monkeypatch.setattr(graphs, "keep", lambda *given: (keep(*given), most.append(len(graphs)))[0])
        pipelined(prepared(bloom, swarm), batch(rows=8))
        assert max(most) == 2
        assert len(graphs) == 0


@pytest.mark.parametrize(("calls_of_bytes", "at_once"), [(0, 1), (2, 2), (2.9, 2), (100, 4)])
def test_bytes_in_flight_are_bounded_and_one_micro_batch_always_goes(bloom: Path, calls_of_bytes: float, at_once: int) -> None:
    under_way, counts = 0, []
    there_and_back = 2 * 10 * 48 * 4
    with loopback(bloom, ["0:4"], micro_batch_tokens=10, in_flight_bytes=int(calls_of_bytes * there_and_back)) as swarm:
        model, call = prepared(bloom, swarm), swarm._transport.call

        async def counted(*arguments: Any) -> Any:
            nonlocal under_way
            under_way += 1
            counts.append(under_way)
            try:
                return await call(*arguments)
            finally:
                under_way -= 1

        swarm._transport.call = counted  # type: ignore[method-assign]
        model(**batch(rows=8)).loss.backward()
    assert max(counts) == at_once


def test_a_factor_that_was_not_foreseen_is_multiplied_in(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        plain = pipelined(model, batch())[1]
        quarter = pipelined(model, batch(), scale=0.25, factor=0.25)[1]
        assert same_bits(plain, {name: 4 * grad for name, grad in quarter.items()})
        half = pipelined(model, batch(), scale=2.0, factor=0.5)[1]
        assert same_bits(plain, {name: 2 * grad for name, grad in half.items()})
        third = pipelined(model, batch(), scale=1.0, factor=1 / 3)[1]
        assert all(torch.equal(third[name], grad * torch.tensor(1 / 3)) for name, grad in plain.items())


def test_what_learns_before_and_behind_the_body_learns(bloom: Path) -> None:
    local = local_peft(bloom, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with loopback(bloom, micro_batch_tokens=13) as swarm:
        model = remote(bloom, swarm, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        mine, theirs = next(iter(model.adapter.parameters())), next(p for p in local.parameters() if p.requires_grad)
        with torch.no_grad():
            theirs.copy_(mine)
        loss = Pipelined(model)(uneven())
        assert loss is not None
        loss.backward()
        local(**uneven()).loss.backward()
        assert (mine.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()  # type: ignore[operator]


def test_a_head_learns_the_sum_over_micro_batches(bloom: Path) -> None:
    adapter = LoraConfig(r=2, target_modules=["query_key_value"], modules_to_save=["ln_f"], task_type="CAUSAL_LM")
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm, adapter)
        expected = step(model, uneven())[2]
        found = pipelined(model, uneven())[1]
        assert found.keys() == expected.keys()
        assert any("ln_f" in name for name in found)
        assert worst_difference(expected, found) < 1e-6


def test_dropout_is_the_same_as_without(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm, lora("bloom", lora_dropout=0.5)).train()
        torch.manual_seed(4)
        model.zero_grad()
        model(**batch()).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.adapter.named_parameters()}
        after = torch.rand(3)
        torch.manual_seed(4)
        found = pipelined(model, batch())[1]
        assert worst_difference(expected, found) < 1e-6
        assert torch.equal(after, torch.rand(3))


def test_dropout_behind_the_body_is_left_to_the_model_and_told(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It draws for each micro-batch, so a loss in parts would be another one."""
    adapter = LoraConfig(r=2, target_modules=["query_key_value", "lm_head"], lora_dropout=0.5, task_type="CAUSAL_LM")
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm, adapter).train()
        run = Pipelined(model)
        before = torch.get_rng_state()
        assert run(batch()) is None
        assert "draws random numbers behind its body" in caplog.text
        assert torch.equal(before, torch.get_rng_state())
        calls = swarm.traffic().calls
        assert run(batch()) is None
        assert swarm.traffic().calls == calls
        assert Pipelined(model.eval())(batch()) is not None


def test_what_draws_before_the_body_does_not_count(bloom: Path) -> None:
    """The library's model is run whole for each micro-batch, so its prompt encoder draws again, for nothing."""
    encoder = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8, encoder_num_layers=2,
        encoder_dropout=0.5,
    )  # fmt: skip
    with loopback(bloom, micro_batch_tokens=13) as swarm:
        model = remote(bloom, swarm, encoder).train()
        torch.manual_seed(4)
        model.zero_grad()
        model(**batch()).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.adapter.named_parameters() if parameter.grad is not None}
        after = torch.rand(3)
        torch.manual_seed(4)
        found = pipelined(model, batch())[1]
        assert torch.equal(after, torch.rand(3))
        assert worst_difference(expected, found) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda swarm, model, given: given.update(labels=torch.full_like(given["labels"], -100)),
        lambda swarm, model, given: given.pop("labels"),
        lambda swarm, model, given: given.update(position_ids=torch.arange(10)[None]),
        lambda swarm, model, given: [parameter.requires_grad_(False) for parameter in model.adapter.parameters()],
        lambda swarm, model, given: setattr(model.body._chain, "settings", dataclasses.replace(swarm.settings, micro_batch_tokens=40)),
        lambda swarm, model, given: setattr(model.body._chain, "settings", dataclasses.replace(swarm.settings, pipeline=Pipeline.GPIPE)),
    ],
    ids=["nothing asked", "no labels", "shared rows", "nothing learns", "one micro-batch", "gpipe"],
)
def test_what_cannot_be_cut_is_left_to_the_model(bloom: Path, change: Any) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model, given = prepared(bloom, swarm, lora("bloom", lora_dropout=0.5)).train(), batch()
        change(swarm, model, given)
        before = torch.get_rng_state()
        assert Pipelined(model)(given) is None
        assert torch.equal(before, torch.get_rng_state())


def test_a_tuner_with_a_loss_of_its_own_is_left_to_the_model(bloom: Path) -> None:
    config = AdaLoraConfig(target_modules=["query_key_value"], task_type="CAUSAL_LM", total_step=10, init_r=4, target_r=2)
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        assert Pipelined(remote(bloom, swarm, config))(batch()) is None


def test_a_model_whose_loss_is_no_sum_is_found_out_and_told(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        mean = model.loss_function
        model.loss_function = lambda *args, num_items_in_batch=None, **kwargs: mean(*args, **kwargs)
        model.body.attached = attached_to(model)  # as if the library had made it so
        given = batch(rows=5, padding="left")
        run = Pipelined(model)
        assert run(given) is None
        assert "is not the sum of its parts" in caplog.text
        calls = swarm.traffic().calls
        assert run(given) is None
        assert swarm.traffic().calls == calls
        assert all(parameter.grad is None for parameter in model.adapter.parameters())


def test_what_is_added_to_a_loss_is_not_counted_for_each_micro_batch(bloom: Path) -> None:
    """It may be nothing at first, as a norm of fresh LoRA is."""
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        assert Pipelined(model)(batch()) is not None
        model.register_forward_hook(lambda module, args, output: output)
        assert Pipelined(model)(batch()) is None
        inner = prepared(bloom, swarm)
        run = Pipelined(inner)
        assert run(batch()) is not None
        inner.lm_head.register_forward_hook(lambda module, args, output: output - output.mean(0, keepdim=True))
        assert run(batch()) is None
        other = prepared(bloom, swarm)
        other.loss_function = lambda *args, **kwargs: torch.zeros(())
        assert Pipelined(other)(batch()) is None
        wrapped = prepared(bloom, swarm)
        forward = wrapped.forward
        wrapped.forward = lambda **given: forward(**given)
        assert Pipelined(wrapped)(batch()) is None


def test_a_gradient_hook_is_not_called_twice(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        next(iter(model.adapter.parameters())).register_hook(lambda grad: grad * 0.5)
        assert Pipelined(model)(batch()) is None


def test_a_loss_that_ceases_to_be_a_sum_is_an_error(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        run = Pipelined(prepared(bloom, swarm))
        assert run(batch()) is not None
        monkeypatch.setattr("swarmtune.remote.pipeline._Step.loss_of_all", lambda self: 1e3)
        with pytest.raises(UsageError, match="though it was before"):
            run(batch())
        with pytest.raises(UsageError, match="though it was before"):
            run(batch())


@pytest.mark.parametrize("call", range(4, 16))
def test_a_failure_while_the_head_computes_is_the_error_that_is_raised(bloom: Path, call: int) -> None:
    with loopback(bloom, micro_batch_tokens=10, patience_s=0.2, faults=Faults(before={call})) as swarm:
        model = prepared(bloom, swarm)
        model.lm_head.register_forward_hook(lambda *_: time.sleep(0.3))
        model.body.attached = attached_to(model)  # as if the library had made it so
        with pytest.raises(SwarmError):
            Pipelined(model)(batch())


def test_a_step_that_fails_touches_no_gradient_and_frees_what_was_left(bloom: Path, tmp_path: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10, patience_s=0.5, faults=Faults(before={11})) as swarm:
        swarm._ledger = Ledger(History(tmp_path / "history.jsonl"))
        model = prepared(bloom, swarm)
        with pytest.raises(SwarmError):
            Pipelined(model)(batch())
        assert all(parameter.grad is None for parameter in model.adapter.parameters())
        assert any(model.body._chain.caller._released.values()), "what is left behind on servers is given back with the next forward"
        swarm._ledger.close()
    found = judge(tmp_path / "history.jsonl")
    assert found.clean, found
    assert (found.given_up, found.passes) == (2, 0)


def test_a_loss_that_is_not_finite_ends_the_pipeline_and_is_left_to_the_model(bloom: Path) -> None:
    faults = Faults()
    with loopback(bloom, micro_batch_tokens=10, faults=faults) as swarm:
        model = prepared(bloom, swarm)
        with torch.no_grad():
            model.transformer.ln_f.bias[0] = float("nan")
        assert Pipelined(model)(batch()) is None
    assert {kind for kind, _ in faults.log} == {"forward"}


def test_a_bad_number_in_a_block_is_named(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        with torch.no_grad():
            next(iter(model.adapter.parameters()))[0, 0] = float("nan")
        with pytest.raises(NonFinite):
            Pipelined(model)(batch())


def test_the_ledger_sees_both_passes_of_a_step(bloom: Path, tmp_path: Path) -> None:
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, faults=Faults(after={5, 9})) as swarm:
        swarm._ledger = Ledger(History(tmp_path / "history.jsonl"))
        pipelined(prepared(bloom, swarm), batch())
        swarm._ledger.close()
    found = judge(tmp_path / "history.jsonl")
    assert found.clean, found
    assert found.passes == 2
    assert found.failed >= 2


def test_a_server_that_never_sums_gives_the_same(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=10) as swarm:
        model = prepared(bloom, swarm)
        summed = pipelined(model, batch())[1]
        size = sum(parameter.nbytes for parameter in model.adapter.parameters())
        assert swarm.traffic().payload["down kwarg gradients"] == size
        for handler in swarm._transport.handlers.values():  # type: ignore[attr-defined]
            assert isinstance(handler, CallHandler)
            handler._span.sums.budget_bytes = -1
        assert same_bits(summed, pipelined(model, batch())[1])


def test_settings_are_checked() -> None:
    peer = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    with pytest.raises(swarmtune.errors.UsageError, match="pipeline must be one of 1f1b, gpipe, got 'zigzag'"):
        swarmtune.connect([peer], pipeline="zigzag")
    with pytest.raises(swarmtune.errors.UsageError, match="in_flight_gib must be a number above 0"):
        swarmtune.connect([peer], in_flight_gib=0)
    with pytest.raises(swarmtune.errors.UsageError, match="in_flight_gib must be a number above 0"):
        swarmtune.connect([peer], in_flight_gib=True)
    with pytest.raises(swarmtune.errors.UsageError, match="chaining must be True or False, got 'false'"):
        swarmtune.connect([peer], chaining="false")  # type: ignore[arg-type]
    with pytest.raises(swarmtune.errors.UsageError, match="copies must be one of none, auto, all, got 'some'"):
        swarmtune.connect([peer], copies="some")
    with pytest.raises(swarmtune.errors.UsageError, match=r"copies='all' asks for .* with chaining=False"):
        swarmtune.connect([peer], copies="all", chaining=False)


# --- lanes: replicas share the micro-batches ----------------------------------------------------------------------------------


def used(swarm: Swarm) -> int:
    return sum(handler.calls > 0 for handler in swarm._transport.handlers.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes_go_over_replicas_and_the_sum_is_a_function_of_their_number(bloom: Path, lanes: int) -> None:
    size = 0
    with loopback(bloom, ["0:4"], micro_batch_tokens=10, lanes=lanes) as swarm:  # one server for all lanes
        model = prepared(bloom, swarm)
        size = sum(parameter.nbytes for parameter in model.adapter.parameters())
        alone = pipelined(model, batch(rows=6))[1]
        all_then_all = step(model, batch(rows=6))[2]
    with loopback(bloom, ["0:4"] * lanes, micro_batch_tokens=10, lanes=lanes) as swarm:
        model = prepared(bloom, swarm)
        assert same_bits(alone, pipelined(model, batch(rows=6))[1])
        assert used(swarm) == lanes
        assert swarm.traffic().payload["down kwarg gradients"] == lanes * size
        assert same_bits(all_then_all, step(model, batch(rows=6))[2])
        assert swarm.traffic().retries == 0


@pytest.mark.parametrize(
    ("spans", "passes", "rows", "resting", "told"),
    [
        (["0:2", "2:4"], [[0, 0], [0, 0], [0, 0]], 4, False, 1),
        (REPLICAS, [[0, 1], [0, 1]], 4, False, 0),
        (REPLICAS, [[0, 0], [0, 0]], 4, False, 1),  # the others are too slow
        (REPLICAS, [[0, 0], [0, 1], [0, 0]], 4, False, 0),  # nothing was known before the first pass
        (REPLICAS, [[0, 0], [0, 0]], 4, True, 0),  # one rests, for a moment
        (REPLICAS, [[0, 1, 0], [0, 1, 0]], 4, False, 0),
        (REPLICAS, [[0, 0, 1], [0, 0, 1]], 2, False, 0),  # two micro-batches
    ],
)
@pytest.mark.parametrize("take", [pipelined, step])
def test_lanes_that_have_nowhere_to_go_are_told_once(
    bloom: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    spans: list[str],
    passes: list[list[int]],
    rows: int,
    resting: bool,
    told: int,
    take: Callable[..., Any],
) -> None:
    route, turn = Directory.route, 0

    def chosen(directory: Directory, start: int, stop: int, tokens: int = 0, lane: int = 0) -> list[Hop]:
        if resting:
            directory.known["peer3"].busy_until = math.inf
        hops = route(directory, start, stop, tokens)
        return [dataclasses.replace(hop, peer=f"peer{hop.span.start // 2 + 2 * passes[turn][lane]}") for hop in hops]

    monkeypatch.setattr(Directory, "route", chosen)
    lanes = len(passes[0])
    with caplog.at_level(logging.WARNING, "swarmtune"), loopback(bloom, spans, micro_batch_tokens=10, lanes=lanes) as swarm:
        model = prepared(bloom, swarm)
        for turn in range(len(passes)):  # noqa: B007  # read by ``chosen``
            take(model, batch(rows=rows))
    assert caplog.text.count(f"swarm.lanes={lanes} changes nothing") == told


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("call", range(0, 16, 3))
def test_a_lane_whose_server_dies_goes_on_elsewhere_with_the_same_bits(bloom: Path, call: int, phase: str) -> None:
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, lanes=2) as swarm:
        quiet = pipelined(prepared(bloom, swarm), batch())[1]
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, lanes=2, faults=Faults(**{phase: {call}})) as swarm:
        assert same_bits(quiet, pipelined(prepared(bloom, swarm), batch())[1])
        assert swarm.traffic().retries >= 1


def test_lanes_that_take_turns_are_no_moves(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Directory, "times_slower", lambda *_: 2.0)
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, lanes=2) as swarm:
        pipelined(prepared(bloom, swarm), batch(rows=6))
        assert used(swarm) == 4
        assert swarm.traffic().events[EventKind.MOVED].count == 0


def test_a_lane_keeps_to_its_servers_through_a_pass(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are made where all its micro-batches are."""
    turns, route = itertools.count(), Directory.route

    def another_each_time(directory: Directory, *given: Any) -> list[Hop]:
        turn = next(turns) % 2
        return [dataclasses.replace(hop, peer=f"peer{hop.span.start // 2 + 2 * turn}") for hop in route(directory, *given)]

    monkeypatch.setattr(Directory, "route", another_each_time)
    with loopback(bloom, REPLICAS, micro_batch_tokens=10, max_in_flight=1) as swarm:
        model = prepared(bloom, swarm)
        pipelined(model, batch())
        assert swarm.traffic().payload["down kwarg gradients"] == sum(parameter.nbytes for parameter in model.adapter.parameters())
        assert used(swarm) == 2


def test_more_lanes_than_micro_batches_or_servers_are_no_harm(bloom: Path) -> None:
    with loopback(bloom, micro_batch_tokens=20, lanes=8) as swarm:
        model = prepared(bloom, swarm)
        assert worst_difference(step(model, batch())[2], pipelined(model, batch())[1]) < 1e-6
