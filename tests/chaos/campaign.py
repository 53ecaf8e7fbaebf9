"""What every campaign has: a log of faults, bounds on every wait, progress, an end on signals, and a verdict."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from swarmtune.remote.verdict import Verdict, judge

ROOT = Path(__file__).resolve().parents[2]
TELL_EVERY_S = 10.0
MAX_HANGS = 3
"""A campaign ends after so many: the rest would only be more of them."""
GRACE_S = 60.0
"""How long a step that was told to end may still take; then the process ends, with a verdict."""
FILES = ("faults.jsonl", "history.jsonl", "verdict.json", "verdict.md", "stacks.txt")


class Hang(Exception):
    """Something took longer than it ever may."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


class Campaign:
    """One run of the nemesis.

    Attributes:
        name: the verb.
        wanted: faults to make.
        counts: of everything, by name; ``"faults"`` is what is counted against ``wanted``.
        errors: what went wrong that nothing is allowed to make go wrong, one sentence each.
        facts: figures for the verdict.
    """

    def __init__(self, name: str, wanted: int, seed: int, log: Path) -> None:
        self.name, self.wanted, self.seed, self.directory = name, wanted, seed, log
        self.random = random.Random(f"{name} {seed}")
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.facts: dict[str, Any] = {}
        self.different: list[int] = []
        self.steps = 0
        self.hangs = 0
        self.stopped = False
        self._began = time.monotonic()
        self._told_at = self._began
        self._lock = threading.Lock()
        log.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            (log / file).unlink(missing_ok=True)
        self._file = open(log / "faults.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  # open as long as the campaign
        self._stacks = open(log / "stacks.txt", "a", encoding="utf-8")  # noqa: SIM115  # the same
        self.note("begin", campaign=name, wanted=wanted, seed=seed, commit=commit(), pid=os.getpid(), at=time.time())

    @property
    def history(self) -> Path:
        """Where the client writes its history."""
        return self.directory / "history.jsonl"

    def note(self, event: str, **fields: Any) -> None:
        """One line in the log; from any thread."""
        with self._lock:
            if not self._file.closed:
                self._file.write(json.dumps({"t": round(time.monotonic() - self._began, 4), "event": event, **fields}) + "\n")

    def fault(self, kind: str, counted: bool = True, **fields: Any) -> None:
        """A fault has been made now; ``counted`` says whether it is one of those wanted."""
        with self._lock:
            self.counts[kind] += 1
            self.counts["faults"] += counted
            number = self.counts["faults"]
        self.note("fault", kind=kind, number=number, step=self.steps, **fields)

    def error(self, sentence: str) -> None:
        """Something that must not happen has happened."""
        self.errors.append(sentence[:500])
        self.note("error", detail=sentence[:2000], step=self.steps)
        print(f"{self.name}: ERROR: {sentence[:500]}", flush=True)

    def tell(self, *, now: bool = False) -> None:
        """A line of progress, every ten seconds."""
        at = time.monotonic()
        if not now and at - self._told_at < TELL_EVERY_S:
            return
        self._told_at = at
        done, passed_s = self.counts["faults"], at - self._began
        left = f"{passed_s / done * (self.wanted - done) / 60:.1f} min left" if done else "no fault so far"
        short: Counter[str] = Counter()
        for kind, count in sorted(self.counts.items()):
            short[kind.partition(":")[0]] += count * (kind != "faults")
        others = ", ".join(f"{count} {kind}" for kind, count in short.items() if count)
        bad = f", {len(self.different)} DIFFERENT, {self.hangs} HANGS, {len(self.errors)} ERRORS" * bool(self.different or self.hangs or self.errors)
        print(
            f"{self.name}: {done}/{self.wanted} faults ({others}) in {self.steps} steps, {done / passed_s * 60:.1f} a minute, {left}{bad}", flush=True
        )

    @contextlib.contextmanager
    def bound(self, what: str, seconds: float) -> Iterator[None]:
        """Raise ``Hang`` in the main thread if the body takes longer, with everybody's stack in the log."""
        ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(what, seconds, ended, threading.get_ident()), daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, what: str, seconds: float, ended: threading.Event, thread: int) -> None:
        if ended.wait(seconds):
            return
        self.hangs += 1
        self.note("hang", what=what, after_s=seconds, step=self.steps)
        print(f"{self.name}: HANG: {what} took more than {seconds:.0f} s", flush=True)
        self._stacks.write(f"--- {what}, {seconds:.0f} s\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        signal.pthread_kill(thread, signal.SIGUSR2)
        if not ended.wait(GRACE_S):
            self.error(f"{what} did not end when it was told to")
            self.finish()
            os._exit(3)  # what it started ends with it

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Signals end the campaign in good order; what is raised inside is part of the verdict."""
        kept = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
        kept[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, _hang)
        try:
            yield
        except Stopped:
            self.stopped = True
            self.note("stopped")
        except Hang:
            self.note("broken off")
        except Exception as error:
            self.error(f"the campaign broke off: {type(error).__name__}: {error}")
            import traceback

            traceback.print_exc(file=self._stacks)
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def compare(self, same: bool) -> None:
        """A step has been done; ``same`` says whether its weights are those of the quiet run."""
        if not same:
            self.different.append(self.steps)
            self.note("different", step=self.steps)
        self.steps += 1
        self.tell()

    def give_up_after_hangs(self) -> None:
        """Raise ``Hang`` once there were too many."""
        if self.hangs >= MAX_HANGS:
            raise Hang

    def finish(self) -> int:
        """Judge, print the verdict, keep it; the exit code."""
        found = judge(self.history) if self.history.exists() else Verdict()
        good = bool(
            found.clean
            and not (self.different or self.hangs or self.errors or self.stopped)
            and self.counts["faults"] >= self.wanted
            and (self.steps or not self.history.exists())
        )
        verdict = {
            "campaign": self.name,
            "verdict": "good" if good else "bad",
            "bitwise": not self.different,
            "different": self.different[:20],
            "steps": self.steps,
            "hangs": self.hangs,
            **found.counts(),
            "errors": self.errors[:10],
            "faults": self.counts["faults"],
            "wanted": self.wanted,
            "counts": {kind: count for kind, count in sorted(self.counts.items()) if kind != "faults"},
            **self.facts,
            "stopped": self.stopped,
            "seed": self.seed,
            "commit": commit(),
            "duration_s": round(time.monotonic() - self._began, 1),
        }
        findings = {name: getattr(found, name) for name in ("lost", "doubled", "out_of_plan", "over_deadline", "unended")}
        row = markdown_row(verdict)
        (self.directory / "verdict.json").write_text(json.dumps({**verdict, "findings": findings}, indent=1) + "\n", encoding="utf-8")
        (self.directory / "verdict.md").write_text(row + "\n", encoding="utf-8")
        self.note("verdict", **verdict)
        self._file.close()
        self._stacks.close()
        print(json.dumps(verdict), flush=True)
        print(row, flush=True)
        return 0 if good else 1


def markdown_row(verdict: dict[str, Any]) -> str:
    """Campaign, verdict, faults, steps, bitwise, hangs, lost, doubled, out of plan, over deadline, counts, seed, commit, minutes."""
    counts = ", ".join(f"{count} {kind}" for kind, count in verdict["counts"].items())
    cells = [verdict["campaign"], verdict["verdict"], f"{verdict['faults']}/{verdict['wanted']}", verdict["steps"]]
    cells += ["equal" if verdict["bitwise"] else "DIFFERENT", *(verdict[key] for key in ("hangs", "lost", "doubled", "out_of_plan", "over_deadline"))]
    cells += [counts, verdict["seed"], verdict["commit"], f"{verdict['duration_s'] / 60:.1f} min"]
    return f"| {' | '.join(map(str, cells))} |"


def commit() -> str:
    """The short name of the commit that is judged, ``+`` where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Count, median, 95th percentile, largest."""
    ordered = sorted(seconds)
    if not ordered:
        return {"n": 0}
    return {
        "n": len(ordered),
        "p50": round(ordered[len(ordered) // 2], 3),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 3),
        "max": round(ordered[-1], 3),
    }


def environment() -> dict[str, str]:
    """For processes that are started from here: they run this code, offline."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}


assert sys.platform == "linux", "the nemesis reads /proc"
