"""The training half on a stand-in: a tiny local BLOOM with a PEFT LoRA in the place of the swarm."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

import swarmtune
from swarmtune import app
from swarmtune.config import load_config
from swarmtune.errors import NonFinite, UsageError
from swarmtune.train.callbacks import Meter
from swarmtune.train.data import TextDataModule
from swarmtune.train.documents import python_topics
from swarmtune.train.module import CausalLMModule

WORDS = 61
"""Words of the stand-in's vocabulary."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A barrier of two threads costs far more than a tiny matrix product where other tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    seen = sorted({word for item in python_topics() for word in item.text.split() if word.isalpha()})[:WORDS]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", "<pad>", *seen])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=len(vocabulary), hidden_size=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


class Adapter(nn.Module):
    """The leaf parameters of a PEFT model, saved by PEFT itself."""

    def __init__(self, peft_model: PeftModel) -> None:
        super().__init__()
        self._peft = [peft_model]
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)

    def save_pretrained(self, folder: Path) -> None:
        self._peft[0].save_pretrained(folder)


def stand_in(path: str, swarm: object, adapter: object) -> nn.Module:
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), adapter)
    model = peft_model.base_model.model
    model.adapter = Adapter(peft_model)
    return model


class Traffic:
    bytes_up, bytes_down, retries = 10, 20, 0


class StandInSwarm:
    initial_peers = ("/ip4/127.0.0.1/tcp/1/p2p/x",)

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.closed = False

    def start(self) -> "StandInSwarm":
        return self

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "StandInSwarm":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def traffic(self) -> Traffic:
        return Traffic()


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> list[StandInSwarm]:
    made: list[StandInSwarm] = []

    def make(*args: object, **kwargs: object) -> StandInSwarm:
        made.append(StandInSwarm())
        return made[-1]

    monkeypatch.setitem(vars(swarmtune), "LocalSwarm", make)
    monkeypatch.setitem(vars(swarmtune), "connect", make)
    monkeypatch.setitem(vars(swarmtune), "load_causal_lm", stand_in)
    return made


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")


def module_and_data(tiny_model: Path, **options: float) -> tuple[CausalLMModule, TextDataModule]:
    torch.manual_seed(0)
    module = CausalLMModule(stand_in(str(tiny_model), None, lora()), hyperparameters={"lr": 1e-2}, **options)
    return module, TextDataModule(str(tiny_model), sequence_length=16, batch_size=4)


def quiet_trainer(folder: Path, **flags: object) -> Trainer:
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **(plain | flags))


SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=2", "callbacks.checkpoint_every_steps=2"]


def run_short(tiny_model: Path, run_dir: Path, *words: str) -> dict:
    config = load_config(["recipe=lora_bloom", f"model={tiny_model}", f"run_dir={run_dir}", "data.sequence_length=16", *SHORT, *words])
    return app.train(config)


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
    assert [step for step, _ in meter.train_losses] == [1, 2, 3]
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
    assert Path(summary["loss_curve"]).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step=2", "step=4"}
    for adapter in (run_dir / "adapter", run_dir / "checkpoints" / "step=2" / "adapter"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert "train_loss" in (run_dir / "csv" / "metrics.csv").read_text()
    assert "step 4/4" in capsys.readouterr().out
    assert len(swarm) == 2
    assert all(item.closed for item in swarm)


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
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 3; the adapter so far is in"):
        run_short(tiny_model, tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "checkpoints" / "step=3" / "state.ckpt").exists()
    assert all(item.closed for item in swarm)


def test_ctrl_c_during_the_first_validation_is_no_exit_code_of_lightning(
    tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: CausalLMModule, batch: dict, batch_idx: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalLMModule, "validation_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 0"):
        run_short(tiny_model, tmp_path / "run")
    assert all(item.closed for item in swarm)


def test_a_run_directory_is_not_used_twice(tiny_model: Path, tmp_path: Path) -> None:
    config = load_config(["recipe=lora_bloom", f"model={tiny_model}", f"run_dir={tmp_path}"])
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds a run"):
        app.make_run_dir(config)


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


def test_json_is_written_whole(tmp_path: Path) -> None:
    app.write_json(tmp_path / "a.json", {"path": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
