"""Where metrics go: always ``metrics.csv``, on request Weights & Biases and TensorBoard."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from swarmtune.errors import UsageError
from swarmtune.schema import LoggerConfig
from swarmtune.train.metrics_file import MetricsFile

logger = logging.getLogger(__name__)
METRICS = "metrics.csv"
ARTIFACT_WAIT_S = 120
WANDB_WAIT_S = 45


def make_loggers(
    config: LoggerConfig,
    run_dir: Path,
    *,
    names: Mapping[str, Any],
    keep_below: int = 0,
    wandb_id: str | None = None,
    say: Callable[[str], None],
) -> list[Logger]:
    """The loggers of a run.

    Args:
        config: which.
        run_dir: where their files go.
        names: for W&B: the default ``name``, ``group`` and ``tags``, and the resolved ``config``.
        keep_below: rows of this step and later are written again by a resumed run.
        wandb_id: of the W&B run to go on with.
        say: tells the user a sentence.

    Raises:
        UsageError: a logger is not installed, or refuses.
    """
    loggers: list[Logger] = [MetricsFile(run_dir / METRICS, keep_below)]
    if config.wandb:
        loggers.append(_wandb_logger(config, run_dir, names, wandb_id, say))
    if config.tensorboard:
        loggers.append(_tensorboard_logger(run_dir))
    return loggers


def _tensorboard_logger(run_dir: Path) -> Logger:
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("logger=tensorboard needs the package tensorboard: pip install swarmtune[tensorboard]")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(run_dir, name="tensorboard", version="", default_hp_metric=False)


def _wandb_logger(config: LoggerConfig, run_dir: Path, names: Mapping[str, Any], wandb_id: str | None, say: Callable[[str], None]) -> Logger:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE") or ("online" if has_login(wandb.setup().settings.base_url) else "offline")
    if mode == "offline" and "WANDB_MODE" not in os.environ:
        say("W&B: there is no login here, so the run is kept offline; wandb login, then wandb sync, uploads it")
    try:
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or names["name"],
            group=config.group or names["group"],
            tags=[*dict.fromkeys([*names["tags"], *config.tags])],
            config=dict(names["config"]),
            dir=run_dir,
            id=wandb_id,
            resume="allow",
            settings=wandb.Settings(init_timeout=WANDB_WAIT_S),
            mode="online" if mode in ("online", "run") else "disabled" if mode == "disabled" else "offline",
        )
    except wandb.errors.Error as error:
        raise UsageError(f"logger=wandb: {str(error).splitlines()[0]} (WANDB_MODE=offline works without a network)") from error
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=run, log_model=False)


def has_login(base_url: str) -> bool:
    """Whether W&B has a key for this server, in the environment or in the netrc file; nobody is asked for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            return netrc.netrc(path).authenticators(urllib.parse.urlsplit(base_url).hostname or "") is not None
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def wandb_run(loggers: Sequence[Logger]) -> Any:
    """The W&B run among ``loggers``, or ``None``."""
    from lightning.pytorch.loggers import WandbLogger

    return next((each.experiment for each in loggers if isinstance(each, WandbLogger)), None)


def publish(loggers: Sequence[Logger], summary: Mapping[str, Any]) -> None:
    """Hand the end of a run to W&B: the summary, the picture of the loss, and when online the adapter as an artifact."""
    run = wandb_run(loggers)
    if run is None:
        return
    import wandb

    run.summary.update({name: value for name, value in summary.items() if value is not None})
    if summary.get("loss_curve"):
        run.log({"loss_curve": wandb.Image(summary["loss_curve"])})
    if run.offline or run.disabled:
        return
    artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter", metadata={"recipe": summary["recipe"], "model": summary["model"]})
    artifact.add_dir(summary["adapter_dir"])
    try:
        run.log_artifact(artifact).wait(ARTIFACT_WAIT_S)
    except (wandb.errors.Error, TimeoutError, ValueError) as error:
        logger.warning("W&B did not take the adapter (%s); it is in %s", str(error).splitlines()[0] if str(error) else error, summary["adapter_dir"])


def finish(loggers: Sequence[Logger], exit_code: int) -> None:
    """Close the W&B run, if there is one, so that the next run of this process gets its own."""
    run = wandb_run(loggers)
    if run is not None:
        run.finish(exit_code=exit_code)
