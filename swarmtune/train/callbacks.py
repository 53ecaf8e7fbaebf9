"""What happens around training: measuring and showing progress."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from swarmtune.remote.events import EventKind, SwarmStatus, Tally
from swarmtune.train.module import perplexity
from swarmtune.train.packing import real_tokens
from swarmtune.train.status import SwarmProgress, troubles

RECENT_BATCHES = 20
"""Batches behind the speed that is shown while training."""


class Totals(Protocol):
    """What one server did so far; see ``swarmtune.remote.chain.ServerTotals``."""

    label: str
    calls: int
    failures: int
    lost_s: float
    network_s: float
    queue_s: float
    compute_s: float
    bytes_up: int
    bytes_down: int


class Traffic(Protocol):
    """Running totals of one client; see ``swarmtune.swarm.SwarmTraffic``."""

    @property
    def bytes_up(self) -> int:
        """Sent to servers."""

    @property
    def bytes_down(self) -> int:
        """Received from servers."""

    @property
    def retries(self) -> int:
        """Calls that had to be asked again."""

    @property
    def wait_s(self) -> float:
        """Seconds that training waited for the swarm."""

    @property
    def servers(self) -> Sequence[Totals]:
        """Each server."""

    @property
    def events(self) -> Mapping[EventKind, Tally]:
        """What went wrong, and what it cost."""


SERVER_TOTALS = ("calls", "failures", "lost_s", "network_s", "queue_s", "compute_s", "bytes_up", "bytes_down")
"""What is logged of each server, as ``server/<label>/<name>``."""


def flat_totals(traffic: Traffic) -> dict[str, float]:
    """Running totals under the names by which they are logged."""
    totals: dict[str, float] = {"bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down, "retries": traffic.retries}
    for kind in EventKind:
        totals[f"events/{kind}"] = traffic.events[kind].count if kind in traffic.events else 0
    totals["events/lost_s"] = sum(tally.lost_s for tally in traffic.events.values())
    for server in traffic.servers:
        totals.update((f"server/{server.label}/{name}", getattr(server, name)) for name in SERVER_TOTALS)
    return totals


class Meter(Callback):
    """Keeps losses, tokens and times of a run, and logs speed and running totals; a checkpoint holds them, so a resumed run goes on counting.

    Args:
        traffic: gives the running totals of this process.
        started: ``time.monotonic()`` when this process began with the run.

    Attributes:
        step_bytes_up: sent to servers by training steps, validation left out.
        step_bytes_down: received from servers by them.
    """

    def __init__(self, traffic: Callable[[], Traffic], started: float) -> None:
        self.traffic, self.started = traffic, started
        self.train_loss = math.nan
        self.val_losses: list[tuple[int, float]] = []
        self.val_accuracies: list[tuple[int, float]] = []
        self.tokens, self.busy_s, self.wait_s = 0, 0.0, 0.0
        self.step_bytes_up = self.step_bytes_down = 0
        self.first_step_s: float | None = None
        self.before: dict[str, float] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_BATCHES)
        self._batch_started, self._waited_s, self._bytes_before = started, 0.0, (0, 0)
        self._losses: list[float] = []
        self._step = 0

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of training, validation left out, over the whole run."""
        return self.tokens / self.busy_s if self.busy_s else 0.0

    @property
    def recent_tokens_per_s(self) -> float:
        """The same over the last batches."""
        seconds = sum(spent for _, spent in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    def totals(self) -> dict[str, float]:
        """Running totals of the whole run, by the names under which they are logged."""
        now = {**flat_totals(self.traffic()), "time/wall_s": time.monotonic() - self.started}
        found = {name: now.get(name, 0) + self.before.get(name, 0) for name in (*now, *self.before)}
        return found | {"time/train_s": self.busy_s, "time/swarm_s": self.wait_s, "tokens": self.tokens}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        seen = {"val_losses": self.val_losses, "val_accuracies": self.val_accuracies}
        moved = {"step_bytes_up": self.step_bytes_up, "step_bytes_down": self.step_bytes_down}
        return {**seen, **moved, "tokens": self.tokens, "busy_s": self.busy_s, "wait_s": self.wait_s, "totals": self.totals()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.val_losses = [(int(step), float(loss)) for step, loss in state_dict["val_losses"]]
        self.val_accuracies = [(int(step), float(share)) for step, share in state_dict.get("val_accuracies", [])]
        self.tokens, self.busy_s, self.wait_s = int(state_dict["tokens"]), float(state_dict["busy_s"]), float(state_dict["wait_s"])
        self.step_bytes_up, self.step_bytes_down = (int(state_dict.get(name, 0)) for name in ("step_bytes_up", "step_bytes_down"))
        ours = ("time/train_s", "time/swarm_s", "tokens")
        self.before = {name: value for name, value in state_dict["totals"].items() if name not in ours}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a batch."""
        before = self.traffic()
        self._batch_started, self._waited_s = time.monotonic(), before.wait_s
        self._bytes_before = before.bytes_up, before.bytes_down

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a batch to the totals."""
        now = time.monotonic()
        tokens, spent = real_tokens(batch), now - self._batch_started
        self.tokens, self.busy_s = self.tokens + tokens, self.busy_s + spent
        after = self.traffic()
        self.wait_s += after.wait_s - self._waited_s
        self.step_bytes_up += after.bytes_up - self._bytes_before[0]
        self.step_bytes_down += after.bytes_down - self._bytes_before[1]
        self._recent.append((tokens, spent))
        if self.first_step_s is None:
            self.first_step_s = now - self.started
        self._losses.append(float(trainer.callback_metrics["train_loss"]))
        if trainer.global_step > self._step:
            self._end_step(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where training begins."""
        self._step, self._losses = trainer.global_step, []

    def _end_step(self, trainer: Trainer) -> None:
        """Log one row for an optimizer step, whole before a checkpoint of that step is written."""
        self._step = trainer.global_step
        self.train_loss = sum(self._losses) / len(self._losses)
        self._losses = []
        if self._step % getattr(trainer, "log_every_n_steps", 1):
            return
        row = {"train_loss": self.train_loss, "tokens_per_s": self.recent_tokens_per_s, "epoch": trainer.current_epoch, **self.totals()}
        if "lr" in trainer.callback_metrics:
            row["lr"] = float(trainer.callback_metrics["lr"])
        for each in trainer.loggers:  # not through the module's log, which would round byte counts to 24 bits
            each.log_metrics({name: float(value) for name, value in row.items()}, step=self._step - 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validation loss of this step, and a classifier's accuracy."""
        for name, kept in (("val_loss", self.val_losses), ("val_accuracy", self.val_accuracies)):
            value = trainer.callback_metrics.get(name)
            if value is not None:
                kept[:] = [(step, old) for step, old in kept if step != trainer.global_step]
                kept.append((trainer.global_step, float(value)))


class ProgressDisplay(Callback):
    """A bar on a terminal, a line every few seconds elsewhere; both say step, loss, speed, time left, and what goes wrong in the swarm.

    Must stand after ``meter`` in the Trainer's list.
    """

    def __init__(
        self, meter: Meter, console: Console, *, bar: bool, line_every_s: float = 5.0, statuses: Callable[[], Sequence[SwarmStatus]] = lambda: ()
    ) -> None:
        self.meter, self.console, self.bar, self.line_every_s, self.statuses = meter, console, bar, line_every_s, statuses
        self._told = ""
        self._bar = self._new_bar(console) if bar else None
        self._task: TaskID | None = None
        self._said_at, self._began_at, self._first_step = 0.0, 0.0, 0

    def _new_bar(self, console: Console) -> Progress:
        speed = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tok/s")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
        bar = SwarmProgress(*columns, console=console, transient=True)
        bar.statuses = self.statuses
        return bar

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the empty bar."""
        self._began_at, self._first_step = time.monotonic(), trainer.global_step
        if self._bar is not None:
            total = _total_steps(trainer)
            self._task = self._bar.add_task("training", total=total, completed=trainer.global_step, loss=float("nan"), rate=0.0)
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar, or say a line when the last one is old enough."""
        loss = self.meter.train_loss
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=trainer.global_step, loss=loss, rate=self.meter.recent_tokens_per_s, description="training")
            return
        now, total = time.monotonic(), _total_steps(trainer)
        if now - self._said_at < self.line_every_s and trainer.global_step != total:
            return
        self._said_at = now
        speed = f"{self.meter.recent_tokens_per_s:,.0f} tok/s"
        self._say(f"step {trainer.global_step}/{total or '?'}  loss {loss:.3f}  {speed}{self._left(trainer, now)}{self._news()}")

    def _news(self) -> str:
        """What goes wrong in the swarm, where that is more than the last line said."""
        told, self._told = self._told, ", ".join(trouble for status in self.statuses() for trouble in troubles(status))
        return f"  ({self._told})" if self._told and self._told != told else ""

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
        """Say what held-out data gave: the loss, and its perplexity or a classifier's accuracy."""
        if self.meter.val_losses:
            step, loss = self.meter.val_losses[-1]
            accuracy = dict(self.meter.val_accuracies).get(step)
            meaning = f"perplexity {perplexity(loss):,.1f}" if accuracy is None else f"accuracy {accuracy:.1%}"
            self._say(f"step {step}: held-out loss {loss:.3f}, {meaning}")

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
