"""IA3 on a BLOOM whose blocks run on a swarm: one learned factor for each activation.

swarmtune recipe=ia3_bloom
swarmtune recipe=ia3_bloom model=bigscience/bloom-560m data=notes.jsonl trainer.max_steps=500

The YAML file of the same name holds the values. To make a recipe of your own: swarmtune cp ia3_bloom my_recipe
"""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule

import swarmtune
from swarmtune.config import resolve_path, to_plain
from swarmtune.schema import Config
from swarmtune.train.data import TextDataModule
from swarmtune.train.library_keys import peft_config
from swarmtune.train.module import CausalLMModule


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
    data = TextDataModule(path, **to_plain(config.data), seed=config.seed)
    return module, data
