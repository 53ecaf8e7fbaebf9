"""``swarmtune -m``: one run for every combination of values, over one swarm, and a table of results at the end."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from swarmtune import app
from swarmtune.config import expand_sweep, load_config, load_saved, resolve_path, to_plain
from swarmtune.errors import SwarmtuneError, UsageError
from swarmtune.files import write_json, write_text
from swarmtune.notices import printable
from swarmtune.resume import deciding_keys
from swarmtune.schema import Config, SwarmKind
from swarmtune.train.run_dir import CONFIG, ROOT, SUMMARY, locked

logger = logging.getLogger(__name__)
MAX_RUNS = 1000
SWARM_KEYS = ("kind", "initial_peers", "servers", "spans", "dtype", "threads", "quantize")
"""Runs that agree in these, and in the model, share their servers."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep.

    Attributes:
        words: the values that it takes of those that vary.
        config: of the run, its directory included.
    """

    words: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> Path:
        """Where it is written."""
        assert self.config.run_dir is not None
        return Path(self.config.run_dir)

    @property
    def servers(self) -> str:
        """What its servers must be, as one text."""
        swarm = to_plain(self.config.swarm)
        return json.dumps([resolve_path(self.config.model.path), {key: swarm.get(key) for key in SWARM_KEYS}])


def run_sweep(words: Sequence[str], started: float) -> int:
    """Run all combinations, one after the other; a run that fails is noted, and the next one begins.

    With ``resume=auto`` and the ``run_dir`` of an interrupted sweep, finished runs are kept and the others go on.

    Returns:
        0, or 1 if any run failed.

    Raises:
        UsageError: anything wrong with a word; nothing has been started then.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the table of what there is.
    """
    given = [word.partition("=")[2] for word in words if word.partition("=")[0] == "resume"]
    if given not in ([], ["auto"]):
        raise UsageError("a sweep takes resume=auto together with its run_dir, nothing else")
    resume = bool(given)
    trials = plan_sweep([word for word in words if word.partition("=")[0] != "resume"], resume)
    folder, results = trials[0].run_dir.parent, [_finished(trial) for trial in trials]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"run_dir: {folder} cannot be made: {error.strerror}") from error
    with locked(folder):
        print(f"{len(trials)} runs in {folder}", flush=True)
        _write(folder, trials, results)
        try:
            for group in _by_servers(trials):
                _run_group(group, trials, results, started)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted; go on with the same words, run_dir={folder} and resume=auto") from error
        finally:
            _report(folder, trials, results)
    return int(any(result is None or "error" in result for result in results))


def plan_sweep(words: Sequence[str], resume: bool = False) -> list[Trial]:
    """Every run of a sweep, checked.

    Raises:
        UsageError: anything wrong with a word.
    """
    combinations = expand_sweep(words)
    if len(combinations) > MAX_RUNS:
        raise UsageError(f"this sweep has {len(combinations)} runs; at most {MAX_RUNS} are done at once")
    first = load_config(combinations[0])
    if resume and first.run_dir is None:
        raise UsageError("a sweep takes resume=auto together with its run_dir=DIRECTORY")
    base = Path(first.run_dir or ROOT / first.title / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_sweep").absolute()
    if not resume and any(path.exists() for path in (base / "sweep.json", base / CONFIG, *(base / str(number) / CONFIG for number in range(10)))):
        raise UsageError(f"run_dir: {base} already holds runs; give another directory, or go on with a sweep: add resume=auto")
    varying = [index for index in range(len(combinations[0])) if len({combination[index] for combination in combinations}) > 1]
    width = len(str(len(combinations) - 1))
    trials = []
    for number, combination in enumerate(combinations):
        config = load_config([*(word for word in combination if word.partition("=")[0] != "run_dir"), f"run_dir={base / str(number).zfill(width)}"])
        app.check_trainer(config)
        trials.append(Trial(tuple(combination[index] for index in varying), config))
        _check_same(trials[-1])
    return trials


def _check_same(trial: Trial) -> None:
    """A directory that a run of an earlier sweep has left must be of this very run.

    Raises:
        UsageError: it began with other values.
    """
    if not (trial.run_dir / CONFIG).exists():
        return
    if other := deciding_keys(load_saved(trial.run_dir / CONFIG), trial.config):
        raise UsageError(f"resume: the run {trial.run_dir} began with another {', '.join(other[:5])}: repeat the sweep with the words that began it")


def _by_servers(trials: Sequence[Trial]) -> Iterator[list[int]]:
    """Numbers of the runs that can share servers, in order of the first of each."""
    groups: dict[str, list[int]] = {}
    for number, trial in enumerate(trials):
        groups.setdefault(trial.servers, []).append(number)
    yield from groups.values()


def _run_group(group: list[int], trials: Sequence[Trial], results: list[dict[str, Any] | None], started: float) -> None:
    waiting = [number for number in group if results[number] is None]
    if not waiting:
        return
    first = trials[waiting[0]]
    spans = app.server_spans(first.config, resolve_path(first.config.model.path)) if first.config.swarm.kind is SwarmKind.LOCAL else []
    folder = first.run_dir.parent
    with ExitStack() as stack:
        ready = stack.enter_context(app.initial_peers(first.config, spans, folder / f"servers-{group[0]}"))
        for number in waiting:
            trial = trials[number]
            print(f"\n[{number + 1}/{len(trials)}] {' '.join(trial.words) or 'as given'}", flush=True)
            try:
                results[number] = app.train(trial.config, started, resume=_interrupted(trial), peers=ready(), group=folder.name)
            except (SwarmtuneError, RuntimeError, OSError) as error:
                if not isinstance(error, SwarmtuneError):
                    logger.exception("an unexpected failure")
                print(f"failed: {printable(str(error))}", flush=True)
                results[number] = {"error": f"{type(error).__name__}: {error}" if not isinstance(error, SwarmtuneError) else str(error)}
            _write(folder, trials, results)
            started = time.monotonic()


def _interrupted(trial: Trial) -> Path | None:
    """The directory of a run that has begun."""
    return trial.run_dir if (trial.run_dir / CONFIG).exists() else None


def _finished(trial: Trial) -> dict[str, Any] | None:
    """What a finished run of an interrupted sweep gave."""
    path = trial.run_dir / SUMMARY
    if not path.exists():
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _report(folder: Path, trials: Sequence[Trial], results: Sequence[dict[str, Any] | None]) -> None:
    """Print the table, the best run marked, and write it as ``sweep.json`` and ``sweep.csv``."""
    keys = [word.partition("=")[0] for word in trials[0].words]
    losses = {number: result["val_loss_after"] for number, result in enumerate(results) if result and result.get("val_loss_after") is not None}
    best = min(losses, key=losses.__getitem__) if losses else None
    classifiers = any(result and result.get("val_accuracy_after") is not None for result in results)
    names = ["run", *keys, "val loss", "accuracy" if classifiers else "perplexity", "tok/s", "seconds", "state"]
    rows = [
        [trial.run_dir.name, *(word.partition("=")[2] for word in trial.words), *_figures(result, number == best)]
        for number, (trial, result) in enumerate(zip(trials, results, strict=True))
    ]
    table = Table(*map(escape, names))
    for number, row in enumerate(rows):
        table.add_row(*map(Text, row), style="bold" if number == best else None)
    Console().print(table)
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    write_text(folder / "sweep.csv", text.getvalue())
    print(f"table: {folder / 'sweep.csv'}")


def _write(folder: Path, trials: Sequence[Trial], results: Sequence[dict[str, Any] | None]) -> None:
    """What the sweep is and what it has given so far, in ``sweep.json``."""
    runs = [{"words": list(trial.words), "run_dir": str(trial.run_dir), "result": result} for trial, result in zip(trials, results, strict=True)]
    write_json(folder / "sweep.json", {"runs": runs})


def _figures(result: dict[str, Any] | None, best: bool) -> list[str]:
    if result is None:
        return ["", "", "", "", "not done"]
    if "error" in result:
        return ["", "", "", "", f"failed: {printable(result['error'], 60)}"]
    loss, perplexity, accuracy = result["val_loss_after"], result["val_ppl_after"], result.get("val_accuracy_after")
    return [
        "" if loss is None else f"{loss:.4f}",
        f"{accuracy:.1%}" if accuracy is not None else "" if perplexity is None else f"{perplexity:,.2f}",
        f"{result['tokens_per_s']:,.0f}",
        f"{result['seconds']:,.0f}",
        "best" if best else "done",
    ]
