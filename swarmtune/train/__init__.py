"""Training: data, the LightningModule, its callbacks, and keys that other libraries define."""
