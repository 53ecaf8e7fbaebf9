"""``resume=RUN|auto``: which run to go on with, and whether what is asked for is still that run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarmtune.config import check_config, differing_keys, load_config, load_saved
from swarmtune.errors import UsageError
from swarmtune.schema import Config
from swarmtune.train.run_dir import CONFIG, SUMMARY, check_unfinished, unfinished_runs

FREE = (
    *("run_dir", "name", "logger.", "callbacks.", "data.num_workers", "data.cache"),
    *(
        "swarm.kind",
        "swarm.initial_peers",
        "swarm.patience_s",
        "swarm.call_timeout_s",
        "swarm.chaining",
        "swarm.copies",
        "swarm.history",
        "swarm.servers",
        "swarm.spans",
        "swarm.threads",
        "swarm.max_in_flight",
        "swarm.in_flight_gib",
    ),
)
"""Keys that a resumed run may change: they decide where and how it runs, not what it computes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to train.

    Attributes:
        run_dir: of the run to go on with; ``None`` for a new run.
        finished: there is nothing left to do.
    """

    config: Config
    run_dir: Path | None
    finished: bool = False


def plan_run(words: Sequence[str], say: Callable[[str], None] = print) -> Plan:
    """Read the words of a training command, ``resume=`` among them.

    Args:
        words: such as ``recipe=lora_bloom resume=auto``.
        say: tells the user why a run is passed over.

    Raises:
        UsageError: anything wrong with a word, no such run, or a run that another configuration began.
    """
    values = [word.partition("=")[2].strip("'\"") for word in words if word.partition("=")[0] == "resume"]
    rest = [word for word in words if word.partition("=")[0] != "resume"]
    if not values or values == ["null"]:
        return Plan(load_config(rest), None)
    if len(values) > 1 or not values[0]:
        raise UsageError("resume must be one run directory, or auto")
    if values[0] == "auto":
        return _automatic(rest, say)
    run_dir = check_unfinished(values[0])
    saved = load_saved(run_dir / CONFIG)
    named = any(word.partition("=")[0] == "recipe" for word in rest)
    config = load_config(rest) if named else load_saved(run_dir / CONFIG, rest)
    check_config(config, adapter_given=False)
    if config.run_dir is not None and any(word.partition("=")[0] == "run_dir" for word in rest) and Path(config.run_dir).absolute() != run_dir:
        raise UsageError(f"resume: a run goes on in its own directory, {run_dir}: leave out run_dir")
    if other := deciding_keys(saved, config):
        raise UsageError(f"resume: the run {run_dir} began with another {', '.join(other[:5])}: leave it as it was, or start a new run")
    return Plan(config, run_dir)


def _automatic(words: list[str], say: Callable[[str], None]) -> Plan:
    """The latest interrupted run of this very configuration, or a new one."""
    config = load_config(words)
    if config.run_dir is not None:
        if not (Path(config.run_dir) / CONFIG).is_file():
            return Plan(config, None)
        candidates = [Path(config.run_dir).absolute()]
    else:
        candidates = unfinished_runs(config.title)
    for folder in candidates:
        try:
            other = deciding_keys(load_saved(folder / CONFIG), config)
        except UsageError as error:
            say(f"not resuming {folder}: {error}")
            continue
        if not other:
            return Plan(config, folder, finished=(folder / SUMMARY).exists())
        if config.run_dir is not None:
            raise UsageError(f"resume: the run {folder} began with another {', '.join(other[:5])}: leave it as it was, or give another run_dir")
        say(f"not resuming {folder}, which began with another {', '.join(other[:5])}")
    return Plan(config, None)


def deciding_keys(saved: Config, config: Config) -> list[str]:
    """Full keys in which two configurations of one run differ, of those that decide its result."""
    return [key for key in differing_keys(saved, config) if not key.startswith(FREE)]
