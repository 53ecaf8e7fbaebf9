"""``events.jsonl``: what went wrong in a run, one line each, written as it happens."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from swarmtune.remote.events import SwarmEvent

logger = logging.getLogger(__name__)
MAX_LINES = 100_000


class EventsFile(Callback):
    """Appends the swarm's events after each batch, and whatever is left when a run ends or breaks off.

    Args:
        path: the file; one that is there is continued.
        events: those after a monotonic instant, oldest first.
    """

    def __init__(self, path: Path, events: Callable[[float], Sequence[SwarmEvent]]) -> None:
        self.path, self._events = path, events
        self._after = 0.0
        self._lines = 0

    def write(self, step: int) -> None:
        """Append what is new; a disk that is full costs lines, not the run."""
        new = self._events(self._after)
        if not new:
            return
        self._after = new[-1].at
        kept = new[: max(0, MAX_LINES - self._lines)]
        self._lines += len(kept)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(_plain(event, step)) + "\n" for event in kept)
        except OSError as error:
            logger.warning("%d events could not be written to %s: %s", len(kept), self.path, error.strerror or error)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each batch."""
        self.write(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each validation."""
        self.write(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What led to the end of the run."""
        self.write(trainer.global_step)


def _plain(event: SwarmEvent, step: int) -> dict[str, Any]:
    return {
        "time": round(time.time() - (time.monotonic() - event.at), 3),
        "step": step,
        "kind": str(event.kind),
        "server": event.server,
        "blocks": None if event.span is None else str(event.span),
        "lost_s": round(event.lost_s, 3),
        "detail": event.detail,
    }
