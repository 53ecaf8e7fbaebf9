"""Weights & Biases offline and TensorBoard, read back from the files that they write."""

import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarmtune import app
from swarmtune.errors import SwarmError, UsageError
from swarmtune.resume import plan_run
from swarmtune.train.loggers import has_login
from swarmtune.train.module import CausalLMModule
from tests.unit.stand_in import run_short

pytestmark = pytest.mark.usefixtures("one_thread", "swarm")


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a W&B file: seven bytes of its own, then LevelDB's log format, in blocks of 32 KiB."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def records(run_dir: Path) -> list[dict]:
    """Every record of the offline W&B runs of a directory, oldest first, as plain values; W&B's own process may still be writing them."""
    from google.protobuf.message import DecodeError

    ends_at = time.monotonic() + 20
    while True:
        try:
            found = read_records(run_dir)
            if sum("exit" in record for record in found) == len(list((run_dir / "wandb").glob("offline-run-*"))):
                return found
        except DecodeError:
            pass
        assert time.monotonic() < ends_at, "the W&B run was not finished"
        time.sleep(0.2)


def read_records(run_dir: Path) -> list[dict]:
    from google.protobuf.json_format import MessageToDict
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for data in log_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(MessageToDict(record))
    return found


def logged(found: list[dict]) -> dict[str, list]:
    metrics: dict[str, list] = {}
    for record in found:
        for item in record.get("history", {}).get("item", []):
            name = item.get("key") or ".".join(item.get("nestedKey", []))
            metrics.setdefault(name, []).append(json.loads(item["valueJson"]))
    return metrics


def test_wandb_without_a_login_keeps_everything_offline(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_short(tiny_model, tmp_path / "first try", "logger=wandb", "logger.tags=[mine]", "logger.project=notes")
    assert "no login here, so the run is kept offline" in capsys.readouterr().out
    found = records(tmp_path / "first try")
    run = next(record["run"] for record in found if "run" in record)
    assert (run["project"], run["runGroup"], run["displayName"]) == ("notes", "lora_bloom", f"lora_bloom-{tiny_model.name}-first try")
    assert set(run["tags"]) == {"lora_bloom", tiny_model.name, "lora", "mine"}
    config = {item["key"]: json.loads(item["valueJson"]) for item in run["config"]["update"]}
    assert (config["optimizer"]["lr"], config["seed"], config["adapter"]["peft_type"]) == (5e-3, 0, "LORA")
    metrics = logged(found)
    assert metrics.keys() >= {"train_loss", "val_loss", "val_ppl", "lr", "tokens_per_s", "time/swarm_s", "bytes_up", "retries", "loss_curve.path"}
    assert metrics["val_loss"][-1] == pytest.approx(summary["val_loss_after"])
    written = {item["key"] for record in found for item in record.get("summary", {}).get("update", []) if "key" in item}
    assert written >= {"val_loss_after", "adapter_dir"}


def test_a_resumed_run_is_the_same_wandb_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = CausalLMModule.training_step

    def broken(self: CausalLMModule, batch: dict, batch_idx: int) -> object:
        if self.global_step == 3:
            raise SwarmError("nobody answers")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLMModule, "training_step", broken)
        with pytest.raises(SwarmError):
            run_short(tiny_model, tmp_path / "run", "logger=wandb")
    plan = plan_run([f"resume={tmp_path / 'run'}"])
    app.train(plan.config, resume=plan.run_dir)
    ids = [record["run"]["runId"] for record in records(tmp_path / "run") if "run" in record]
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert len(set(ids)) == 1


def test_a_login_is_found_in_the_environment_or_the_netrc_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_login("https://wandb.example")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine wandb.example login user password 0123456789\n")
    assert has_login("https://wandb.example")
    assert not has_login("https://other.example")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_login("https://other.example")


def test_tensorboard_gets_every_metric(tiny_model: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = run_short(tiny_model, tmp_path / "run", "logger=tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= {"train_loss", "val_loss", "val_ppl", "lr", "tokens_per_s", "time/swarm_s", "retries"}
    assert events.Scalars("val_loss")[-1].value == pytest.approx(summary["val_loss_after"])


def test_a_logger_that_is_not_installed_is_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find(name, *more))
    with pytest.raises(UsageError, match=r"pip install swarmtune\[tensorboard\]"):
        run_short(tiny_model, tmp_path / "run", "logger=tensorboard")
