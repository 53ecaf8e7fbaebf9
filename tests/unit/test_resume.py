"""``resume=``: the run that was begun goes on, and gives the adapter that it would have given."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swarmtune import app
from swarmtune.errors import SwarmError, UsageError
from swarmtune.resume import plan_run
from swarmtune.train import checkpoint
from swarmtune.train.metrics_file import read_curve
from swarmtune.train.module import CausalLMModule
from swarmtune.train.run_dir import locked
from tests.unit.stand_in import SHORT, StandInSwarm, run_short

pytestmark = pytest.mark.usefixtures("one_thread", "swarm")
LONG = ("trainer.max_steps=9", "trainer.val_check_interval=4", "callbacks.checkpoint_every_steps=3")


def words(tiny_model: Path, *more: str) -> list[str]:
    return ["recipe=lora_bloom", f"model={tiny_model}", *more]


def adapter_of(run_dir: Path) -> dict:
    return {name: tensor.tolist() for name, tensor in load_file(run_dir / "adapter" / "adapter_model.safetensors").items()}


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training step draws from torch's generator, as dropout would."""
    step = CausalLMModule.training_step
    monkeypatch.setattr(CausalLMModule, "training_step", lambda self, batch, index: step(self, batch, index) * (1 + torch.rand(())))


def break_off(monkeypatch: pytest.MonkeyPatch, at_batch: int, how: BaseException | None, number: int = signal.SIGINT) -> None:
    """Fail in the given training batch, counted from 0; without an exception, a signal comes there."""
    step, seen = CausalLMModule.training_step, iter(range(10_000))

    def broken(self: CausalLMModule, batch: dict, batch_idx: int) -> object:
        if next(seen) == at_batch:
            if how is not None:
                raise how
            os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CausalLMModule, "training_step", broken)


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at_batch", [3, 7])
@pytest.mark.parametrize("by_epochs", [False, True], ids=["steps", "epochs"])
@pytest.mark.parametrize("how", [SwarmError("nobody answers"), KeyboardInterrupt(), None], ids=["failure", "interrupt", "signal"])
def test_a_broken_run_goes_on_to_the_adapter_of_the_unbroken_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_batch: int, by_epochs: bool, accumulate: int, how: BaseException | None
) -> None:
    options = [*LONG, "trainer.limit_train_batches=7", f"trainer.accumulate_grad_batches={accumulate}"]  # several epochs
    if by_epochs:  # Lightning then asks for the length of an epoch before it restores anything
        options += ["trainer.max_steps=-1", "trainer.max_epochs=2"]
    whole = run_short(tiny_model, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        break_off(patch, at_batch, how)
        with pytest.raises((SwarmError, KeyboardInterrupt)):
            run_short(tiny_model, tmp_path / "broken", *options)
    plan = plan_run([f"resume={tmp_path / 'broken'}"])
    assert plan.run_dir == tmp_path / "broken"
    summary = app.train(plan.config, resume=plan.run_dir)
    assert adapter_of(tmp_path / "broken") == adapter_of(tmp_path / "whole")
    for key in ("steps", "val_loss_before", "val_loss_after"):
        assert summary[key] == whole[key]
    for column in ("train_loss", "lr", "val_loss", "tokens"):
        curves = [read_curve(tmp_path / name / "metrics.csv", column) for name in ("whole", "broken")]
        assert curves[0] == curves[1], column


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_that_it_came_in(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    break_off(monkeypatch, 4, None, number)
    with pytest.raises(KeyboardInterrupt, match="step 5 is saved"):
        run_short(tiny_model, tmp_path / "run", *LONG, "callbacks.checkpoint_every_steps=100")
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=5"]


def test_a_signal_in_a_validation_lets_it_end(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_short(tiny_model, tmp_path / "whole", *LONG)
    step = CausalLMModule.validation_step

    def interrupted(self: CausalLMModule, batch: dict, batch_idx: int) -> None:
        if self.global_step == 4 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLMModule, "validation_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match="step 4 is saved"):
            run_short(tiny_model, tmp_path / "broken", *LONG)
    app.train(plan_run([f"resume={tmp_path / 'broken'}"]).config, resume=tmp_path / "broken")
    curves = [read_curve(tmp_path / name / "metrics.csv", "val_loss") for name in ("whole", "broken")]
    assert curves[0] == curves[1]
    assert adapter_of(tmp_path / "broken") == adapter_of(tmp_path / "whole")


def test_two_signals_while_a_step_is_remembered_save_nothing_that_is_mixed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_short(tiny_model, tmp_path / "whole", *LONG)
    remember, seen = checkpoint.rng_state, iter(range(100))

    def twice() -> dict:
        if next(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return remember()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "rng_state", twice)
        with pytest.raises(KeyboardInterrupt, match="step 3 is saved"):
            run_short(tiny_model, tmp_path / "broken", *LONG)
    app.train(plan_run([f"resume={tmp_path / 'broken'}"]).config, resume=tmp_path / "broken")
    assert adapter_of(tmp_path / "broken") == adapter_of(tmp_path / "whole")


def test_auto_begins_anew_where_nothing_was_interrupted_and_goes_on_where_something_was(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ("trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.limit_val_batches=1", "data.sequence_length=16")
    plan = plan_run(words(tiny_model, *short, "resume=auto"))
    assert plan.run_dir is None
    with monkeypatch.context() as patch:
        break_off(patch, 2, SwarmError("gone"))
        with pytest.raises(SwarmError):
            app.train(plan.config)
    again = plan_run(words(tiny_model, *short, "resume=auto"))
    assert again.run_dir is not None
    assert again.run_dir.parent == tmp_path / "runs" / "lora_bloom"
    said: list[str] = []
    assert plan_run(words(tiny_model, *short, "optimizer.lr=0.5", "resume=auto"), said.append).run_dir is None
    assert "optimizer.lr" in said[0]
    with locked(again.run_dir):
        assert plan_run(words(tiny_model, *short, "resume=auto")).run_dir is None
    app.train(again.config, resume=again.run_dir)
    assert plan_run(words(tiny_model, *short, "resume=auto")).run_dir is None


def test_what_cannot_go_on_is_one_sentence(tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm]) -> None:
    with pytest.raises(UsageError, match=r"no run directory: it holds no config\.yaml"):
        plan_run([f"resume={tmp_path}"])
    run_short(tiny_model, tmp_path / "run")
    with pytest.raises(UsageError, match="is finished"):
        plan_run([f"resume={tmp_path / 'run'}"])
    assert plan_run(words(tiny_model, f"run_dir={tmp_path / 'run'}", "data.sequence_length=16", *SHORT, "resume=auto")).finished
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UsageError, match="in its own directory"):
        plan_run([f"resume={tmp_path / 'run'}", "run_dir=elsewhere"])
    for change in (["optimizer.lr=0.5"], words(tiny_model, "data.batch_size=2")):
        with pytest.raises(UsageError, match=r"began with another .*(optimizer\.lr|data\.batch_size)"):
            plan_run([f"resume={tmp_path / 'run'}", *change])
    assert plan_run([f"resume={tmp_path / 'run'}", "swarm.patience_s=99"]).config.swarm.patience_s == 99
    with pytest.raises(UsageError, match=r"there is no key swarm\.patiense_s; did you mean"):
        plan_run([f"resume={tmp_path / 'run'}", "swarm.patiense_s=99"])
    with locked(tmp_path / "run"), pytest.raises(UsageError, match=f"process {os.getpid()} is working on"):
        app.train(plan_run([f"resume={tmp_path / 'run'}"]).config, resume=tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("recipe: [")
    with pytest.raises(UsageError, match=r"config\.yaml cannot be read"):
        plan_run([f"resume={tmp_path / 'run'}"])


def test_changed_data_are_noticed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(f"the value {number} is returned if the name is used in the class" for number in range(40)))
    options = (f"data={notes}", "trainer.max_steps=6", "callbacks.checkpoint_every_steps=2")
    with monkeypatch.context() as patch:
        break_off(patch, 3, SwarmError("gone"))
        with pytest.raises(SwarmError):
            run_short(tiny_model, tmp_path / "run", *options)
    notes.write_text("\n\n".join(notes.read_text().split("\n\n")[:30]))
    plan = plan_run([f"resume={tmp_path / 'run'}"])
    with pytest.raises(UsageError, match="the training data are not what this run began with"):
        app.train(plan.config, resume=plan.run_dir)
