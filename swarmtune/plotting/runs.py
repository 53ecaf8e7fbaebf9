"""What a run directory says: ``metrics.csv`` as columns, the configuration, the summary.

Everything in these files is material from outside: a cell that is not a number is an error with its place, text is text.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmtune.conversion import flat_keys
from swarmtune.errors import UsageError

METRICS, CONFIG, SUMMARY = "metrics.csv", "config.yaml", "summary.json"
SERVER_TOTALS = ("network_s", "queue_s", "compute_s", "bytes_up", "bytes_down", "calls", "failures")
"""The columns ``server/<label>/<total>``, each a total since the start of the run."""
TRAIN_COLUMNS = ("train_loss", "tokens_per_s", "tokens", "time/train_s", "bytes_up", "bytes_down")
"""What is kept of every training step; it may stand in several rows of that step."""
ALONG_X = ("tokens", "time/train_s")
"""Those of them that a curve may run along, so that they have no gaps: the last value holds."""
GAP = math.nan
LARGEST = 1e30
"""What lies beyond is no measurement, and more than can be drawn: it is a gap, as what is not finite is."""


def _column() -> array[float]:
    return array("d")


@dataclass(frozen=True, slots=True)
class TrainRows:
    """Logged training steps, one entry each; NaN where a cell is empty. Seconds, tokens and bytes are totals.

    ``step`` counts finished optimizer steps, as checkpoints do; the file numbers steps from 0.
    """

    step: array[float] = field(default_factory=_column)
    seconds: array[float] = field(default_factory=_column)
    tokens: array[float] = field(default_factory=_column)
    loss: array[float] = field(default_factory=_column)
    tokens_per_s: array[float] = field(default_factory=_column)
    bytes_up: array[float] = field(default_factory=_column)
    bytes_down: array[float] = field(default_factory=_column)

    def columns(self) -> tuple[array[float], ...]:
        """All of them, for what is done to whole rows."""
        return self.step, self.seconds, self.tokens, self.loss, self.tokens_per_s, self.bytes_up, self.bytes_down


@dataclass(frozen=True, slots=True)
class ValRows:
    """Validations, one entry each; ``train_rows`` is how many training rows stood before."""

    step: array[float] = field(default_factory=_column)
    seconds: array[float] = field(default_factory=_column)
    tokens: array[float] = field(default_factory=_column)
    loss: array[float] = field(default_factory=_column)
    perplexity: array[float] = field(default_factory=_column)
    accuracy: array[float] = field(default_factory=_column)
    train_rows: array[float] = field(default_factory=_column)

    def columns(self) -> tuple[array[float], ...]:
        """All of them, for what is done to whole rows."""
        return self.step, self.seconds, self.tokens, self.loss, self.perplexity, self.accuracy, self.train_rows


@dataclass(frozen=True, slots=True)
class ServerTotals:
    """What one server did for a run; ``None`` where it was not logged."""

    label: str
    network_s: float | None = None
    queue_s: float | None = None
    compute_s: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    calls: float | None = None
    failures: float | None = None

    @property
    def seconds(self) -> float:
        """Network, queue and compute together."""
        return (self.network_s or 0.0) + (self.queue_s or 0.0) + (self.compute_s or 0.0)


@dataclass(frozen=True, slots=True)
class Run:
    """One run as its files tell it.

    ``config`` is flat (``optimizer.lr``), ``summary`` is ``None`` while the run is unfinished. Totals are ``None`` where they were not logged.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    train: TrainRows
    val: ValRows
    servers: tuple[ServerTotals, ...]
    wall_s: float | None
    train_s: float | None
    swarm_s: float | None
    bytes_up: float | None
    bytes_down: float | None
    retries: float | None
    tokens_counted: bool
    """Whether the file counts tokens; otherwise they are estimated from speed and time."""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary is not None

    @property
    def title(self) -> str:
        """Recipe and model, or the directory where the configuration does not say."""
        recipe, model = self.config.get("recipe"), self.config.get("model.path")
        name = f"{recipe} on {Path(str(model)).name}" if recipe and model else self.path.name
        return name if self.finished else f"{name} (unfinished)"


# --- finding -----------------------------------------------------------------------------------------------------------------


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run directories that ``paths`` name: each is a run, or a directory whose children are runs. Each run once, in order.

    Raises:
        UsageError: one is neither.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        for run in _runs_in(path):
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UsageError(f"{path} is not a run directory: there is {'a file' if path.exists() else 'nothing'} of this name")
    if (path / METRICS).is_file():
        return [path]
    if (path / CONFIG).is_file():
        raise UsageError(f"{path} has no {METRICS} yet: nothing was logged; plot it once training has begun")
    children = sorted((child for child in path.iterdir() if (child / METRICS).is_file()), key=lambda child: _natural(child.name))
    if not children:
        raise UsageError(f"{path} is not a run directory: neither it nor a directory in it has a {METRICS}")
    return children


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts ``run-9`` before ``run-10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# --- reading -----------------------------------------------------------------------------------------------------------------


def read_run(path: Path) -> Run | None:
    """Everything that is known about the run in ``path``; ``None`` when no loss was logged yet.

    In an unfinished run a last line without its newline is still being written and is left out. Where a resumed run goes back to an earlier
    step, what was logged from that step on before is dropped.

    Raises:
        UsageError: a file cannot be read, or a cell is not a number.
    """
    summary = _read_summary(path / SUMMARY)
    reader = _MetricsReader(path / METRICS)
    reader.read(complete=summary is not None)
    if not len(reader.train.step) and not len(reader.val.step):
        return None
    total = reader.total
    servers = tuple(ServerTotals(label, **{name: total(f"server/{label}/{name}") for name in SERVER_TOTALS}) for label in reader.server_labels)
    return Run(
        path=path,
        config=_read_config(path / CONFIG),
        summary=summary,
        train=reader.train,
        val=reader.val,
        servers=servers,
        wall_s=total("time/wall_s"),
        train_s=total("time/train_s"),
        swarm_s=total("time/swarm_s"),
        bytes_up=total("bytes_up"),
        bytes_down=total("bytes_down"),
        retries=total("retries"),
        tokens_counted=reader.tokens_counted,
    )


class _MetricsReader:
    """Reads ``metrics.csv`` row by row; what is kept grows by some eight numbers per row, whatever the number of columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.train, self.val = TrainRows(), ValRows()
        self.server_labels: list[str] = []
        self.tokens_counted = False
        self._places: dict[str, int] = {}
        self._totals: dict[str, tuple[str, int]] = {}
        self._seconds = self._tokens = 0.0
        self._pending: dict[str, float] = {}
        self._pending_step = GAP

    def read(self, *, complete: bool) -> None:
        """Fill ``train``, ``val`` and the totals; unless the file is ``complete``, a last line without its newline is left out."""
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = csv.reader(file if complete else _whole_lines(file), strict=True)
                header = next(rows, None)
                if header is None:
                    return
                self._read_header(header)
                totals = [(name, place) for name, place in self._places.items() if "/" in name or name in ("bytes_up", "bytes_down", "retries")]
                for row in rows:
                    if len(row) != len(header):
                        raise UsageError(f"{self.path}, line {rows.line_num}: the header has {len(header)} columns, this row has {len(row)}")
                    for name, place in totals:
                        if row[place]:
                            self._totals[name] = row[place], rows.line_num
                    self._take(row, rows.line_num)
                self._end_step()
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UsageError(f"{self.path} cannot be read as CSV: {error}") from error

    def _read_header(self, header: list[str]) -> None:
        self._places = {name: place for place, name in enumerate(header)}
        if "step" not in self._places or not {"train_loss", "val_loss"} & self._places.keys():
            raise UsageError(
                f"{self.path} is not the metrics of a run: its header needs step and train_loss or val_loss, got {','.join(header)[:200]!r}"
            )
        if len(self._places) != len(header):
            raise UsageError(f"{self.path}: a column occurs twice in the header")
        labels = (name.removeprefix("server/").rpartition("/") for name in header if name.startswith("server/"))
        self.server_labels = list(dict.fromkeys(label for label, _, total in labels if label and total in SERVER_TOTALS))
        self.tokens_counted = "tokens" in self._places

    def _take(self, row: list[str], line: int) -> None:
        cells = {name: self._cell(row, name, line) for name in TRAIN_COLUMNS}
        found = {name: value for name, value in cells.items() if value is not None and not (name in ALONG_X and math.isnan(value))}
        val_loss = self._cell(row, "val_loss", line)
        if not found and val_loss is None:
            return
        step = self._cell(row, "step", line)
        if step is None:
            raise UsageError(f"{self.path}, line {line}: the column step is empty")
        if math.isnan(step):
            raise UsageError(f"{self.path}, line {line}, column step: expected the number of a step, got {row[self._places['step']][:80]!r}")
        if found:
            if step + 1 != self._pending_step or found.keys() & self._pending.keys():
                self._end_step()
            self._pending_step = step + 1
            self._pending |= found
        if val_loss is not None:
            self._end_step()
            self._take_validation(row, line, step, val_loss)

    def _take_validation(self, row: list[str], line: int, step: float, val_loss: float) -> None:
        untrained = step == 0 and not len(self.train.step) and not len(self.val.step)
        done = 0 if untrained else step + 1
        if len(self.train.step) and done < self.train.step[-1]:
            return  # a resumed run that looks again before it begins says step 0
        meanings = (self._cell(row, name, line) for name in ("val_ppl", "val_accuracy"))
        measured = (GAP if value is None else value for value in meanings)
        _append(self.val.columns(), (done, self._seconds, self._tokens, val_loss, *measured, len(self.train.step)))

    def _end_step(self) -> None:
        """Keep what stood in the rows of one training step."""
        found, step = self._pending, self._pending_step
        self._pending = {}
        if not found:
            return
        if "train_loss" in found and len(self.train.step) and step <= self.train.step[-1]:
            self._rewind(step)
        seconds = found.get("time/train_s", self._seconds)
        if self.tokens_counted:
            self._tokens = found.get("tokens", self._tokens)
        else:
            self._tokens += max(seconds - self._seconds, 0.0) * found.get("tokens_per_s", 0.0)
        self._seconds = seconds
        if "train_loss" in found:
            cells = (found.get(name, GAP) for name in ("train_loss", "tokens_per_s", "bytes_up", "bytes_down"))
            _append(self.train.columns(), (step, self._seconds, self._tokens, *cells))

    def _rewind(self, step: float) -> None:
        """Drop what was logged at ``step`` and later."""
        while len(self.train.step) and self.train.step[-1] >= step:
            for column in self.train.columns():
                column.pop()
        while len(self.val.step) and self.val.step[-1] >= step:
            for column in self.val.columns():
                column.pop()
        self._seconds = self.train.seconds[-1] if len(self.train.step) else 0.0
        self._tokens = self.train.tokens[-1] if len(self.train.step) else 0.0

    def _cell(self, row: list[str], name: str, line: int) -> float | None:
        place = self._places.get(name)
        if place is None or not row[place]:
            return None
        value = self._number(row[place], name, line)
        return value if abs(value) <= LARGEST else GAP

    def _number(self, text: str, name: str, line: int) -> float:
        try:
            return float(text)
        except ValueError as error:
            raise UsageError(f"{self.path}, line {line}, column {name}: expected a number, got {text[:80]!r}") from error

    def total(self, name: str) -> float | None:
        """The last value of a column of totals, ``None`` where it has none or is not finite or too large to be one."""
        if name not in self._totals:
            return None
        value = self._number(self._totals[name][0], name, self._totals[name][1])
        return value if abs(value) <= LARGEST else None


def _append(columns: Sequence[array[float]], values: Sequence[float]) -> None:
    for column, value in zip(columns, values, strict=True):
        column.append(value)


def _whole_lines(file: Iterator[str]) -> Iterator[str]:
    return (line for line in file if line.endswith(("\n", "\r")))


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration, flat; empty where there is none."""
    import yaml

    if not path.is_file():
        return {}
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold the keys of a configuration, got {str(values)[:80]!r}")
    return dict(flat_keys(values))


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold an object, got {str(values)[:80]!r}")
    return values


# --- telling runs apart ------------------------------------------------------------------------------------------------------

UNSAID = ("run_dir",)
"""Keys that differ between any two runs."""
INCIDENTAL = ("logger.", "callbacks.")
"""Keys that change what is shown, not what is trained: in the table, not in a run's name."""
MAX_KEYS_IN_NAME = 3
MAX_VALUE_CHARS = 28


def differing_keys(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The keys in whose value the configurations differ, and that value for each run."""
    keys = dict.fromkeys(itertools.chain.from_iterable(run.config for run in runs))
    values = {key: [_show(run.config[key]) if key in run.config else "unset" for run in runs] for key in keys if key not in UNSAID}
    return {key: shown for key, shown in values.items() if len(set(shown)) > 1}


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def name_runs(runs: Sequence[Run]) -> list[str]:
    """A short name for each run, no two the same: what differs between the configurations, otherwise the directory's name."""
    differing = {key: values for key, values in differing_keys(runs).items() if not key.startswith(INCIDENTAL)}
    if 0 < len(differing) <= MAX_KEYS_IN_NAME:
        names = [", ".join(f"{key}={_clip(values[index])}" for key, values in differing.items()) for index in range(len(runs))]
    else:
        names = [run.path.resolve().name for run in runs]
    more: tuple[Callable[[Run], str], ...] = (lambda run: run.path.resolve().name, lambda run: str(run.path))
    for tell in more:
        if len(set(names)) == len(names):
            break
        names = [name if names.count(name) == 1 else f"{name} ({tell(run)})" for name, run in zip(names, runs, strict=True)]
    return [name if run.finished else f"{name} (unfinished)" for name, run in zip(names, runs, strict=True)]


def _clip(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else f"…{text[-MAX_VALUE_CHARS + 1 :]}"
