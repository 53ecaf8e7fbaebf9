"""LoRA and a head that tells classes of texts, over blocks that run on a swarm.

swarmtune recipe=lora_classify
swarmtune recipe=lora_classify data=reviews.csv data.text_column=review data.label_column=stars trainer.max_steps=500

The YAML file of the same name holds the values. To make a recipe of your own: swarmtune cp lora_classify my_recipe
"""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule

import swarmtune
from swarmtune.config import resolve_path, to_plain
from swarmtune.schema import Config
from swarmtune.train.data import TextDataModule
from swarmtune.train.library_keys import peft_config
from swarmtune.train.module import ClassifierModule


def build(config: Config, swarm: swarmtune.Swarm) -> tuple[LightningModule, LightningDataModule]:
    """What learns, and what it learns from."""
    path = resolve_path(config.model.path)
    data = TextDataModule(path, **to_plain(config.data), seed=config.seed)

    adapter = peft_config(config.adapter)
    model = swarmtune.load_sequence_classifier(path, swarm, adapter=adapter, num_labels=len(data.labels))
    model.config.pad_token_id = data.pad_token  # a row's answer is read at its last token that is another
    model.config.id2label = dict(enumerate(data.labels))

    module = ClassifierModule(
        model,
        lr=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        schedule=config.optimizer.schedule.value,
        warmup_steps=config.optimizer.warmup_steps,
        hyperparameters=to_plain(config),
    )
    return module, data
