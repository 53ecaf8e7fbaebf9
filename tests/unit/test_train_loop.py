"""The training half on a stand-in: a tiny local BLOOM with a PEFT LoRA in the place of the swarm."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from swarmtune import app
from swarmtune.config import load_config
from swarmtune.errors import NonFinite, UsageError
from swarmtune.train.callbacks import Meter
from swarmtune.train.codec_guard import CodecGuard
from swarmtune.train.metrics_file import read_curve
from swarmtune.train.module import CausalLMModule
from swarmtune.train.run_dir import new_run_dir
from tests.unit.stand_in import StandInSwarm, Traffic, module_and_data, quiet_trainer, run_short

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_steps_change_the_adapter_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    module, data = module_and_data(tiny_model, lr=1e-2, warmup_steps=0)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, datamodule=data)
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in module.learnable() if "lora_" in name}
    assert changed


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_checkpoint_holds_only_what_learns_and_resumes(tiny_model: Path, tmp_path: Path) -> None:
    module, data = module_and_data(tiny_model)
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    saved = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.learnable().keys()
    assert saved["hyper_parameters"] == {"lr": 1e-2}
    again, data = module_and_data(tiny_model)
    more = quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0)
    more.fit(again, datamodule=data, ckpt_path=tmp_path / "state.ckpt")
    assert more.global_step == 3


def test_validation_loss_is_the_mean_over_all_tokens(tiny_model: Path, tmp_path: Path) -> None:
    module, data = module_and_data(tiny_model)
    result = quiet_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]
    windows, total, tokens = data.windows["val"], 0.0, 0
    module.eval()
    for index in range(len(windows)):
        batch = {name: tensor[None] for name, tensor in windows[index].items()}
        count = int(batch["attention_mask"].sum()) - 1
        with torch.no_grad():
            total, tokens = total + float(module(**batch).loss) * count, tokens + count
    assert result["val_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["val_ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_training(tiny_model: Path, tmp_path: Path) -> None:
    module, data = module_and_data(tiny_model)
    next(iter(module.learnable().values())).data.fill_(float("nan"))
    with pytest.raises(NonFinite, match="training loss became nan at step 0"):
        quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, datamodule=data)


def test_a_gradient_that_is_not_finite_changes_no_weight(tiny_model: Path, tmp_path: Path) -> None:
    module, data = module_and_data(tiny_model)
    name, parameter = next(iter(module.learnable().items()))
    parameter.register_hook(lambda grad: grad * float("nan"))
    before = {key: value.detach().clone() for key, value in module.learnable().items()}
    with pytest.raises(NonFinite, match=name.split(".")[-1]):
        quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, datamodule=data)
    assert all(torch.equal(value, before[key]) for key, value in module.learnable().items())


def test_a_schedule_without_an_end_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    module, data = module_and_data(tiny_model)
    with pytest.raises(UsageError, match=r"trainer\.max_steps"):
        quiet_trainer(tmp_path, max_steps=-1, max_epochs=-1, limit_val_batches=0).fit(module, datamodule=data)


def test_the_meter_counts_real_tokens(tiny_model: Path, tmp_path: Path) -> None:
    module, data = module_and_data(tiny_model)
    meter = Meter(Traffic, 0.0)
    quiet_trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[meter]).fit(module, datamodule=data)
    assert meter.tokens == 3 * 4 * 16
    assert math.isfinite(meter.train_loss)
    assert meter.tokens_per_s > 0
    assert meter.first_step_s is not None


def test_a_whole_run_writes_what_it_promises(tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "a run (1), [x]"
    summary = run_short(tiny_model, run_dir, "optimizer.lr=1e-2", "optimizer.warmup_steps=0", "callbacks.line_every_s=0.001")
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["val_loss_after"] < summary["val_loss_before"]
    assert summary["steps"] == 4
    assert 0 < summary["trainable_params"] < summary["total_params"]
    local = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert summary["total_params"] == sum(item.numel() for item in local.parameters()) + summary["trainable_params"]
    assert (summary["bytes_up"], summary["bytes_down"], summary["retries"]) == (10, 20, 0)
    assert (summary["bytes_up_per_step"], summary["bytes_down_per_step"]) == (0, 0), "the stand-in moves nothing"
    assert Path(summary["loss_curve"]).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step=2", "step=4"}
    for adapter in (run_dir / "adapter", run_dir / "checkpoints" / "step=2" / "adapter"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert [step for step, _ in read_curve(run_dir / "metrics.csv", "train_loss")] == [0, 1, 2, 3]
    assert "step 4/4" in capsys.readouterr().out
    assert len(swarm) == 2
    assert all(item.closed for item in swarm)


def test_the_validation_after_training_is_logged_at_the_last_step(tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm]) -> None:
    run_short(tiny_model, tmp_path / "run", "trainer.max_steps=5", "trainer.val_check_interval=2")
    assert [step for step, _ in read_curve(tmp_path / "run" / "metrics.csv", "val_loss")] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.fast_dev_run=true"],
        ["trainer.limit_val_batches=0"],
        ["trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed"],
        ["trainer.max_steps=-1", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.val_check_interval=1.0"],
        ["trainer.enable_checkpointing=false", "callbacks.loss_curve=false", "callbacks.progress=bar"],
        ["debug=fast"],
        ["optimizer.schedule=constant", "trainer.gradient_clip_val=null", "callbacks.checkpoints_kept=1"],
    ],
    ids=" ".join,
)
def test_trainer_flags_end_in_a_proper_summary(words: list[str], tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm]) -> None:
    summary = run_short(tiny_model, tmp_path / "run", *words)
    assert summary["steps"] >= 1
    assert (tmp_path / "run" / "summary.json").exists()
    assert Path(summary["adapter_dir"]).is_dir()


def test_wandb_offline_needs_no_login(tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_short(tiny_model, tmp_path / "run", "logger=wandb")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_only_the_newest_checkpoints_stay(tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm]) -> None:
    run_short(tiny_model, tmp_path / "run", "trainer.max_steps=12", "callbacks.checkpoints_kept=2")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step=10", "step=12"}


def test_equal_seeds_give_equal_runs(tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm]) -> None:
    first, second, other = (run_short(tiny_model, tmp_path / name, f"seed={seed}") for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first["val_loss_after"] == second["val_loss_after"]
    assert first["val_loss_after"] != other["val_loss_after"]


def test_a_flag_value_that_lightning_refuses_is_one_sentence_and_the_swarm_is_closed(
    tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm]
) -> None:
    with pytest.raises(UsageError, match=r"^trainer: .*precision"):
        run_short(tiny_model, tmp_path / "run", "trainer.precision=banana")
    assert all(item.closed for item in swarm)


def test_ctrl_c_keeps_the_adapter_and_a_checkpoint(
    tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CausalLMModule.training_step

    def interrupted(self: CausalLMModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CausalLMModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted; step 3 is saved: go on with swarmtune resume="):
        run_short(tiny_model, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step=3" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "checkpoints" / "step=3" / "state.ckpt").exists()
    assert all(item.closed for item in swarm)


def test_ctrl_c_during_the_first_validation_is_no_exit_code_of_lightning(
    tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: CausalLMModule, batch: dict, batch_idx: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalLMModule, "validation_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted; no step has been saved"):
        run_short(tiny_model, tmp_path / "run")
    assert all(item.closed for item in swarm)


def test_a_run_directory_is_not_used_twice(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UsageError, match="already holds a run"):
        new_run_dir(str(tmp_path), "lora_bloom")


def test_blocks_are_shared_evenly(tiny_model: Path) -> None:
    def config(*words: str) -> SimpleNamespace:
        return load_config(["recipe=lora_bloom", f"model={tiny_model}", *words])

    assert app.server_spans(config(), str(tiny_model)) == ["0:1", "1:2"]
    assert app.server_spans(config("swarm.servers=1"), str(tiny_model)) == ["0:2"]
    assert app.server_spans(config("swarm.spans=[0:2,0:2]"), str(tiny_model)) == ["0:2", "0:2"]
    with pytest.raises(UsageError, match=r"swarm\.servers must be at most 2"):
        app.server_spans(config("swarm.servers=3"), str(tiny_model))
    with pytest.raises(UsageError, match="outside the model, which has blocks 0:2"):
        app.server_spans(config("swarm.spans=[0:3]"), str(tiny_model))


def test_a_codec_says_once_what_it_does_to_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    """The stand-in for a swarm adds to the loss unless it is told to be exact."""
    error, said = [0.0], []

    @contextmanager
    def exactly() -> Iterator[None]:
        kept, error[0] = error[0], 0.0
        yield
        error[0] = kept

    def module(**batch: Any) -> Any:
        return SimpleNamespace(loss=torch.tensor(batch["loss"] + error[0]))

    for change, warns in ((0.001, False), (0.02, True)):
        caplog.clear()
        error[0] = change
        guard = CodecGuard(exactly, "int8", said.append)
        guard.on_validation_batch_end(None, module, None, {"loss": float("nan")}, 0)  # type: ignore[arg-type]
        assert guard.change is None
        for _ in range(2):
            guard.on_validation_batch_end(None, module, None, {"loss": 2.0}, 1)  # type: ignore[arg-type]
        assert guard.change == pytest.approx(change / 2, rel=1e-3)
        assert ("is safer" in caplog.text) == warns
    assert said[0] == "codec int8 changes the loss of a held-out batch by 0.05% (2.0000 without, 2.0010 with it)"
    assert len(said) == 2
