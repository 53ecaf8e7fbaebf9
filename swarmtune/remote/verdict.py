"""Judges a history that a ledger wrote: lost, doubled, out of plan, over deadline, never ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmtune.errors import UsageError

MARGIN_S = 2.0
"""A try may outlive its deadline by so much: a busy machine is late to look at its clock."""


@dataclass(slots=True)
class Verdict:
    """What a history shows. Each list holds one sentence per finding.

    Attributes:
        lost: planned blocks of a pass that ended well without them.
        doubled: blocks accepted twice in a pass.
        out_of_plan: accepted without having been planned or asked for, or after the try had failed.
        over_deadline: tries that ended later than their deadline allows.
        unended: passes or tries that never ended, in a connection that went on.
        passes: forwards and backwards that ended well.
        given_up: those that ended with an error.
        tries: calls asked.
        failed: of these, those that came to nothing.
    """

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    out_of_plan: list[str] = field(default_factory=list)
    over_deadline: list[str] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)
    passes: int = 0
    given_up: int = 0
    tries: int = 0
    failed: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.lost or self.doubled or self.out_of_plan or self.over_deadline or self.unended)

    def counts(self) -> dict[str, int]:
        """How many of each."""
        found = {name: len(getattr(self, name)) for name in ("lost", "doubled", "out_of_plan", "over_deadline", "unended")}
        return found | {name: getattr(self, name) for name in ("passes", "given_up", "tries", "failed")}


@dataclass(slots=True)
class _Try:
    micro: int
    way: str
    span: tuple[int, int]
    within_s: float
    replay: bool
    asked_at: float
    over: str = ""


@dataclass(slots=True)
class _Pass:
    """One forward, or one backward, of a body call."""

    name: str
    micro: int
    blocks: int
    accepted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    tries: dict[int, _Try] = field(default_factory=dict)
    over: bool = False


def judge(path: str | os.PathLike[str]) -> Verdict:
    """The verdict on a history file; one that was broken off may end in half a line.

    Raises:
        UsageError: it cannot be read, or is no history.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"no history can be read from {os.fspath(path)}: {error}") from error
    return judge_lines(_lines(text, os.fspath(path)))


def judge_lines(lines: Iterable[dict[str, Any]]) -> Verdict:
    """The verdict on the lines of a history."""
    judge = _Judge()
    for line in lines:
        judge.take(line)
    judge.end_connection(broken_off=True)
    return judge.verdict


def _lines(text: str, path: str) -> Iterator[dict[str, Any]]:
    rows = text.split("\n")
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        try:
            line = json.loads(row)
            if not isinstance(line, dict) or "event" not in line:
                raise ValueError("no event")
        except ValueError as error:
            following = next((later for later in rows[number:] if later), "")
            if following and '"event":"open"' not in following:
                raise UsageError(f"{path}, line {number}: not a line of a history") from error
            continue  # what a killed writer left behind
        yield line


def _key(line: dict[str, Any]) -> tuple[int, int]:
    return line["step"], line["pass"]


class _Judge:
    def __init__(self) -> None:
        self.verdict = Verdict()
        self._plans: dict[int, dict[str, Any]] = {}
        self._passes: dict[tuple[int, int], _Pass] = {}

    def take(self, line: dict[str, Any]) -> None:
        match line["event"]:
            case "open":
                self.end_connection(broken_off=True)
            case "close":
                self.end_connection(broken_off=False)
            case "plan":
                self._plans[line["step"]] = line
            case "begin":
                self._begin(line)
            case "ask":
                self._ask(line)
            case "fail":
                self._over(line, "failed")
            case "accept":
                self._accept(line)
            case "end":
                self._end(line)
            case "give up":
                self._close(line, given_up=True)

    def end_connection(self, *, broken_off: bool) -> None:
        """No more lines of this connection: what is open is a finding, unless the process was killed."""
        if not broken_off:
            self.verdict.unended += [f"{each.name} never ended" for each in self._passes.values() if not each.over]
        self._plans.clear()
        self._passes.clear()

    def _begin(self, line: dict[str, Any]) -> None:
        plan, name = self._plans.get(line["step"]), f"the {line['way']} (pass {line['pass']}) of call {line['step']}"
        if plan is None:
            self.verdict.out_of_plan.append(f"{name} began without a plan")
            return
        before = self._passes.get((line["step"], line["pass"] - 1))
        if line["pass"] > 1 and before is not None and not before.over:  # a forward may go on beside its first backward
            self.verdict.unended.append(f"{before.name} never ended")
        self._passes[_key(line)] = _Pass(name, len(plan["micro"]), plan["blocks"], {index: [] for index in range(len(plan["micro"]))})

    def _ask(self, line: dict[str, Any]) -> None:
        self.verdict.tries += 1
        found = self._passes.get(_key(line))
        start, stop = line["span"]
        if found is None or found.over or not 0 <= line["micro"] < found.micro or not 0 <= start < stop <= found.blocks:
            self.verdict.out_of_plan.append(
                f"call {line['step']} asked for blocks {start}:{stop} of micro-batch {line['micro']}, which nobody planned"
            )
            return
        found.tries[line["number"]] = _Try(line["micro"], line["way"], (start, stop), line["within_s"], line["replay"], line["t"])

    def _over(self, line: dict[str, Any], how: str) -> _Try | None:
        found = self._passes.get(_key(line))
        one = found.tries.get(line["number"]) if found is not None else None
        if found is None or one is None or one.over or found.over:
            self.verdict.out_of_plan.append(
                f"try {line['number']} of call {line['step']} {how}, but it "
                + ("was not under way" if one is None or not one.over else f"had {one.over} before")
            )
            return None
        one.over = how
        self.verdict.failed += how == "failed"
        late_s = line["t"] - one.asked_at - one.within_s
        if late_s > MARGIN_S:
            self.verdict.over_deadline.append(f"try {line['number']} of {found.name} ended {late_s:.1f} s after its deadline of {one.within_s:.1f} s")
        return one

    def _accept(self, line: dict[str, Any]) -> None:
        one = self._over(line, "been accepted")
        if one is None or one.replay:
            return
        found = self._passes[_key(line)]
        start, stop = one.span
        if any(start < old_stop and old_start < stop for old_start, old_stop in found.accepted[one.micro]):
            self.verdict.doubled.append(f"{found.name}: blocks {start}:{stop} of micro-batch {one.micro} were accepted twice")
        found.accepted[one.micro].append(one.span)

    def _end(self, line: dict[str, Any]) -> None:
        found = self._close(line, given_up=False)
        if found is None:
            return
        for micro, spans in found.accepted.items():
            covered = {block for start, stop in spans for block in range(start, stop)}
            missing = sorted(set(range(line["lowest"], found.blocks)) - covered)
            if missing:
                self.verdict.lost.append(f"{found.name} ended without blocks {missing} of micro-batch {micro}")

    def _close(self, line: dict[str, Any], *, given_up: bool) -> _Pass | None:
        found = self._passes.get(_key(line))
        if found is None or found.over:
            self.verdict.out_of_plan.append(f"a {line['way']} of call {line['step']} ended that was not under way")
            return None
        found.over = True
        self.verdict.given_up += given_up
        self.verdict.passes += not given_up
        open_tries = [number for number, one in found.tries.items() if not one.over]
        if open_tries:
            self.verdict.unended.append(f"{found.name} ended while tries {open_tries} were under way")
        return found
