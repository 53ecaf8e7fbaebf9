"""A program of a measurement in a process of its own: a line in, a line of JSON out. It ends when its standard input does, so with this process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtune.errors import ServerStartFailed

HERE = Path(__file__).resolve().parent
END_S = 10.0


@dataclass(frozen=True, slots=True)
class Child:
    """A running one."""

    process: subprocess.Popen[str]
    log: Path

    def read(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            ServerStartFailed: it has ended; with the last line of its log.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise ServerStartFailed(f"{self.log.stem}, a program of this measurement, ended: {said[-1][:500]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, question: object) -> dict[str, Any]:
        """What it answers."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
        return self.read()


@contextlib.contextmanager
def child(script: str, words: Sequence[object], directory: Path) -> Iterator[Child]:
    """Start ``script`` of this directory, in a session of its own, so that Ctrl-C is ours; at the end its input ends, and soon it does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    log = directory / f"{Path(script).stem}.log"
    command = [sys.executable, "-P", str(HERE / script), *map(str, words)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Child(process, log)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
