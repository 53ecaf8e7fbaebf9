"""Servers that die at every point of a step: the gradients are those of the quiet run, to the bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from swarmtune.errors import BlocksUnserved, NonFinite, SwarmError, SwarmMismatch
from swarmtune.remote import route
from tests.harness import Faults, batch, loopback, lora, make_handler, remote, same_bits, save_tiny, set_values, step

REPLICAS = ["0:2", "2:4", "0:2", "2:4"]
CALLS = 4
"""Two forwards and two backwards make a step over two spans."""


def run_step(path: Path, spans: list[str], faults: Faults, **settings: object) -> tuple[dict[str, torch.Tensor], int]:
    with loopback(path, spans, faults=faults, chaining=False, **settings) as swarm:  # chains have tests of their own
        model = remote(path, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        return step(model, batch())[2], swarm.traffic().retries


@pytest.fixture(scope="module")
def quiet(bloom: Path) -> dict[str, torch.Tensor]:
    return run_step(bloom, REPLICAS, Faults())[0]


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("call", range(CALLS))
def test_gradients_are_bitwise_quiet_after_the_server_of_any_call_dies(bloom: Path, quiet: dict[str, torch.Tensor], call: int, phase: str) -> None:
    faults = Faults(**{phase: {call}})
    grads, retries = run_step(bloom, REPLICAS, faults)
    assert [kind.endswith("backward") for kind, _ in faults.log].count(True) >= 2
    assert retries == 1
    assert same_bits(quiet, grads)


@pytest.mark.parametrize("first", range(CALLS))
def test_gradients_are_bitwise_quiet_after_two_deaths(bloom: Path, quiet: dict[str, torch.Tensor], first: int) -> None:
    """Three replicas of each span; the server that takes over dies as well."""
    grads, retries = run_step(bloom, [*REPLICAS, "0:2", "2:4"], Faults(before={first}, after={first + 1}))
    assert retries == 2
    assert same_bits(quiet, grads)


@pytest.mark.parametrize(("spans", "call"), [(["0:2", "2:4", "0:4"], 1), (["0:4", "0:1", "1:3", "3:4"], 1), (["0:4", "0:3", "2:4"], 1)])
def test_backward_moves_to_servers_that_cut_the_blocks_elsewhere(bloom: Path, quiet: dict[str, torch.Tensor], spans: list[str], call: int) -> None:
    faults = Faults(before={call})
    grads, retries = run_step(bloom, spans, faults)
    assert retries >= 1
    assert same_bits(quiet, grads)


def test_failover_with_micro_batches_is_bitwise_quiet(bloom: Path) -> None:
    quiet, _ = run_step(bloom, REPLICAS, Faults(), micro_batch_tokens=10)
    for call in (0, 5, 9, 14):
        grads, retries = run_step(bloom, REPLICAS, Faults(after={call}), micro_batch_tokens=10)
        assert retries >= 1
        assert same_bits(quiet, grads)


def test_server_dead_between_forward_and_backward_is_replaced_with_the_same_kwargs(bloom: Path, quiet: dict[str, torch.Tensor]) -> None:
    with loopback(bloom, REPLICAS) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        loss = model(**batch()).loss
        for peer in ("peer0", "peer1"):
            swarm.loop.run(swarm._transport.kill(peer))  # type: ignore[attr-defined]
        loss.backward()
        assert same_bits(quiet, {name: parameter.grad for name, parameter in model.adapter.named_parameters()})


def test_call_raises_within_its_patience_when_all_servers_are_gone(bloom: Path) -> None:
    with loopback(bloom, patience_s=1.0) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        loss = model(**batch()).loss
        for peer in ("peer0", "peer1"):
            swarm.loop.run(swarm._transport.kill(peer))  # type: ignore[attr-defined]
        began = time.monotonic()
        with pytest.raises(BlocksUnserved, match=r"nobody serves blocks .*last failure: peer peer"):
            loss.backward()
        assert time.monotonic() - began < 5
        assert all(parameter.grad is None for parameter in model.adapter.parameters())


def test_gap_says_which_blocks_are_missing_and_who_serves_the_rest(bloom: Path) -> None:
    with loopback(bloom, ["0:1", "2:3"], patience_s=0.5) as swarm:
        with pytest.raises(
            BlocksUnserved, match=r"nobody serves blocks 1:2, 3:4 of 0:4; served: 0:1 by server of 0:1; 2:3 by server of 2:3"
        ) as caught:
            remote(bloom, swarm)
    assert [str(span) for span in caught.value.missing] == ["1:2", "3:4"]


def test_servers_of_another_model_are_named(bloom: Path, models: dict[str, Path]) -> None:
    with loopback(models["llama"], patience_s=0.5) as swarm:
        with pytest.raises(BlocksUnserved, match=r"the swarm holds other models: model \w+ with 4 blocks by server of 0:2 \(peer0\)"):
            remote(bloom, swarm)


def test_two_servers_with_different_weights_for_one_block_are_refused(bloom: Path, tmp_path: Path) -> None:
    other = save_tiny("bloom", tmp_path / "other", seed=1)
    handlers = {"a": make_handler(bloom, "0:4"), "b": make_handler(other, "0:2")}
    with loopback(bloom, handlers=handlers) as swarm:
        with pytest.raises(SwarmMismatch, match=r"different weights for blocks 0:2: server of 0:4 \(a\) against server of 0:2 \(b\): "):
            remote(bloom, swarm)


def test_non_finite_loss_names_the_first_bad_block(bloom: Path) -> None:
    handlers = {"a": make_handler(bloom, "0:2"), "b": make_handler(bloom, "2:4")}
    handlers["b"]._span.weights.blocks[3].mlp.dense_4h_to_h.weight[0, 0] = float("nan")  # type: ignore[union-attr, operator, index]
    with loopback(bloom, handlers=handlers) as swarm:
        with pytest.raises(NonFinite, match="output of block 3") as caught:
            remote(bloom, swarm)(**batch())
    assert caught.value.block == 3


def test_non_finite_input_is_not_blamed_on_a_block(bloom: Path) -> None:
    with loopback(bloom) as swarm:
        hidden = torch.randn(1, 3, 48)
        hidden[0, 1, 0] = float("inf")
        with pytest.raises(NonFinite, match="input of block 0"):
            remote(bloom, swarm).body(hidden)


def test_a_server_with_other_weights_that_joins_later_is_never_used(bloom: Path, tmp_path: Path, quiet: dict[str, torch.Tensor]) -> None:
    other = save_tiny("bloom", tmp_path / "other", seed=1)
    with loopback(bloom, ["0:2", "2:4"], patience_s=0.5) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        swarm._transport.handlers["aaa"] = make_handler(other, "0:4")  # type: ignore[attr-defined]
        (opened,) = swarm._models.values()
        swarm.loop.run(opened.directory.refresh())
        assert "aaa" not in opened.directory.known
        assert same_bits(quiet, step(model, batch())[2])
        swarm.loop.run(swarm._transport.kill("peer0"))  # type: ignore[attr-defined]
        with pytest.raises(BlocksUnserved, match="nobody serves blocks 0:2"):
            model(**batch())


def test_servers_that_describe_themselves_and_fail_every_call_end_in_an_error(bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "FIRST_BAN_S", 0.0)

    def fail(call: object, client: str) -> None:
        raise RuntimeError("the device is gone")

    handlers = {name: make_handler(bloom, "0:4") for name in ("a", "b")}
    for handler in handlers.values():
        monkeypatch.setattr(handler._span, "forward", fail)
    with loopback(bloom, handlers=handlers, patience_s=0.5) as swarm:
        began = time.monotonic()
        with pytest.raises(SwarmError, match=r"no server did the work within .* the device is gone"):
            remote(bloom, swarm)(**batch())
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("other", ["weights", "dtype"])
def test_a_server_that_comes_back_as_another_one_between_two_steps_is_not_used(bloom: Path, tmp_path: Path, other: str) -> None:
    """Nothing fails: the address is the same, the connection is simply new."""
    path = save_tiny("bloom", tmp_path / "other", seed=1) if other == "weights" else bloom
    with loopback(bloom, ["0:4"], patience_s=0.8) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        step(model, batch())
        transport = swarm._transport
        swarm.loop.run(transport.kill("peer0"))  # type: ignore[attr-defined]
        transport.handlers["peer0"] = make_handler(path, "0:4", torch.bfloat16 if other == "dtype" else torch.float32)  # type: ignore[attr-defined]
        with pytest.raises(BlocksUnserved, match="left out for other weights" if other == "weights" else "this run computes in float32; left out"):
            step(model, batch())


def test_a_server_that_comes_back_as_it_was_goes_on(bloom: Path, quiet: dict[str, torch.Tensor]) -> None:
    with loopback(bloom, ["0:4"]) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        set_values([dict(model.adapter.named_parameters())])
        step(model, batch())
        transport = swarm._transport
        swarm.loop.run(transport.kill("peer0"))  # type: ignore[attr-defined]
        transport.handlers["peer0"] = make_handler(bloom, "0:4")  # type: ignore[attr-defined]
        assert same_bits(quiet, step(model, batch())[2])
