"""LoRA on conversations: a chat template, what the assistant says as the loss, packed rows where the model can.

swarmtune recipe=lora_chat
swarmtune recipe=lora_chat model=./my-llama data=chats.jsonl data.sequence_length=1024 trainer.max_steps=500

The YAML file of the same name holds the values. To make a recipe of your own: swarmtune cp lora_chat my_recipe
"""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule

import swarmtune
from swarmtune.config import resolve_path, to_plain
from swarmtune.notices import say
from swarmtune.schema import Config
from swarmtune.train.data import TextDataModule
from swarmtune.train.library_keys import peft_config
from swarmtune.train.module import CausalLMModule
from swarmtune.train.packing import choose_packing


def build(config: Config, swarm: swarmtune.Swarm) -> tuple[LightningModule, LightningDataModule]:
    """What learns, and what it learns from."""
    path = resolve_path(config.model.path)
    model = swarmtune.load_causal_lm(path, swarm, adapter=peft_config(config.adapter))

    module = CausalLMModule(
        model,
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        schedule=config.optimizer.schedule.value,
        warmup_steps=config.optimizer.warmup_steps,
        hyperparameters=to_plain(config),
    )
    packing = choose_packing(config.data.packing.value, model, lambda sentence: say(config, sentence))
    data = TextDataModule(path, **{**to_plain(config.data), "packing": packing}, seed=config.seed)
    return module, data
