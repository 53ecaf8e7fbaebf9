"""What a codec does to the loss, measured on the run's own data before it trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

logger = logging.getLogger(__name__)
WORTH_A_WARNING = 0.005
"""Of the loss; the codecs' goal for the final validation loss."""


class CodecGuard(Callback):
    """Computes the first batch of the first validation a second time without a codec, and says how the loss differs.

    Args:
        exactly: inside of it nothing is compressed.
        codec: its name.
        say: prints a sentence.
    """

    def __init__(self, exactly: Callable[[], AbstractContextManager[None]], codec: str, say: Callable[[str], None]) -> None:
        self._exactly, self._codec, self._say = exactly, codec, say
        self.change: float | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Once."""
        if self.change is not None:
            return
        with torch.no_grad():
            compressed = float(pl_module(**batch).loss)
            with self._exactly():
                exact = float(pl_module(**batch).loss)
        if not math.isfinite(exact):
            return  # nothing is asked of this batch
        self.change = abs(compressed - exact) / max(abs(exact), 1e-12)
        sentence = f"codec {self._codec} changes the loss of a held-out batch by {self.change:.2%} ({exact:.4f} without, {compressed:.4f} with it)"
        self._say(sentence)
        if not self.change <= WORTH_A_WARNING:
            logger.warning("%s, which is more than %.1f %%: swarm.codec=bf16 or none is safer", sentence, 100 * WORTH_A_WARNING)
