"""``events.jsonl``: what went wrong in a run, one line each, written as it happens."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from swarmtune.remote.events import EventKind, SwarmEvent

logger = logging.getLogger(__name__)
MAX_LINES = 100_000
RETRIED = (EventKind.FAILED, EventKind.SLOW, EventKind.BUSY, EventKind.DRAINED, EventKind.CUT_OFF, EventKind.RECOMPUTED, EventKind.RESENT)
"""Events after which a call was asked again."""


class EventsFile(Callback):
    """Appends the swarm's events after each batch, and whatever is left when a run ends or breaks off.

    Args:
        path: the file; one that is there is continued.
        events: those after a monotonic instant, oldest first.
        before: running totals of earlier processes of this run; the file corrects them, because a checkpoint cannot know what broke the run off.
    """

    def __init__(self, path: Path, events: Callable[[float], Sequence[SwarmEvent]], before: Callable[[], dict[str, float]] = dict) -> None:
        self.path, self._events, self._before = path, events, before
        self._earlier = counted(path)
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
            with self.path.open("a+b") as file:
                if file.tell() and _last_byte(file) != b"\n":  # its last writer was killed
                    file.write(b"\n")
                file.writelines(json.dumps(_plain(event, step)).encode() + b"\n" for event in kept)
        except OSError as error:
            logger.warning("%d events could not be written to %s: %s", len(kept), self.path, error.strerror or error)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run goes on counting from what the file says."""
        self._before().update(self._earlier)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each batch."""
        self.write(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each validation."""
        self.write(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What led to the end of the run."""
        self.write(trainer.global_step)


def counted(path: Path) -> dict[str, float]:
    """The running totals that a file of events amounts to; none where there is no file. A line that is no event is passed over."""
    if not path.exists():
        return {}
    totals = dict.fromkeys((*(f"events/{kind}" for kind in EventKind), "events/lost_s", "retries"), 0.0)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
            kind, lost_s = EventKind(event["kind"]), float(event["lost_s"])
        except (ValueError, KeyError, TypeError):
            continue
        totals[f"events/{kind}"] += 1
        totals["events/lost_s"] += lost_s
        totals["retries"] += kind in RETRIED
    return totals


def _last_byte(file: IO[bytes]) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


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
