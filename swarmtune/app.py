"""The one training path that every recipe shares.

Servers start first, and the heavy libraries are imported while they load. Then: connect, build, validate, fit, validate, export, draw, summarise.
Everything that was started is stopped, however the run ends.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import swarmtune
from swarmtune.config import resolve_path, save_yaml, to_plain
from swarmtune.data_schema import Source
from swarmtune.errors import UsageError
from swarmtune.model_files import count_blocks
from swarmtune.notices import say
from swarmtune.own_recipe import load_build
from swarmtune.schema import Config, SwarmKind
from swarmtune.startup import without_collecting
from swarmtune.train.run_dir import CONFIG, HISTORY, locked, new_run_dir, writing
from swarmtune.types import BlockSpan, gaps

if TYPE_CHECKING:
    from swarmtune.train.run import Build

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
            with writing(run_dir):
                save_yaml(config, run_dir / CONFIG)
        found = (lambda: list(peers)) if peers is not None else stack.enter_context(initial_peers(config, spans, run_dir / "servers"))
        swarm = stack.enter_context(_connect(config, found(), run_dir))
        _import_heavy()
        from swarmtune.train.run import Run

        build = load_recipe(config.recipe)
        return Run(config, run_dir, swarm, build, started=started, resumed=resume is not None, group=group or config.title).run()


def check_trainer(config: Config) -> None:
    """Let Lightning check unusual flags before anything starts.

    Raises:
        UsageError: what it says.
    """
    if config.trainer.keys() - PLAIN_FLAGS or config.trainer.get("precision") != "32-true" or config.trainer.get("accelerator") != "auto":
        try_trainer(config.trainer)


def _connect(config: Config, peers: list[str], run_dir: Path) -> swarmtune.Swarm:
    options = config.swarm
    return swarmtune.connect(
        peers,
        micro_batch_tokens=options.micro_batch_tokens,
        max_in_flight=options.max_in_flight,
        in_flight_gib=options.in_flight_gib,
        pipeline=options.pipeline.value,
        lanes=options.lanes,
        compile=options.compile.value,
        patience_s=options.patience_s,
        call_timeout_s=options.call_timeout_s,
        chaining=options.chaining,
        copies=options.copies.value,
        codec=options.codec.value,
        grad_codec=options.grad_codec.value if options.grad_codec is not None else None,
        history=run_dir / HISTORY if options.history else None,
    )


# --- the swarm ---------------------------------------------------------------------------------------------------------------


@contextmanager
def initial_peers(config: Config, spans: list[str], log_dir: Path) -> Iterator[Callable[[], list[str]]]:
    """Start the bundled servers, if the config asks for them; what is given waits until they are ready and names them.

    Between the two the heavy libraries are imported, so that nobody waits for anybody. Asked again, it starts servers that have died since.
    """
    if config.swarm.kind is SwarmKind.JOIN:
        say(config, f"connecting to {len(config.swarm.initial_peers)} initial peer(s), for up to {config.swarm.patience_s:.0f} s")
        yield lambda: list(config.swarm.initial_peers)
        return
    path = resolve_path(config.model.path)
    say(config, f"starting {len(spans)} server{'s' if len(spans) > 1 else ''} of {Path(path).name}, blocks {', '.join(spans)}")
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


def _import_heavy() -> None:
    with without_collecting():
        for name in ("lightning", "peft", "swarmtune.train.run", "swarmtune.train.data", "swarmtune.transport.hivemind"):
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


def load_recipe(name: str) -> Build:
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
