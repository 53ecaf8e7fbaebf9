"""docs/commands.md says what is true: its commands are run in order, and print what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swarmtune.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "commands.md").read_text()


def shown() -> list[tuple[str, list[str]]]:
    """Each command, and the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line.removeprefix("$ "), []))
            else:
                found[-1][1].append(line)
    return found


def pattern(lines: list[str]) -> str:
    """What the output must match: ``...`` is any text, and numbers that are measured may be others."""
    text = "\n".join(lines)
    parts = []
    for part in re.split(r"(\.\.\.\n|\.\.\.|\d[\d.]*e-\d+)", text + "\n" if lines else ""):
        parts.append(
            {"...\n": r"(?:.*\n)*?", "...": r".*"}.get(part, r"\d[\d.]*e[+-]\d+" if re.fullmatch(r"\d[\d.]*e-\d+", part) else re.escape(part))
        )
    return "".join(parts)


def test_every_verb_has_its_section() -> None:
    assert re.findall(r"^## `swarmtune (\w+)`", TEXT, re.MULTILINE) == sorted(
        VERBS, key=["ls", "cp", "show", "validate", "export", "serve", "plot", "doctor", "completion"].index
    )


@pytest.mark.parametrize(
    ("lines", "output", "fits"),
    [
        (["a", "...", "b"], "a\nx\ny\nb\n", True),
        (["a", "...", "b"], "a\nb\n", True),
        (["a", "...", "b"], "a\nx\n", False),
        (["a ... c"], "a b c\n", True),
        (["a"], "a\nb\n", False),
        ([], "", True),
        ([], "a\n", False),
    ],
)
def test_the_comparison_can_fail(lines: list[str], output: str, fits: bool) -> None:
    assert bool(re.fullmatch(pattern(lines), output)) == fits


@pytest.mark.e2e
def test_every_command_prints_what_is_shown(tmp_path: Path) -> None:
    home = tmp_path / "me"
    home.mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "swarmtune"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m swarmtune.cli "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    for command, lines in shown():
        done = subprocess.run(["bash", "-c", command], cwd=home, env=environment, capture_output=True, text=True, timeout=240)
        output = (done.stdout + done.stderr).replace(str(home), "/home/me")
        assert re.fullmatch(pattern(lines), output), f"$ {command}\n{output}\ndoes not match\n{pattern(lines)}"
        wrong = bool(lines) and lines[0].startswith("swarmtune: ")
        assert done.returncode == (2 if wrong else 0), command
