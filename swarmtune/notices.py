"""What a command prints of swarmtune's own warnings: one readable line each, whatever a peer has put into it."""

from __future__ import annotations

import logging
import sys

from swarmtune.schema import Config, ProgressKind


def printable(text: str, limit: int = 1500) -> str:
    """``text`` on one line without control characters, cut at ``limit``: nothing in it can move a cursor or colour a terminal."""
    line = "".join(character if character.isprintable() else " " for character in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def say(config: Config, line: str) -> None:
    """Tell the user of a run a line, unless the configuration asks for silence."""
    if config.callbacks.progress is not ProgressKind.NONE:
        print(line, flush=True)


def show_warnings() -> None:
    """Print warnings and errors of swarmtune's loggers to the standard error of a command. Safe to repeat."""
    logger = logging.getLogger("swarmtune")
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        handler = _StandardError(logging.WARNING)
        handler.setFormatter(_OneLine())
        logger.addHandler(handler)
        logger.propagate = False  # a library that configures the root logger would print each line twice


class _StandardError(logging.Handler):
    """Writes to what ``sys.stderr`` is at that moment: a progress bar replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(self.format(record), file=sys.stderr, flush=True)


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's text; a traceback of ours may follow."""
        level = "error" if record.levelno >= logging.ERROR else "warning"  # libraries rename the levels
        return f"swarmtune: {level}: {printable(record.message)}"
