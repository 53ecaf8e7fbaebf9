"""What was planned and what was accepted: each micro-batch's blocks run forward once and backward once in a pass, whatever died meanwhile.

The ledger holds the chain to it while it runs, and writes a history where asked: one JSON object a line, which ``swarmtune.remote.verdict`` judges.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from swarmtune.errors import NotExact, UsageError
from swarmtune.types import BlockSpan

logger = logging.getLogger(__name__)
Way = Literal["forward", "backward"]


class Ledger:
    """Opens a page for each body call. A page is kept by whoever may still need its backward."""

    def __init__(self, history: History | None = None) -> None:
        self._history = history
        self._numbers = itertools.count()

    def open(self, micro: Sequence[tuple[int, int]], blocks: int) -> Page:
        """Plan a body call: its micro-batches as first row and rows, each for blocks ``0:blocks``."""
        page = Page(next(self._numbers), len(micro), blocks, self._history)
        page.write("plan", "forward", micro=[list(rows) for rows in micro], blocks=blocks)
        return page

    def close(self) -> None:
        """End the history."""
        if self._history is not None:
            self._history.close()


class Page:
    """One body call: which blocks of which micro-batch have been accepted.

    A forward and a backward may be under way at the same time; what runs forward again only for its boundaries belongs to the backward that needs it.

    Attributes:
        step: number of the body call, from 0 in each connection.
    """

    def __init__(self, step: int, micro: int, blocks: int, history: History | None) -> None:
        self.step = step
        self._micro, self._blocks, self._history = micro, blocks, history
        self._backwards = 0
        self._tries = itertools.count()
        self._sides: dict[int, Way] = {}
        self._accepted: dict[Way, list[list[BlockSpan]]] = {}

    @property
    def silent(self) -> bool:
        """Whether nothing is written."""
        return self._history is None

    def begin(self, way: Way, lowest: int = 0) -> None:
        """A forward, or one more backward, down to block ``lowest`` at least."""
        self._accepted[way] = [[] for _ in range(self._micro)]
        self._backwards += way == "backward"
        self.write("begin", way, way=way, lowest=lowest)

    def ask(self, micro: int, way: Way, span: BlockSpan, peer: str, within_s: float, replay: bool) -> int:
        """Somebody is asked; returns the number of this try."""
        number = next(self._tries)
        self._sides[number] = side = "backward" if replay else way
        if self._history is not None:
            blocks = [span.start, span.stop]
            self.write("ask", side, micro=micro, way=way, span=blocks, peer=peer, within_s=within_s, replay=replay, number=number)
        return number

    def fail(self, number: int, why: str) -> None:
        """A try came to nothing."""
        self.write("fail", self._sides[number], number=number, why=why[:300])

    def accept(self, number: int, micro: int, span: BlockSpan, replay: bool) -> None:
        """An answer is going to be used.

        Raises:
            NotExact: blocks of it have been accepted before in this pass, which would count them twice.
        """
        side = self._sides[number]
        self.write("accept", side, number=number)
        if replay:
            return
        accepted = self._accepted[side][micro]
        twice = next((old for old in accepted if old.overlap(span)), None)
        if twice is not None:
            raise NotExact(f"blocks {span} of micro-batch {micro} of call {self.step} were about to be counted twice, {twice} had been accepted")
        accepted.append(span)

    def end(self, way: Way, lowest: int = 0) -> None:
        """Everything that was planned is there.

        Raises:
            NotExact: it is not.
        """
        for micro, spans in enumerate(self._accepted[way]):
            position = self._blocks
            for span in sorted(spans, reverse=True):
                if span.stop == position:
                    position = span.start
            if position > lowest or sum(map(len, spans)) != self._blocks - position:
                raise NotExact(f"the {way} of micro-batch {micro} of call {self.step} lacks blocks {lowest}:{position}")
        self.write("end", way, way=way, lowest=lowest)

    def give_up(self, way: Way, why: str) -> None:
        """This pass ends without a result; nothing of it is used."""
        self.write("give up", way, way=way, why=why[:300])

    def write(self, event: str, side: Way, **fields: Any) -> None:
        """One line of the history, which belongs to the forward or to the latest backward."""
        if self._history is not None:
            self._history.write({"event": event, "step": self.step, "pass": self._backwards if side == "backward" else 0, "lane": 0, **fields})


class History:
    """A file of JSON lines that only grows, so it survives the death of its writer up to the last whole line."""

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.monotonic) -> None:
        """Open ``path`` for appending.

        Raises:
            UsageError: it cannot be written.
        """
        self._clock = clock
        try:
            torn = Path(path).exists() and Path(path).read_bytes()[-1:] not in (b"", b"\n")
            self._file = open(Path(path), "a", encoding="utf-8", buffering=1)  # noqa: SIM115  # open as long as the connection
        except OSError as error:
            raise UsageError(f"the history cannot be written to {os.fspath(path)}: {error.strerror or error}") from error
        if torn:  # its last writer was killed
            self._file.write("\n")
        self.write({"event": "open", "pid": os.getpid(), "at": time.time()})

    def write(self, fields: dict[str, Any]) -> None:
        """Append one line; after the end it is dropped. A disk that is full ends the history, not the run."""
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps({"t": round(self._clock(), 6), **fields}, separators=(",", ":")) + "\n")
        except OSError as error:
            logger.warning("the history ends here, because it could not be written: %s", error.strerror or error)
            with contextlib.suppress(OSError):
                self._file.close()

    def close(self) -> None:
        """Say that nothing more comes, and close the file. Safe to repeat."""
        self.write({"event": "close"})
        self._file.close()
