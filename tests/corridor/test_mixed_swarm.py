"""Swarms that do not fit together: refused where they must be, used where they can be, and said so in one sentence."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from servers.handler import CallHandler
from swarmtune.errors import BlocksUnserved, SwarmMismatch
from swarmtune.swarm import Swarm
from tests.harness import batch, loopback, lora, make_handler, remote, save_tiny, step


def in_class(handler: CallHandler, numeric_class: str, **facts: str) -> CallHandler:
    handler._info = replace(handler._info, numeric_class=numeric_class, numeric={"dtype": "float32", **facts})
    return handler


def test_gap_beside_servers_of_another_model_names_both(bloom: Path, models: dict[str, Path]) -> None:
    handlers = {"a": make_handler(bloom, "0:2"), "b": make_handler(models["llama"], "2:4")}
    with loopback(bloom, handlers=handlers, patience_s=0.5) as swarm:
        with pytest.raises(BlocksUnserved) as caught:
            remote(bloom, swarm)
    other = handlers["b"].info.model
    assert "nobody serves blocks 2:4 of 0:4; served: 0:2 by server of 0:2 (the swarm holds other models: " in str(caught.value)
    assert f"model {other} with 4 blocks by server of 2:4 (b); this model is {handlers['a'].info.model} with 4 blocks)" in str(caught.value)
    assert "swarmtune doctor --peer ADDRESS lists who serves what" in str(caught.value)


def test_other_weights_under_one_configuration_name_both_groups_and_their_blocks(bloom: Path, tmp_path: Path) -> None:
    other = save_tiny("bloom", tmp_path / "other", seed=1)
    handlers = {"a": make_handler(bloom, "0:4"), "b": make_handler(other, "1:3"), "c": make_handler(bloom, "0:2")}
    with loopback(bloom, handlers=handlers) as swarm:
        with pytest.raises(SwarmMismatch) as caught:
            remote(bloom, swarm)
    assert "blocks 1:2: server of 0:4 (a), server of 0:2 (c) against server of 1:3 (b)" in str(caught.value)
    assert "blocks 2:3: server of 0:4 (a) against server of 1:3 (b)" in str(caught.value)
    assert "swarmtune doctor --peer ADDRESS" in str(caught.value)


@pytest.mark.parametrize("altered", ["0:2", "2:4"])
def test_a_half_from_another_checkpoint_than_the_clients_is_refused(bloom: Path, tmp_path: Path, altered: str) -> None:
    other = save_tiny("bloom", tmp_path / "other", seed=1)
    handlers = {f"p{span}": make_handler(other if span == altered else bloom, span) for span in ("0:2", "2:4")}
    with loopback(bloom, handlers=handlers) as swarm:
        with pytest.raises(SwarmMismatch) as caught:
            remote(bloom, swarm)
    sentence = str(caught.value)
    assert f"the weights of block {altered[0]} on server of {altered} (p{altered}) are not those of {bloom} " in sentence
    assert "give the checkpoint that the servers hold, or start them with this one" in sentence


def test_one_altered_block_within_the_budget_is_found(bloom: Path, tmp_path: Path) -> None:
    other = make_handler(save_tiny("bloom", tmp_path / "other", seed=1), "3:4")
    handlers = {"a": make_handler(bloom, "0:4")}
    digests = (*handlers["a"].info.block_digests[:3], *other.info.block_digests)
    handlers["a"]._info = replace(handlers["a"].info, block_digests=digests)
    with loopback(bloom, handlers=handlers) as swarm, pytest.raises(SwarmMismatch, match="the weights of block 3 on"):
        remote(bloom, swarm)


def test_one_block_of_every_span_is_compared_beyond_the_budget(
    bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("swarmtune.own_weights.READ_BYTES", 0)
    with caplog.at_level(logging.INFO, "swarmtune"), loopback(bloom) as swarm:
        remote(bloom, swarm)
        other = save_tiny("bloom", tmp_path / "other", seed=1)
        with pytest.raises(SwarmMismatch):
            remote(other, swarm)
    assert "2 of 4 blocks on the servers were compared with" in caplog.text


def test_a_client_without_the_body_on_its_disk_goes_on(bloom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ends = tmp_path / "ends"
    shutil.copytree(bloom, ends)
    shards = json.loads((bloom / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {shard for name, shard in shards.items() if ".h." not in name}
    for shard in set(shards.values()) - kept:
        (ends / shard).unlink()
    with caplog.at_level(logging.INFO, "swarmtune"), loopback(bloom) as swarm:
        assert torch.isfinite(remote(ends, swarm)(**batch()).loss)
    assert "are not on this disk or too much to read" in caplog.text


def test_two_numeric_classes_go_on_with_one_warning_that_names_what_differs(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    handlers = {
        "a": in_class(make_handler(bloom, "0:2"), "one", threads="1", torch="2.13.0"),
        "b": in_class(make_handler(bloom, "2:4"), "two", threads="2", torch="2.13.0"),
    }
    with caplog.at_level(logging.WARNING, "swarmtune"), loopback(bloom, handlers=handlers) as swarm:
        model = remote(bloom, swarm, lora("bloom"))
        (opened,) = swarm._models.values()
        swarm.loop.run(opened.directory.refresh())
        assert torch.isfinite(step(model, batch())[1])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "compute in 2 numeric classes (threads is 1 on server of 0:2 (a), 2 on server of 2:4 (b)): the run goes on" in said
    assert "last digits" in said
    assert "torch" not in said


def test_one_numeric_class_is_no_warning(bloom: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "swarmtune"), loopback(bloom) as swarm:
        step(remote(bloom, swarm, lora("bloom")), batch())
    assert not caplog.records


def test_servers_of_two_dtypes_on_the_route_are_refused_by_name(bloom: Path) -> None:
    handlers = {"a": make_handler(bloom, "0:2"), "b": make_handler(bloom, "2:4", torch.bfloat16)}
    with loopback(bloom, handlers=handlers, patience_s=0.7) as swarm:
        with pytest.raises(SwarmMismatch, match=r"server of 0:2 \(a\) in float32; server of 2:4 \(b\) in bfloat16"):
            remote(bloom, swarm)


def test_a_route_of_one_mode_and_two_classes_is_taken_before_one_of_two_modes(bloom: Path) -> None:
    handlers = {
        "b": in_class(make_handler(bloom, "0:1"), "one", threads="1"),
        "c": in_class(make_handler(bloom, "1:3"), "one", threads="1"),
        "d": in_class(make_handler(bloom, "2:4"), "two", threads="2"),
        "a": make_handler(bloom, "0:3", torch.bfloat16),
    }
    with loopback(bloom, handlers=handlers, patience_s=0.7) as swarm:
        remote(bloom, swarm)
        assert swarm.fingerprint()["mode"] == ["float32"]


def test_a_first_route_of_two_modes_is_waited_out(bloom: Path) -> None:
    """A client that hears of the servers one after the other has not seen the whole swarm yet."""
    handlers = {"a": make_handler(bloom, "0:2"), "b": make_handler(bloom, "2:4", torch.bfloat16)}
    with loopback(bloom, handlers=handlers, patience_s=30.0) as swarm:
        late = make_handler(bloom, "2:4")
        swarm.loop.run(_later(swarm, "c", late))
        assert torch.isfinite(remote(bloom, swarm)(**batch()).loss)
        assert swarm.fingerprint()["mode"] == ["float32"]


async def _later(swarm: Swarm, name: str, handler: CallHandler) -> None:
    asyncio.get_running_loop().call_later(0.5, swarm._transport.handlers.__setitem__, name, handler)  # type: ignore[attr-defined]


def test_the_mode_of_a_quantised_swarm_is_in_the_fingerprint(bloom: Path) -> None:
    with loopback(bloom, quantise="int8") as swarm:
        remote(bloom, swarm)
        assert swarm.fingerprint()["mode"] == ["float32 over int8 weights"]


def test_a_server_with_other_weights_that_stays_is_told_of_once_and_named_in_the_error(
    bloom: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_handler(save_tiny("bloom", tmp_path / "other", seed=1), "0:4")
    with caplog.at_level(logging.WARNING, "swarmtune"), loopback(bloom, patience_s=0.5) as swarm:
        model = remote(bloom, swarm)
        swarm._transport.handlers["x"] = other  # type: ignore[attr-defined]
        (opened,) = swarm._models.values()
        for _ in range(3):
            swarm.loop.run(opened.directory.refresh())
        left_out = [record for record in caplog.records if "leaving it out" in record.getMessage()]
        swarm.loop.run(swarm._transport.kill("peer0"))  # type: ignore[attr-defined]
        with pytest.raises(BlocksUnserved, match=r"left out for other weights: server of 0:4 \(x\)"):
            model(**batch())
    assert len(left_out) == 1
