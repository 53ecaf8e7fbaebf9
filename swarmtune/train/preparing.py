"""How the preparing of data is shown: nothing while it is short, then a bar on a terminal or a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

QUIET_S = 2.0
"""What takes less than this is not shown."""
CHECK_EVERY_S = 0.1
"""Time between two looks at whether something should be shown."""
Advance = Callable[[int], None]
"""Told how much more is done."""


class Preparing:
    """Shows one phase after another.

    Args:
        console: where; ``None`` shows nothing.
        bar: a bar instead of lines.
        line_every_s: time between lines.
        quiet_s: what is shorter stays unseen.
    """

    def __init__(self, console: Console | None = None, *, bar: bool = False, line_every_s: float = 5.0, quiet_s: float = QUIET_S) -> None:
        self.console, self.bar, self.line_every_s, self.quiet_s = console, bar, line_every_s, quiet_s

    @contextmanager
    def phase(self, name: str, unit: str, total: int | None = None) -> Iterator[Advance]:
        """Show ``name`` until the block ends; what is given takes how many more ``unit`` are done.

        ``total`` is how many there are, where that is known: then the time left is shown too.
        """
        shown = _Phase(self, name, unit, total)
        try:
            yield shown.advance
        finally:
            shown.close()


class _Phase:
    """One phase, shown from the moment it has lasted ``quiet_s``."""

    def __init__(self, owner: Preparing, name: str, unit: str, total: int | None) -> None:
        self.owner, self.name, self.unit, self.total, self.done = owner, name, unit, total, 0
        self.began_at = self.looked_at = time.monotonic()
        self.shown_at = self.began_at + owner.quiet_s - owner.line_every_s
        self._bar: Progress | None = None

    def advance(self, more: int) -> None:
        self.done += more
        now, console = time.monotonic(), self.owner.console
        if console is None or now - self.looked_at < CHECK_EVERY_S or now - self.began_at < self.owner.quiet_s:
            return
        self.looked_at = now
        if self.owner.bar:
            self._bar = self._bar or self._new_bar(console)
            self._bar.update(self._bar.task_ids[0], completed=self.done, line=self._line(now))
        elif now - self.shown_at >= self.owner.line_every_s:
            self.shown_at = now
            console.print(f"{self.name}  {self._line(now)}", markup=False, highlight=False, soft_wrap=True)

    def _new_bar(self, console: Console) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(TextColumn(self.name), BarColumn(), TextColumn("{task.fields[line]}"), console=console, transient=True)
        bar.add_task(self.name, total=self.total, line="")
        bar.start()
        return bar

    def _line(self, now: float) -> str:
        rate = self.done / max(now - self.began_at, 1e-9)
        amount, left = f"{self.done / 1e6:,.1f} M {self.unit}", ""
        if self.total:
            seconds = round(max(self.total - self.done, 0) / max(rate, 1e-9))
            amount = f"{min(self.done / self.total, 1):.0%} of {self.total / 1e6:,.1f} M {self.unit}"
            left = f"  {seconds // 60}:{seconds % 60:02d} left"
        return f"{amount}  {rate / 1e6:,.2f} M/s{left}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
