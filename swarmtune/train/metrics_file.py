"""``metrics.csv``: Lightning's CSV logger starts a file anew on every run and keeps up to a hundred rows in memory; a resumed run needs its rows."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from swarmtune.files import write_text

logger = logging.getLogger(__name__)
FLUSH_EVERY_ROWS = 20


class MetricsFile(Logger):
    """Rows of metrics, appended to ``metrics.csv``; a new column rewrites the file, whole or not at all.

    A disk that is full costs rows later, not the run: they are kept in memory, and written when there is room again.

    Args:
        path: the file.
        keep_below: rows of this step and later are dropped from a file that is already there, because a resumed run writes them again.
    """

    def __init__(self, path: Path, keep_below: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._warned = False
        self._last: dict[str, Any] = {}
        if path.exists():
            self._take_over(keep_below)

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They stand in ``config.yaml``."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row, or more to the last row where that is of the same step and still waits."""
        row = {"step": step, **{name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}}
        if self._waiting and self._waiting[-1]["step"] == step:
            self._waiting[-1].update(row)
            return
        if step == self._last.get("step"):  # Lightning repeats a validation that stood behind the checkpoint of a resumed run
            row = {"step": step} | {name: value for name, value in row.items() if name not in self._last}
            if len(row) == 1:
                return
        if len(self._waiting) >= FLUSH_EVERY_ROWS:
            self.save()
        self._waiting.append(row)

    def save(self) -> None:
        """Write the rows that wait."""
        if not self._waiting:
            return
        new = sorted({name for row in self._waiting for name in row} - set(self._columns), key=lambda name: (name != "step", name))
        try:
            if new:
                columns = self._columns + new
                write_text(self.path, _as_csv(columns, [*self._read(), *self._waiting], header=True))
                self._columns = columns
            else:
                _append(self.path, _as_csv(self._columns, self._waiting, header=False))
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written (%s); its rows are kept in memory until it can", self.path, error.strerror)
            self._warned = True
            return
        self._waiting.clear()

    def finalize(self, status: str) -> None:
        """Write what waits."""
        self.save()

    def _read(self) -> list[dict[str, str]]:
        """The rows in the file; the last one may have been cut by the death of a process, and is left out then."""
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row and None not in row.values()]

    def _take_over(self, keep_below: int) -> None:
        rows = [row for row in self._read() if row.get("step", "").isdigit() and int(row["step"]) < keep_below]
        self._columns = list(rows[0]) if rows else []
        for row in rows:
            if int(row["step"]) == int(rows[-1]["step"]):
                self._last |= {name: value for name, value in row.items() if value != ""} | {"step": int(row["step"])}
        write_text(self.path, _as_csv(self._columns, rows, header=True) if rows else "")


def read_curve(path: Path, column: str) -> list[tuple[int, float]]:
    """Step and value of every row of ``metrics.csv`` that has a value in ``column``."""
    with open(path, encoding="utf-8", newline="") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def _append(path: Path, text: str) -> None:
    """Append all of ``text`` or nothing."""
    with open(path, "ab", buffering=0) as file:  # a buffer would try again on closing, after the cut
        size, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            os.truncate(path, size)
            raise


def _as_csv(columns: list[str], rows: list[Any], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
