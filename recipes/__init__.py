"""One file per task, short enough to read, copy and edit: ``build(config, swarm) -> (LightningModule, LightningDataModule)``."""
