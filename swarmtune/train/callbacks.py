"""What happens around training: measuring, progress, checkpoints with a PEFT directory beside each."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from swarmtune.errors import NonFinite
from swarmtune.train.module import perplexity

RECENT_BATCHES = 20
"""Batches behind the speed that is shown while training."""


class Traffic(Protocol):
    """Running totals of one client."""

    @property
    def bytes_up(self) -> int:
        """Sent to servers."""

    @property
    def bytes_down(self) -> int:
        """Received from servers."""

    @property
    def retries(self) -> int:
        """Calls that had to be asked again."""


class Meter(Callback):
    """Keeps losses, tokens and times of a run, and logs speed and traffic.

    Args:
        traffic: gives the running totals.
        started: ``time.monotonic()`` when the run began.
    """

    def __init__(self, traffic: Callable[[], Traffic], started: float) -> None:
        self.traffic, self.started = traffic, started
        self.train_losses: list[tuple[int, float]] = []
        self.val_losses: list[tuple[int, float]] = []
        self.tokens, self.busy_s = 0, 0.0
        self.first_step_s: float | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_BATCHES)
        self._batch_started = started

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of training, validation left out, over the whole run."""
        return self.tokens / self.busy_s if self.busy_s else 0.0

    @property
    def recent_tokens_per_s(self) -> float:
        """The same over the last batches."""
        seconds = sum(spent for _, spent in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a batch."""
        self._batch_started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a batch to the totals."""
        now = time.monotonic()
        tokens, spent = int(batch["attention_mask"].sum()), now - self._batch_started
        self.tokens, self.busy_s = self.tokens + tokens, self.busy_s + spent
        self._recent.append((tokens, spent))
        if self.first_step_s is None:
            self.first_step_s = now - self.started
        self.train_losses.append((trainer.global_step, float(trainer.callback_metrics["train_loss"])))
        traffic = self.traffic()
        totals = {name: float(getattr(traffic, name)) for name in ("bytes_up", "bytes_down", "retries")}
        pl_module.log_dict({"tokens_per_s": self.recent_tokens_per_s, **totals})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validation loss of this step."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            self.val_losses.append((trainer.global_step, float(loss)))


class ProgressDisplay(Callback):
    """A bar on a terminal, a line every few seconds elsewhere; both say step, loss, speed and time left.

    Must stand after ``meter`` in the Trainer's list.
    """

    def __init__(self, meter: Meter, console: Console, *, bar: bool, line_every_s: float = 5.0) -> None:
        self.meter, self.console, self.bar, self.line_every_s = meter, console, bar, line_every_s
        self._bar = self._new_bar(console) if bar else None
        self._task: TaskID | None = None
        self._said_at, self._began_at, self._first_step = 0.0, 0.0, 0

    @staticmethod
    def _new_bar(console: Console) -> Progress:
        speed = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tok/s")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
        return Progress(*columns, console=console, transient=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the empty bar."""
        self._began_at, self._first_step = time.monotonic(), trainer.global_step
        if self._bar is not None:
            total = _total_steps(trainer)
            self._task = self._bar.add_task("training", total=total, completed=trainer.global_step, loss=float("nan"), rate=0.0)
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar, or say a line when the last one is old enough."""
        loss = self.meter.train_losses[-1][1]
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=trainer.global_step, loss=loss, rate=self.meter.recent_tokens_per_s, description="training")
            return
        now, total = time.monotonic(), _total_steps(trainer)
        if now - self._said_at < self.line_every_s and trainer.global_step != total:
            return
        self._said_at = now
        speed = f"{self.meter.recent_tokens_per_s:,.0f} tok/s"
        self._say(f"step {trainer.global_step}/{total or '?'}  loss {loss:.3f}  {speed}{self._left(trainer, now)}")

    def _left(self, trainer: Trainer, now: float) -> str:
        done, total = trainer.global_step - self._first_step, _total_steps(trainer)
        if not total or done <= 0:
            return ""
        seconds = round((total - trainer.global_step) * (now - self._began_at) / done)
        return f"  {seconds // 60}:{seconds % 60:02d} left"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the bar stands still because validation runs."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description="validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say the perplexity on held-out text."""
        if self.meter.val_losses:
            step, loss = self.meter.val_losses[-1]
            self._say(f"step {step}: held-out loss {loss:.3f}, perplexity {perplexity(loss):,.1f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away."""
        self.on_train_end(trainer, pl_module)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, ``None`` where it has no end."""
    total = trainer.estimated_stepping_batches
    return None if total == float("inf") else int(total)


class AdapterCheckpoint(Checkpoint):
    """Saves ``step=N/state.ckpt`` and, beside it, the PEFT directory ``step=N/adapter``.

    Every ``every_steps`` optimizer steps, at the end, and when training is broken off; the newest ``keep`` stay. Nothing is saved after a
    loss or gradient that is not finite.

    Args:
        directory: where the ``step=N`` directories are made.
        every_steps: optimizer steps between two.
        keep: how many stay; -1 for all.
    """

    def __init__(self, directory: Path, every_steps: int, keep: int = -1) -> None:
        self.directory, self.every_steps, self.keep = directory, every_steps, keep
        self._saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count where training begins."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when a multiple of ``every_steps`` is reached."""
        if trainer.global_step % self.every_steps == 0:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end."""
        self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what there is."""
        if not isinstance(exception, NonFinite):
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if step == self._saved_step or getattr(trainer, "fast_dev_run", False):
            return
        folder = self.directory / f"step={step}"
        trainer.save_checkpoint(folder / "state.ckpt")
        pl_module.model.adapter.save_pretrained(folder / "adapter")
        self._saved_step = step
        self._prune()

    def _prune(self) -> None:
        folders = sorted(self.directory.glob("step=*"), key=lambda folder: int(folder.name.removeprefix("step=")))
        for folder in folders[: -self.keep] if self.keep > 0 else []:
            shutil.rmtree(folder)
