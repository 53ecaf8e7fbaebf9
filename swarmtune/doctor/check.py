"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from swarmtune.notices import printable


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
        for field in fields(self):
            if field.name != "status":
                object.__setattr__(self, field.name, printable(getattr(self, field.name)))
