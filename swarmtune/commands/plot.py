"""``swarmtune plot``: pictures of runs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from swarmtune.errors import SwarmtuneError, UsageError

if TYPE_CHECKING:
    from swarmtune.plotting.runs import Run

PICTURE, PAGE = "plot.png", "plot.html"
MAX_RUNS = 60
OTHER_FORMATS = (".svg", ".pdf", ".jpg", ".jpeg", ".htm", ".webp")


class _Parser(argparse.ArgumentParser):
    """Wrong words become a ``UsageError``, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"plot: {message}; swarmtune plot --help says what there is")


@dataclass(frozen=True, slots=True)
class Targets:
    """Where to write; ``None`` for what is not wanted."""

    picture: Path | None
    page: Path | None


def main(words: list[str]) -> int:
    """Draw the runs that ``words`` name, as a picture and a page.

    Returns:
        The exit code 0.

    Raises:
        UsageError: a word, a run directory or a file in it is wrong, or the output cannot be written.
    """
    options = parser().parse_args(words)
    from swarmtune.plotting.comparison import compare
    from swarmtune.plotting.curves import Axis
    from swarmtune.plotting.figure import draw_runs
    from swarmtune.plotting.page import page_of_runs

    runs = _read(options.runs)
    shown = compare(runs, Axis(options.x))
    picture = draw_runs(shown)
    page = page_of_runs(shown, picture).encode()
    targets = choose_targets(options.out, runs)
    if targets.picture is not None:
        _write_whole(targets.picture, picture)
    if targets.page is not None:
        _write_whole(targets.page, page)
    return 0


def parser() -> argparse.ArgumentParser:
    """What the verb takes."""
    made = _Parser(prog="swarmtune plot", description="Draw loss, perplexity, tokens/s, traffic and where the time went.", allow_abbrev=False)
    made.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or a directory of runs; several are drawn in the same panels")
    place = f"a directory for {PICTURE} and {PAGE}, or one file, .png or .html (default: the run directory; for several runs, here)"
    made.add_argument("--out", metavar="DIR|FILE", help=place)
    made.add_argument("--x", choices=("step", "tokens", "time"), default="step", help="what runs along x (default: step)")
    return made


def _read(words: list[str]) -> list[Run]:
    """The runs, those without any measurement left out with a notice.

    Raises:
        UsageError: none is left.
    """
    from swarmtune.plotting.runs import METRICS, find_runs, read_run

    paths = find_runs(words)
    if len(paths) > MAX_RUNS:
        raise UsageError(f"plot compares at most {MAX_RUNS} runs, got {len(paths)}; name fewer")
    runs, empty = [], []
    for path in paths:
        run = read_run(path)
        if run is None:
            empty.append(str(path))
        else:
            runs.append(run)
    if not runs:
        raise UsageError(f"there is nothing to draw yet: no loss stands in {METRICS} of {', '.join(empty)}")
    for name in empty:
        print(f"swarmtune: left out {name}: no loss stands in its {METRICS} yet", file=sys.stderr)
    return runs


def choose_targets(out: str | None, runs: list[Run]) -> Targets:
    """Where ``--out`` says to write, its directory made.

    Raises:
        UsageError: a format that is not drawn, or a directory that cannot be made.
    """
    if out is None:
        folder = runs[0].path if len(runs) == 1 else Path()
        return Targets(folder / PICTURE, folder / PAGE)
    path = Path(out)
    suffix = path.suffix.lower()
    if suffix in OTHER_FORMATS and not path.is_dir():
        raise UsageError(f"--out must be a directory, or a file that ends in .png or .html, got {out}")
    is_file = suffix in (".png", ".html") and not path.is_dir()
    folder = path.parent if is_file else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: {folder} cannot be made: {error.strerror}") from error
    if not is_file:
        return Targets(folder / PICTURE, folder / PAGE)
    return Targets(path, None) if suffix == ".png" else Targets(None, path)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and say where."""
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        os.replace(name, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; --out names another place") from error
    finally:
        if name is not None and os.path.exists(name):
            os.unlink(name)
    print(path)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SwarmtuneError as problem:
        print(f"swarmtune: {problem}", file=sys.stderr)
        sys.exit(2)
