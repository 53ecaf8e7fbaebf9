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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import swarmtune
from swarmtune.config import resolve_path, save_yaml, to_plain
from swarmtune.errors import UsageError
from swarmtune.schema import Config, ProgressKind, SwarmKind
from swarmtune.types import BlockSpan, gaps

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from swarmtune.train.callbacks import Meter

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


def train(config: Config, started: float | None = None) -> dict[str, Any]:
    """Run a recipe from start to end.

    Args:
        config: a checked configuration, from ``swarmtune.config.load_config``.
        started: ``time.monotonic()`` at which the user began to wait; now, if not given.

    Returns:
        What ``summary.json`` in the run directory holds.

    Raises:
        UsageError: something the user gave is wrong.
        SwarmError: the swarm cannot do what was asked.
        NonFinite: the loss or a gradient became NaN or infinite.
        KeyboardInterrupt: Ctrl-C; its argument says where the adapter so far was saved.
    """
    started = time.monotonic() if started is None else started
    spans = server_spans(config, resolve_path(config.model.path)) if config.swarm.kind is SwarmKind.LOCAL else []
    if config.trainer.keys() - PLAIN_FLAGS or config.trainer.get("precision") != "32-true" or config.trainer.get("accelerator") != "auto":
        try_trainer(config.trainer)
    run_dir = make_run_dir(config)
    save_yaml(config, run_dir / "config.yaml")
    with ExitStack() as stack:
        peers = stack.enter_context(_initial_peers(config, spans, run_dir))
        return _fit(config, run_dir, stack.enter_context(_connect(config, peers())), started)


def _connect(config: Config, peers: list[str]) -> swarmtune.Swarm:
    options = config.swarm
    return swarmtune.connect(
        peers,
        micro_batch_tokens=options.micro_batch_tokens,
        max_in_flight=options.max_in_flight,
        patience_s=options.patience_s,
        codec=options.codec.value,
    )


def _fit(config: Config, run_dir: Path, swarm: swarmtune.Swarm, started: float) -> dict[str, Any]:
    """Build, validate, fit, validate, export; the swarm is up."""
    from lightning import seed_everything

    from swarmtune.train.callbacks import Meter

    seed_everything(config.seed, workers=True, verbose=False)
    module, data = load_recipe(config.recipe)(config, swarm)
    meter = Meter(swarm.traffic, started)
    trainer = build_trainer(config, run_dir, meter)
    _say(config, f"ready after {time.monotonic() - started:.0f} s; {trainable_parameters(module):,} parameters learn")
    with _interruptible(trainer, module, run_dir):
        before = _validate(trainer, module, data, meter)
        trainer.fit(module, datamodule=data)
        steps = trainer.global_step
        after = meter.val_losses[-1][1] if meter.val_losses and meter.val_losses[-1][0] == steps > 0 else _validate(trainer, module, data, meter)

    adapter_dir = run_dir / "adapter"
    _adapter(module).save_pretrained(adapter_dir)
    summary = _summary(config, module, meter) | {
        "val_loss_before": before,
        "val_loss_after": after,
        "val_ppl_before": _finite_exp(before),
        "val_ppl_after": _finite_exp(after),
        "steps": steps,
        "adapter_dir": str(adapter_dir),
        "run_dir": str(run_dir),
        "loss_curve": _draw(config, run_dir, meter),
        "seconds": round(time.monotonic() - started, 3),
    }
    write_json(run_dir / "summary.json", summary)
    return summary


def _summary(config: Config, module: LightningModule, meter: Meter) -> dict[str, Any]:
    """What was trained, and what it took."""
    trainable = trainable_parameters(module)
    traffic = meter.traffic()
    path = resolve_path(config.model.path)
    return {
        "recipe": config.recipe,
        "model": path,
        "trainable_params": trainable,
        "total_params": count_parameters(path) + trainable,
        "tokens_per_s": round(meter.tokens_per_s, 1),
        "seconds_to_first_step": None if meter.first_step_s is None else round(meter.first_step_s, 3),
        "bytes_up": traffic.bytes_up,
        "bytes_down": traffic.bytes_down,
        "retries": traffic.retries,
    }


def trainable_parameters(module: LightningModule) -> int:
    """How many parameters learn."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _adapter(module: LightningModule) -> Any:
    return module.model.adapter  # type: ignore[union-attr]


def _finite_exp(loss: float | None) -> float | None:
    return math.exp(loss) if loss is not None and loss < 700 else None


def _validate(trainer: Trainer, module: LightningModule, data: LightningDataModule, meter: Meter) -> float | None:
    """The validation loss now; ``None`` where the Trainer is told not to validate."""
    seen = len(meter.val_losses)
    trainer.validate(module, datamodule=data, verbose=False)
    return meter.val_losses[-1][1] if len(meter.val_losses) > seen else None


def _draw(config: Config, run_dir: Path, meter: Meter) -> str | None:
    if not config.callbacks.loss_curve:
        return None
    from swarmtune.train.plot import draw_loss_curve

    path = run_dir / "loss.png"
    draw_loss_curve(path, meter.train_losses, meter.val_losses, f"{config.recipe} on {Path(resolve_path(config.model.path)).name}")
    return str(path)


@contextmanager
def _interruptible(trainer: Trainer, module: LightningModule, run_dir: Path) -> Iterator[None]:
    """Turn Lightning's ``sys.exit`` at Ctrl-C back into a ``KeyboardInterrupt``, with the adapter so far saved."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, SystemExit) and trainer.state.status != "interrupted":
            raise
        _adapter(module).save_pretrained(run_dir / "adapter")
        raise KeyboardInterrupt(f"interrupted at step {trainer.global_step}; the adapter so far is in {run_dir / 'adapter'}") from error
    finally:
        with contextlib.suppress(ValueError):  # handlers belong to the main thread
            signal.signal(signal.SIGINT, handler)


# --- the swarm ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _initial_peers(config: Config, spans: list[str], run_dir: Path) -> Iterator[Callable[[], list[str]]]:
    """Start the bundled servers, if the config asks for them; what is given waits until they are ready and names them.

    Between the two the heavy libraries are imported, so that nobody waits for anybody.
    """
    if config.swarm.kind is SwarmKind.JOIN:
        _say(config, f"connecting to {len(config.swarm.initial_peers)} peers, for up to {config.swarm.patience_s:.0f} s")
        yield lambda: list(config.swarm.initial_peers)
        return
    path = resolve_path(config.model.path)
    _say(config, f"starting {len(spans)} server{'s' if len(spans) > 1 else ''} of {Path(path).name}, blocks {', '.join(spans)}")
    with ExitStack() as stack:
        threads = config.swarm.threads or max(1, (os.cpu_count() or 1) // len(spans))
        local = swarmtune.LocalSwarm(
            path, spans=spans, dtype=config.swarm.dtype.value, quantize=config.swarm.quantize.value, threads=threads, log_dir=run_dir / "servers"
        ).start()
        stack.callback(local.close)
        _import_heavy()

        def ready() -> list[str]:
            return stack.enter_context(local).initial_peers

        yield ready


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


# --- the recipe and the Trainer ----------------------------------------------------------------------------------------------


def load_recipe(name: str) -> Callable[[Config, swarmtune.Swarm], tuple[LightningModule, LightningDataModule]]:
    """``recipes/<name>.py: build``.

    Raises:
        UsageError: there is no such file, or it has no ``build``.
    """
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


def build_trainer(config: Config, run_dir: Path, meter: Meter) -> Trainer:
    """The Trainer, with our loggers and callbacks.

    Raises:
        UsageError: a combination of flags that Lightning refuses.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback

    from swarmtune.train.callbacks import AdapterCheckpoint

    flags = dict(config.trainer)
    if isinstance(flags.get("val_check_interval"), float) and flags.get("check_val_every_n_epoch") is None:
        flags["check_val_every_n_epoch"] = 1  # a fraction is one of an epoch
    callbacks: list[Callback] = [meter]
    if flags.get("enable_progress_bar") is None:
        flags["enable_progress_bar"] = False  # ours is shown instead
        callbacks += _progress(config, meter)
    if flags.setdefault("enable_checkpointing", True):
        callbacks.append(AdapterCheckpoint(run_dir / "checkpoints", config.callbacks.checkpoint_every_steps, config.callbacks.checkpoints_kept))
    flags.setdefault("enable_model_summary", False)
    try:
        return Trainer(**flags, callbacks=callbacks, logger=_loggers(config, run_dir), default_root_dir=run_dir)
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


def _loggers(config: Config, run_dir: Path) -> list[Any]:
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

    loggers: list[Any] = [CSVLogger(run_dir, name="csv", version="")]
    if config.logger.wandb:
        offline = os.environ.get("WANDB_MODE") == "offline"
        import wandb

        try:
            loggers.append(WandbLogger(project=config.logger.project, name=run_dir.name, save_dir=run_dir, offline=offline, log_model=False))
            assert loggers[-1].experiment is not None
        except wandb.errors.Error as error:
            raise UsageError(f"logger=wandb: {str(error).splitlines()[0]} (set WANDB_MODE=offline, or run: wandb login)") from error
    return loggers


# --- files -------------------------------------------------------------------------------------------------------------------


def make_run_dir(config: Config) -> Path:
    """The directory of this run, made: ``run_dir`` or ``runs/<recipe>/<time>``.

    Raises:
        UsageError: it holds another run already, or cannot be made.
    """
    if config.run_dir is None:
        base = Path("runs") / config.recipe / time.strftime("%Y-%m-%d_%H-%M-%S")
        found = base
        for again in range(2, sys.maxsize):
            if not found.exists():
                break
            found = base.with_name(f"{base.name}_{again}")
    else:
        found = Path(config.run_dir)
    found = found.absolute()
    if any((found / name).exists() for name in ("summary.json", "checkpoints", "adapter")):
        raise UsageError(f"run_dir: {found} already holds a run; give another directory, or none")
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"run_dir: {found} cannot be made: {error.strerror}") from error
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(to_plain(values), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)
