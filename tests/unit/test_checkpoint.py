"""Checkpoints: whole or absent, the newest whole one is taken, and a full disk costs one checkpoint only."""

import json
import logging
import os
import random
from pathlib import Path

import numpy
import pytest
import torch

from swarmtune.errors import UsageError
from swarmtune.train.callbacks import Meter
from swarmtune.train.checkpoint import AdapterCheckpoint, check_facts, restore_rng, rng_state
from swarmtune.train.saved_state import ESSENTIAL, file_digest, find_damage, newest_checkpoint
from tests.unit.stand_in import Traffic, module_and_data, quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def train(tiny_model: Path, folder: Path, steps: int, every: int, keep: int = -1) -> AdapterCheckpoint:
    module, data = module_and_data(tiny_model)
    checkpoint = AdapterCheckpoint(folder / "checkpoints", every, keep)
    quiet_trainer(folder, max_steps=steps, limit_val_batches=0, enable_checkpointing=True, callbacks=[Meter(Traffic, 0.0), checkpoint]).fit(
        module, datamodule=data
    )
    return checkpoint


@pytest.mark.parametrize("file", ["state.ckpt", "adapter/adapter_model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    tiny_model: Path, tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny_model, tmp_path, steps=4, every=2)
    target = tmp_path / "checkpoints" / "step=4" / file
    data = bytearray(target.read_bytes())
    if damage == "gone":
        target.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        target.write_bytes(data if damage == "flip" else data[:-1] if file == "manifest.json" else data[: len(data) // 2])
    if (file, damage) == ("manifest.json", "cut"):
        target.write_bytes(data[: len(data) // 2])
    found = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert "step=4 is damaged" in caplog.text


@pytest.mark.parametrize("left_out", ESSENTIAL)
def test_a_manifest_that_leaves_out_what_every_checkpoint_has_is_damage(left_out: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in ESSENTIAL:
        (tmp_path / name).write_text(name)
    files = {name: file_digest(tmp_path / name) for name in ESSENTIAL}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert find_damage(tmp_path) is None
    del files[left_out]
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert find_damage(tmp_path) == f"its manifest.json does not list {left_out}"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_later_damaged_checkpoints_do_not_push_whole_ones_out(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, steps=4, every=2)
    stale = tmp_path / "checkpoints" / "step=90"
    stale.mkdir()
    train(tiny_model, tmp_path, steps=6, every=2, keep=2)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"step=4", "step=6"}


def test_a_full_disk_costs_a_checkpoint_and_neither_the_older_one_nor_the_run(
    tiny_model: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, data = module_and_data(tiny_model)
    checkpoint = AdapterCheckpoint(small_disk / "checkpoints", 2)
    trainer = quiet_trainer(small_disk, max_steps=2, limit_val_batches=0, enable_checkpointing=True, callbacks=[Meter(Traffic, 0.0), checkpoint])
    trainer.fit(module, datamodule=data)
    (small_disk / "filler").write_bytes(bytes(max(0, os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 8192)))
    module, data = module_and_data(tiny_model)
    trainer = quiet_trainer(
        small_disk,
        max_steps=4,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[Meter(Traffic, 0.0), AdapterCheckpoint(small_disk / "checkpoints", 4)],
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    assert "the checkpoint of step 4 could not be written" in caplog.text
    assert [folder.name for folder in (small_disk / "checkpoints").iterdir()] == ["step=2"]
    assert find_damage(small_disk / "checkpoints" / "step=2") is None


def test_random_generators_go_on_where_they_were() -> None:
    random.random(), numpy.random.normal(), torch.rand(3)
    state = rng_state()
    first = (random.random(), random.gauss(0, 1), numpy.random.normal(size=3).tolist(), torch.randn(3).tolist())
    restore_rng(state)
    assert (random.random(), random.gauss(0, 1), numpy.random.normal(size=3).tolist(), torch.randn(3).tolist()) == first


def test_other_data_or_weights_are_refused_and_another_numeric_class_is_said(caplog: pytest.LogCaptureFixture) -> None:
    saved = {"data": "a", "weights": ["w"], "numeric": ["n"], "mode": ["float32"]}
    check_facts(saved, saved)
    assert not caplog.records
    for key, noun in (("data", "training data"), ("weights", "servers' weights"), ("mode", "precision of the servers")):
        with pytest.raises(UsageError, match=noun):
            check_facts(saved, saved | {key: "other"})
    check_facts(saved, saved | {"numeric": ["m"]})
    assert "numeric class" in caplog.text
