"""How far loading is: a bar on a terminal, lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LINE_EVERY_S = 2.0


@contextmanager
def loading(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of loading blocks; call what this gives with the blocks loaded and the blocks to load."""
    began, count = time.monotonic(), 0

    def remember(show: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            nonlocal count
            count = done
            show(done, total)

        return progress

    with _bar(what) if sys.stderr.isatty() else _lines() as show:
        yield remember(show)
    seconds = max(time.monotonic() - began, 1e-6)
    logger.info("%s loaded in %.1f s (%.1f blocks/s)", what, seconds, count / seconds)


@contextmanager
def _lines() -> Iterator[Callable[[int, int], None]]:
    began = said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= LINE_EVERY_S or done == total:
            said, rate = now, done / max(now - began, 1e-6)
            logger.info("loaded block %d of %d, %.1f blocks/s, %.0f s left", done, total, rate, (total - done) / rate)

    yield progress


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began = time.monotonic()
    rate = TextColumn("{task.fields[rate]:.1f} blocks/s")
    columns = [TextColumn("loading {task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate=0.0)
        yield lambda done, total: bar.update(task, completed=done, total=total, rate=done / max(time.monotonic() - began, 1e-6))
