"""The one training path that every recipe shares.

Servers start first, and the heavy libraries are imported while they load. Then: connect, build, validate, fit, validate, export, draw, summarise.
Everything that was started is stopped, however the run ends.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import swarmtune
from swarmtune.config import resolve_path, save_yaml, to_plain
from swarmtune.errors import SwarmtuneError, UsageError
from swarmtune.files import write_json
from swarmtune.own_recipe import load_build
from swarmtune.schema import Config, ProgressKind, Source, SwarmKind
from swarmtune.train.run_dir import ADAPTER, CHECKPOINTS, CONFIG, FACTS, SUMMARY, locked, new_run_dir, read_facts
from swarmtune.types import BlockSpan, gaps

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from swarmtune.train.callbacks import Meter
    from swarmtune.train.checkpoint import SavedState

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Where a config.json says how many blocks the model has."""


PLAIN_FLAGS = frozenset(
    (
        "accelerator",
        "devices",
        "max_epochs",
        "max_steps",
        "precision",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "val_check_interval",
        "check_val_every_n_epoch",
        "num_sanity_val_steps",
        "log_every_n_steps",
        "limit_train_batches",
        "limit_val_batches",
        "fast_dev_run",
    )
)
"""Trainer flags whose values are checked without asking Lightning, which takes seconds to import."""


def train(
    config: Config, started: float | None = None, *, resume: Path | None = None, peers: Sequence[str] | None = None, group: str | None = None
) -> dict[str, Any]:
    """Run a recipe from start to end.

    Args:
        config: a checked configuration, from ``swarmtune.config.load_config``.
        started: ``time.monotonic()`` at which the user began to wait; now, if not given.
        resume: directory of an interrupted run of this configuration, to go on with.
        peers: addresses of servers that are up already, instead of starting or joining what the config says.
        group: of this run in W&B, unless the config names one.

    Returns:
        What ``summary.json`` in the run directory holds.

    Raises:
        UsageError: something the user gave is wrong.
        SwarmError: the swarm cannot do what was asked.
        NonFinite: the loss or a gradient became NaN or infinite.
        KeyboardInterrupt: Ctrl-C or SIGTERM; its argument says how to go on.
    """
    started = time.monotonic() if started is None else started
    spans = server_spans(config, resolve_path(config.model.path)) if config.swarm.kind is SwarmKind.LOCAL and peers is None else []
    check_trainer(config)
    check_data(config)
    run_dir = new_run_dir(config.run_dir, config.title) if resume is None else resume
    with locked(run_dir), ExitStack() as stack:
        if resume is None:
            save_yaml(config, run_dir / CONFIG)
        found = (lambda: list(peers)) if peers is not None else stack.enter_context(initial_peers(config, spans, run_dir / "servers"))
        swarm = stack.enter_context(_connect(config, found()))
        return _Run(config, run_dir, swarm, started, resume is not None, group or config.title).run()


def check_trainer(config: Config) -> None:
    """Let Lightning check unusual flags before anything starts.

    Raises:
        UsageError: what it says.
    """
    if config.trainer.keys() - PLAIN_FLAGS or config.trainer.get("precision") != "32-true" or config.trainer.get("accelerator") != "auto":
        try_trainer(config.trainer)


def _connect(config: Config, peers: list[str]) -> swarmtune.Swarm:
    options = config.swarm
    return swarmtune.connect(
        peers,
        micro_batch_tokens=options.micro_batch_tokens,
        max_in_flight=options.max_in_flight,
        patience_s=options.patience_s,
        codec=options.codec.value,
    )


class _Run:
    """One run whose swarm is up: build, validate, fit, validate, export."""

    def __init__(self, config: Config, run_dir: Path, swarm: swarmtune.Swarm, started: float, resumed: bool, group: str) -> None:
        from swarmtune.train.callbacks import Meter

        self.config, self.run_dir, self.swarm, self.started = config, run_dir, swarm, started
        self.resumed, self.group = resumed, group
        self.meter = Meter(swarm.traffic, started)

    def run(self) -> dict[str, Any]:
        """From start to end; see ``train``."""
        from lightning import seed_everything

        from swarmtune.train.checkpoint import newest_checkpoint
        from swarmtune.train.loggers import finish, publish

        seed_everything(self.config.seed, workers=True, verbose=False)
        module, data = load_recipe(self.config.recipe)(self.config, self.swarm)
        saved = newest_checkpoint(self.run_dir / CHECKPOINTS) if self.resumed else None
        if self.resumed:
            _say(
                self.config,
                f"going on with {self.run_dir} " + (f"after step {saved.step}" if saved else "from its start: it has no whole checkpoint"),
            )
        loggers = self._loggers(saved.step if saved else 0)
        code = 1
        try:
            trainer = build_trainer(self.config, self.run_dir, self.meter, loggers, self._facts(data))
            waited_s = time.monotonic() - self.started
            _say(self.config, f"ready after {waited_s:.0f} s; {trainable_parameters(module):,} parameters learn")
            with self._breaking_off(trainer):
                after = self._fit(trainer, module, data, saved)
            summary = self._finish(trainer, module, after)
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
        from swarmtune.train.loggers import make_loggers, wandb_run

        kind = str(self.config.adapter.get("peft_type", "saved adapter"))
        model = Path(resolve_path(self.config.model.path)).name
        names = {
            "name": f"{self.config.title}-{model}-{self.run_dir.name}",
            "group": self.group,
            "tags": [self.config.title, model, kind.lower()],
            "config": to_plain(self.config),
        }
        before = read_facts(self.run_dir) if self.resumed else {}
        loggers = make_loggers(
            self.config.logger,
            self.run_dir,
            names=names,
            keep_below=keep_below,
            wandb_id=before.get("wandb_id"),
            say=lambda sentence: _say(self.config, sentence),
        )
        run = wandb_run(loggers)
        write_json(self.run_dir / FACTS, before | ({"wandb_id": run.id} if run is not None else {}))
        return loggers

    def _facts(self, data: LightningDataModule) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the same run."""
        facts = dict(self.swarm.fingerprint())
        fingerprint = getattr(data, "fingerprint", None)
        return facts | ({"data": fingerprint()} if fingerprint is not None else {})

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
        from swarmtune.train.checkpoint import step_folders

        folders = step_folders(self.run_dir / CHECKPOINTS)
        if not folders:
            return "no step has been saved"
        return f"{folders[-1].name.replace('=', ' ')} is saved: go on with swarmtune resume={self.run_dir}"

    def _finish(self, trainer: Trainer, module: LightningModule, after: float | None) -> dict[str, Any]:
        """Export the adapter, draw, summarise."""
        adapter_dir = self.run_dir / ADAPTER
        _adapter(module).save_pretrained(adapter_dir)
        for each in trainer.loggers:
            each.save()
        losses = self.meter.val_losses
        before = losses[0][1] if losses and losses[0][0] == 0 else None
        summary = self._summary(module) | {
            "val_loss_before": before,
            "val_loss_after": after,
            "val_ppl_before": _finite_exp(before),
            "val_ppl_after": _finite_exp(after),
            "steps": trainer.global_step,
            "adapter_dir": str(adapter_dir),
            "run_dir": str(self.run_dir),
            "loss_curve": self._draw(),
        }
        write_json(self.run_dir / SUMMARY, summary)
        return summary

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
            "retries": int(totals["retries"]),
            "servers": servers,
        }

    def _draw(self) -> str | None:
        from swarmtune.train.loggers import METRICS

        if not self.config.callbacks.loss_curve or not (self.run_dir / METRICS).exists():
            return None
        from swarmtune.train.metrics_file import read_curve
        from swarmtune.train.plot import draw_loss_curve

        path, metrics = self.run_dir / "loss.png", self.run_dir / METRICS
        train = [(step + 1, loss) for step, loss in read_curve(metrics, "train_loss")]
        draw_loss_curve(path, train, self.meter.val_losses, f"{self.config.title} on {Path(resolve_path(self.config.model.path)).name}")
        return str(path)


def trainable_parameters(module: LightningModule) -> int:
    """How many parameters learn."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _adapter(module: LightningModule) -> Any:
    return module.model.adapter  # type: ignore[union-attr]


def _finite_exp(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _validate(trainer: Trainer, module: LightningModule, data: LightningDataModule, meter: Meter) -> float | None:
    """The validation loss now; ``None`` where the Trainer is told not to validate."""
    seen = list(meter.val_losses)
    trainer.validate(module, datamodule=data, verbose=False)
    return meter.val_losses[-1][1] if meter.val_losses != seen else None


# --- the swarm ---------------------------------------------------------------------------------------------------------------


@contextmanager
def initial_peers(config: Config, spans: list[str], log_dir: Path) -> Iterator[Callable[[], list[str]]]:
    """Start the bundled servers, if the config asks for them; what is given waits until they are ready and names them.

    Between the two the heavy libraries are imported, so that nobody waits for anybody. Asked again, it starts servers that have died since.
    """
    if config.swarm.kind is SwarmKind.JOIN:
        _say(config, f"connecting to {len(config.swarm.initial_peers)} peers, for up to {config.swarm.patience_s:.0f} s")
        yield lambda: list(config.swarm.initial_peers)
        return
    path = resolve_path(config.model.path)
    _say(config, f"starting {len(spans)} server{'s' if len(spans) > 1 else ''} of {Path(path).name}, blocks {', '.join(spans)}")
    local = swarmtune.LocalSwarm(
        path,
        spans=spans,
        dtype=config.swarm.dtype.value,
        quantize=config.swarm.quantize.value,
        threads=config.swarm.threads or max(1, (os.cpu_count() or 1) // len(spans)),
        log_dir=log_dir,
    )
    try:
        local.start()
        _import_heavy()
        local.wait_ready()

        def ready() -> list[str]:
            for server in local.servers:
                if not server.alive:
                    server.restart()
            return local.initial_peers

        yield ready
    finally:
        local.close()


def _say(config: Config, line: str) -> None:
    if config.callbacks.progress is not ProgressKind.NONE:
        print(line, flush=True)


def _import_heavy() -> None:
    for name in ("lightning", "peft", "swarmtune.train.callbacks", "swarmtune.train.data"):
        importlib.import_module(name)


def server_spans(config: Config, path: str) -> list[str]:
    """The blocks of each bundled server.

    Raises:
        UsageError: more servers than blocks, or a span outside the model.
    """
    blocks = count_blocks(path)
    if config.swarm.spans is not None:
        for span in config.swarm.spans:
            if BlockSpan.parse(span).stop > blocks:
                raise UsageError(f"swarm.spans: {span} reaches outside the model, which has blocks 0:{blocks}")
        missing = gaps([BlockSpan.parse(span) for span in config.swarm.spans], blocks)
        if missing:
            raise UsageError(f"nobody serves blocks {', '.join(map(str, missing))} of 0:{blocks}: swarm.spans must cover every block")
        return list(config.swarm.spans)
    servers = config.swarm.servers
    if servers > blocks:
        raise UsageError(f"swarm.servers must be at most {blocks}, the number of blocks of {path}, got {servers}")
    edges = [round(index * blocks / servers) for index in range(servers + 1)]
    return [f"{start}:{stop}" for start, stop in itertools.pairwise(edges)]


def count_blocks(path: str) -> int:
    """How many blocks a model has, from its config.json; imports nothing heavy for a local directory.

    Raises:
        UsageError: there is no config.json, or it names no number of layers.
    """
    found = Path(path) / "config.json"
    if not Path(path).is_dir():
        import huggingface_hub

        try:
            found = Path(huggingface_hub.hf_hub_download(path, "config.json"))
        except (OSError, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            raise UsageError(f"model {path}: no such directory here, and the hub did not give its config.json: {detail}") from error
    if not found.is_file():
        raise UsageError(f"model {path}: there is no config.json in this directory")
    try:
        values = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"model {path}: its config.json cannot be read: {error}") from error
    for key in LAYER_COUNT_KEYS:
        if isinstance(values.get(key), int):
            return int(values[key])
    raise UsageError(f"model {path}: its config.json has none of {', '.join(LAYER_COUNT_KEYS)}")


def count_parameters(path: str) -> int:
    """Parameters of the whole model, tied ones once; counted on the meta device, nothing is loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return sum(parameter.numel() for parameter in model.parameters())


def check_data(config: Config) -> None:
    """Look for missing data, splits and columns before anything starts, as far as that is cheap.

    Raises:
        UsageError: what is missing, and what is there.
    """
    if config.data.source is Source.PYTHON_TOPICS:
        return  # nothing can be missing
    from swarmtune.train.sources import SOURCE_KEYS, make_sources

    keys = to_plain(config.data)
    for source in make_sources(**{name: keys[name] for name in SOURCE_KEYS}):
        if source is not None:
            source.check()


# --- the recipe and the Trainer ----------------------------------------------------------------------------------------------


def load_recipe(name: str) -> Callable[[Config, swarmtune.Swarm], tuple[LightningModule, LightningDataModule]]:
    """``recipes/<name>.py: build``, or that of a Python file of the user's own.

    Raises:
        UsageError: there is no such file, or it has no ``build``.
    """
    if name.endswith(".py"):
        return load_build(Path(name))
    try:
        build = importlib.import_module(f"recipes.{name}").build
    except ModuleNotFoundError as error:
        if error.name not in ("recipes", f"recipes.{name}"):
            raise
        raise UsageError(f"conf/recipe/{name}.yaml has no recipes/{name}.py beside it") from error
    except AttributeError as error:
        raise UsageError(f"recipes/{name}.py needs a function build(config, swarm)") from error
    return build


def try_trainer(flags: Mapping[str, Any]) -> None:
    """Let Lightning check unusual flags before anything starts.

    Raises:
        UsageError: what it says.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    try:
        Trainer(**{**flags, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False})
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error


def build_trainer(config: Config, run_dir: Path, meter: Meter, loggers: list[Any], facts: Mapping[str, Any]) -> Trainer:
    """The Trainer, with our loggers and callbacks.

    Args:
        config: of the run.
        run_dir: where checkpoints go.
        meter: measures the run.
        loggers: where metrics go.
        facts: what checkpoints keep, for a resumed run to compare.

    Raises:
        UsageError: a combination of flags that Lightning refuses.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback

    from swarmtune.train.checkpoint import AdapterCheckpoint
    from swarmtune.train.interrupt import StopBetweenSteps

    flags = dict(config.trainer)
    if isinstance(flags.get("val_check_interval"), float) and flags.get("check_val_every_n_epoch") is None:
        flags["check_val_every_n_epoch"] = 1  # a fraction is one of an epoch
    callbacks: list[Callback] = [meter]
    if flags.get("enable_progress_bar") is None:
        flags["enable_progress_bar"] = False  # ours is shown instead
        callbacks += _progress(config, meter)
    if flags.setdefault("enable_checkpointing", True):
        callbacks.append(AdapterCheckpoint(run_dir / CHECKPOINTS, config.callbacks.checkpoint_every_steps, config.callbacks.checkpoints_kept, facts))
    callbacks.append(StopBetweenSteps(lambda sentence: _say(config, sentence)))
    flags.setdefault("enable_model_summary", False)
    try:
        return Trainer(**flags, callbacks=callbacks, logger=loggers, default_root_dir=run_dir)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UsageError(f"trainer: {' '.join(str(error).split())}") from error


def _progress(config: Config, meter: Meter) -> list[Any]:
    from rich.console import Console

    from swarmtune.train.callbacks import ProgressDisplay

    kind, console = config.callbacks.progress, Console()
    if kind is ProgressKind.NONE:
        return []
    bar = kind is ProgressKind.BAR or (kind is ProgressKind.AUTO and console.is_terminal)
    return [ProgressDisplay(meter, console, bar=bar, line_every_s=config.callbacks.line_every_s)]
