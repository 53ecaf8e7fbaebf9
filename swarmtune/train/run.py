"""One run over a swarm that is up: build, validate, fit, validate, export, draw, summarise."""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

import swarmtune
from swarmtune.config import resolve_path, to_plain
from swarmtune.errors import SwarmtuneError, UsageError
from swarmtune.files import write_json
from swarmtune.model_files import count_parameters
from swarmtune.notices import say
from swarmtune.schema import Codec, Config, ProgressKind
from swarmtune.train.callbacks import Meter, ProgressDisplay
from swarmtune.train.checkpoint import AdapterCheckpoint, save_adapter
from swarmtune.train.codec_guard import CodecGuard
from swarmtune.train.events_file import EventsFile
from swarmtune.train.interrupt import StopBetweenSteps
from swarmtune.train.loggers import METRICS, finish, make_loggers, publish, wandb_run
from swarmtune.train.metrics_file import read_curve
from swarmtune.train.module import ClassifierModule
from swarmtune.train.run_dir import ADAPTER, CHECKPOINTS, EVENTS, FACTS, SUMMARY, read_facts, writing
from swarmtune.train.saved_state import SavedState, newest_checkpoint, step_folders

Build = Callable[[Config, swarmtune.Swarm], tuple[LightningModule, LightningDataModule]]
"""What a recipe gives: its module and its data."""


class Run:
    """One run whose swarm is up: build, validate, fit, validate, export."""

    def __init__(self, config: Config, run_dir: Path, swarm: swarmtune.Swarm, build: Build, *, started: float, resumed: bool, group: str) -> None:
        self.config, self.run_dir, self.swarm, self.started = config, run_dir, swarm, started
        self.build, self.resumed, self.group = build, resumed, group
        self.meter = Meter(swarm.traffic, started)

    def run(self) -> dict[str, Any]:
        """From start to end; see ``train``."""
        seed_everything(self.config.seed, workers=True, verbose=False)
        module, data = self.build(self.config, self.swarm)
        saved = newest_checkpoint(self.run_dir / CHECKPOINTS) if self.resumed else None
        if self.resumed:
            say(
                self.config,
                f"going on with {self.run_dir} " + (f"after step {saved.step}" if saved else "from its start: it has no whole checkpoint"),
            )
        with writing(self.run_dir):
            loggers = self._loggers(saved.step if saved else 0)
        code = 1
        try:
            trainer = build_trainer(self.config, self.run_dir, self.meter, loggers, self._facts(data), _companions(data), self.swarm)
            waited_s = time.monotonic() - self.started
            mode = "".join(f", the body computes in {mode}" for mode in self.swarm.fingerprint().get("mode", ()))
            say(self.config, f"ready after {waited_s:.0f} s; {trainable_parameters(module):,} parameters learn{mode}")
            with self._breaking_off(trainer):
                after = self._fit(trainer, module, data, saved)
                with writing(self.run_dir):
                    summary = self._finish(trainer, module, data, after)
            publish(loggers, summary)
            code = 0
        finally:
            finish(loggers, code)
        return summary

    def _fit(self, trainer: Trainer, module: LightningModule, data: LightningDataModule, saved: SavedState | None) -> float | None:
        """Validate, train, validate; the validation loss at the end."""
        if saved is None:
            _validate(trainer, module, data, self.meter)
            trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, datamodule=data, ckpt_path=saved.file, weights_only=True)
        losses = self.meter.val_losses
        return losses[-1][1] if losses and losses[-1][0] == trainer.global_step > 0 else _validate(trainer, module, data, self.meter)

    def _loggers(self, keep_below: int) -> list[Any]:
        kind = str(self.config.adapter.get("peft_type", "saved adapter"))
        model = Path(resolve_path(self.config.model.path)).name
        names = {
            "name": f"{self.config.title}-{model}-{self.run_dir.name}",
            "group": self.group,
            "tags": [self.config.title, model, kind.lower()],
            "config": to_plain(self.config),
        }
        before = read_facts(self.run_dir) if self.resumed else {}
        wandb_id = before.get("wandb_id")
        loggers = make_loggers(
            self.config.logger,
            self.run_dir,
            names=names,
            keep_below=keep_below,
            wandb_id=wandb_id if isinstance(wandb_id, str) else None,
            say=lambda sentence: say(self.config, sentence),
        )
        run = wandb_run(loggers)
        write_json(self.run_dir / FACTS, before | ({"wandb_id": run.id} if run is not None else {}))
        return loggers

    def _facts(self, data: LightningDataModule) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        facts = dict(self.swarm.fingerprint())
        fingerprint = getattr(data, "fingerprint", None)
        if fingerprint is not None:
            facts["data"] = fingerprint()
        if self.config.recipe.endswith(".py"):
            facts["recipe"] = hashlib.sha256(Path(self.config.recipe).read_bytes()).hexdigest()
        return facts

    @contextmanager
    def _breaking_off(self, trainer: Trainer) -> Iterator[None]:
        """Say how to go on after an interrupt or a failure; turn Lightning's ``sys.exit`` at Ctrl-C back into a ``KeyboardInterrupt``."""
        handler = signal.getsignal(signal.SIGINT)
        try:
            yield
        except (SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, SystemExit) and trainer.state.status != "interrupted":
                raise
            raise KeyboardInterrupt(f"interrupted; {self._how_to_go_on()}") from error
        except SwarmtuneError as error:
            error.add_note(self._how_to_go_on())
            raise
        finally:
            with contextlib.suppress(ValueError):  # handlers belong to the main thread
                signal.signal(signal.SIGINT, handler)

    def _how_to_go_on(self) -> str:
        folders = step_folders(self.run_dir / CHECKPOINTS)
        if not folders:
            return "no step has been saved"
        return f"{folders[-1].name.replace('=', ' ')} is saved: go on with swarmtune resume={self.run_dir}"

    def _finish(self, trainer: Trainer, module: LightningModule, data: LightningDataModule, after: float | None) -> dict[str, Any]:
        """Export the adapter, draw, summarise."""
        adapter_dir = self.run_dir / ADAPTER
        save_adapter(module, adapter_dir, _companions(data))
        for each in trainer.loggers:
            each.save()
        losses = self.meter.val_losses
        before = losses[0][1] if losses and losses[0][0] == 0 else None
        summary = self._summary(module) | {
            "val_loss_before": before,
            "val_loss_after": after,
            **self._meaning(module, data, before, after),
            "steps": trainer.global_step,
            "adapter_dir": str(adapter_dir),
            "run_dir": str(self.run_dir),
            "loss_curve": self._draw(),
        }
        write_json(self.run_dir / SUMMARY, summary)
        return summary

    def _meaning(self, module: LightningModule, data: LightningDataModule, before: float | None, after: float | None) -> dict[str, Any]:
        """What the losses mean: perplexities, or, of a classifier, its accuracy and its classes."""
        if not isinstance(module, ClassifierModule):
            return {"val_ppl_before": _finite_exp(before), "val_ppl_after": _finite_exp(after)}
        seen = self.meter.val_accuracies
        return {
            "val_ppl_before": None,
            "val_ppl_after": None,
            "val_accuracy_before": seen[0][1] if seen and before is not None else None,
            "val_accuracy_after": seen[-1][1] if seen and after is not None else None,
            "labels": getattr(data, "labels", None),
        }

    def _summary(self, module: LightningModule) -> dict[str, Any]:
        """What was trained, and what it took."""
        trainable = trainable_parameters(module)
        totals = self.meter.totals()
        path = resolve_path(self.config.model.path)
        servers: dict[str, dict[str, float]] = {}
        for name, value in totals.items():
            if name.startswith("server/"):
                _, label, quantity = name.split("/")
                servers.setdefault(label, {})[quantity] = round(value, 3)
        return {
            "recipe": self.config.title,
            "model": path,
            "trainable_params": trainable,
            "total_params": count_parameters(path) + trainable,
            "tokens_per_s": round(self.meter.tokens_per_s, 1),
            "seconds": round(totals["time/wall_s"], 3),
            "seconds_to_first_step": None if self.meter.first_step_s is None else round(self.meter.first_step_s, 3),
            "seconds_training": round(totals["time/train_s"], 3),
            "seconds_waiting_for_swarm": round(totals["time/swarm_s"], 3),
            "bytes_up": int(totals["bytes_up"]),
            "bytes_down": int(totals["bytes_down"]),
            "bytes_up_per_step": self.meter.step_bytes_up // max(1, module.trainer.global_step),
            "bytes_down_per_step": self.meter.step_bytes_down // max(1, module.trainer.global_step),
            "retries": int(totals["retries"]),
            "events": {name.removeprefix("events/"): round(value, 3) for name, value in totals.items() if name.startswith("events/") and value},
            "swarm": self.swarm.fingerprint(),
            "servers": servers,
        }

    def _draw(self) -> str | None:
        if not self.config.callbacks.loss_curve or not (self.run_dir / METRICS).exists():
            return None
        from swarmtune.train.plot import draw_loss_curve

        path, metrics = self.run_dir / "loss.png", self.run_dir / METRICS
        train = [(step + 1, loss) for step, loss in read_curve(metrics, "train_loss")]
        # A validation after the last saved step of a run that was broken off stands in the file alone.
        held_out = {step + 1: loss for step, loss in read_curve(metrics, "val_loss") if step > 0} | dict(self.meter.val_losses)
        draw_loss_curve(path, train, sorted(held_out.items()), f"{self.config.title} on {Path(resolve_path(self.config.model.path)).name}")
        return str(path)


def trainable_parameters(module: LightningModule) -> int:
    """How many parameters learn."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _companions(data: LightningDataModule) -> dict[str, str]:
    """Files that belong beside the adapter, of data that have some."""
    give = getattr(data, "companions", None)
    return dict(give()) if give is not None else {}


def _finite_exp(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _validate(trainer: Trainer, module: LightningModule, data: LightningDataModule, meter: Meter) -> float | None:
    """The validation loss now; ``None`` where the Trainer is told not to validate."""
    seen = list(meter.val_losses)
    trainer.validate(module, datamodule=data, verbose=False)
    return meter.val_losses[-1][1] if meter.val_losses != seen else None


def build_trainer(
    config: Config,
    run_dir: Path,
    meter: Meter,
    loggers: list[Any],
    facts: Mapping[str, Any],
    companions: Mapping[str, str],
    swarm: swarmtune.Swarm | None = None,
) -> Trainer:
    """The Trainer, with our loggers and callbacks.

    Args:
        config: of the run.
        run_dir: where checkpoints go.
        meter: measures the run.
        loggers: where metrics go.
        facts: what checkpoints keep, for a resumed run to compare.
        companions: files that belong beside an adapter, as text by name.
        swarm: says what goes on and what goes wrong.

    Raises:
        UsageError: a combination of flags that Lightning refuses.
    """
    flags = dict(config.trainer)
    if isinstance(flags.get("val_check_interval"), float) and flags.get("check_val_every_n_epoch") is None:
        flags["check_val_every_n_epoch"] = 1  # a fraction is one of an epoch
    callbacks: list[Callback] = [meter]
    if swarm is not None:
        callbacks.append(EventsFile(run_dir / EVENTS, swarm.events, lambda: meter.before))
    if flags.get("enable_progress_bar") is None:
        flags["enable_progress_bar"] = False  # ours is shown instead
        callbacks += _progress(config, meter, swarm)
    if flags.setdefault("enable_checkpointing", True):
        every, kept = config.callbacks.checkpoint_every_steps, config.callbacks.checkpoints_kept
        callbacks.append(AdapterCheckpoint(run_dir / CHECKPOINTS, every, kept, facts, companions))
    if swarm is not None and config.swarm.codec is not Codec.NONE:
        callbacks.append(CodecGuard(swarm.exactly, config.swarm.codec.value, lambda sentence: say(config, sentence)))
    callbacks.append(StopBetweenSteps(lambda sentence: say(config, sentence)))
    flags.setdefault("enable_model_summary", False)
    try:
        return Trainer(**flags, callbacks=callbacks, logger=loggers, default_root_dir=run_dir)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error


def _progress(config: Config, meter: Meter, swarm: swarmtune.Swarm | None) -> list[Any]:
    kind, console = config.callbacks.progress, Console()
    if kind is ProgressKind.NONE:
        return []
    bar = kind is ProgressKind.BAR or (kind is ProgressKind.AUTO and console.is_terminal)
    statuses = swarm.status if swarm is not None else lambda: ()
    return [ProgressDisplay(meter, console, bar=bar, line_every_s=config.callbacks.line_every_s, statuses=statuses)]
