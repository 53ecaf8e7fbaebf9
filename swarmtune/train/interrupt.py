"""Ctrl-C and SIGTERM during training: finish the step, save, stop; a second one stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopBetweenSteps(Callback):
    """Turns the first signal into a ``KeyboardInterrupt`` between two batches, where everything can be saved; the second comes at once.

    Args:
        say: tells the user a sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._told = False
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over."""
        try:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        except ValueError:  # handlers belong to the main thread, and so do signals
            self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._told:
            raise KeyboardInterrupt
        self._told = True
        self._say("stopping after this step and its validation; press Ctrl-C again to stop at once")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here if told to: the step before is whole, validated where that was due, and remembered by the checkpoint callback."""
        self._stop()

    def _stop(self) -> None:
        if self._told:
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
