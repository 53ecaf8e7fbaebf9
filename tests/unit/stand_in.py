"""The training half on a stand-in: a tiny local BLOOM with a PEFT LoRA in the place of the swarm."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from swarmtune import app
from swarmtune.config import load_config
from swarmtune.train.data import TextDataModule
from swarmtune.train.module import CausalLMModule


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
    bytes_up, bytes_down, retries, wait_s, servers = 10, 20, 0, 0.0, ()
    events: dict = {}


class StandInSwarm:
    initial_peers = ("/ip4/127.0.0.1/tcp/1/p2p/x",)
    servers = ()

    def wait_ready(self) -> None:
        pass

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

    def events(self, after: float = 0.0) -> list:
        return []

    def status(self) -> list:
        return []

    def fingerprint(self) -> dict:
        return {"model": ["x"]}


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


def classifier_stand_in(path: str, swarm: object, adapter: LoraConfig | None = None, num_labels: int = 2) -> nn.Module:
    """A local classifier with LoRA and a head that learn, in the place of ``load_sequence_classifier``."""
    config = adapter or LoraConfig(r=2, target_modules=["query_key_value"])
    config.task_type = "SEQ_CLS"
    peft_model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels), config)
    model = peft_model.base_model.model
    model.adapter = Adapter(peft_model)
    return model
