"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

MAX_TEXT = 1500


class Status(StrEnum):
    """How a check ended. Only ``FAILED`` makes the command fail."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. Its texts may quote strangers: what cannot be printed is replaced at birth.

    Attributes:
        name: what was checked.
        found: what was found.
        advice: what to do; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        for field in fields(self)[2:]:
            object.__setattr__(self, field.name, printable(getattr(self, field.name)))
        object.__setattr__(self, "name", printable(self.name))


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """``text`` on one line without control characters, cut at ``limit``: nothing in it can move a cursor or colour a terminal."""
    line = "".join(character if character.isprintable() else " " for character in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"
