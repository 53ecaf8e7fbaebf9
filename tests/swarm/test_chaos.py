"""The campaigns of docs/reliability.md in short: each makes its faults, and its verdict is good."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.campaign import Campaign, environment

pytestmark = pytest.mark.swarm

ROOT = Path(__file__).resolve().parents[2]


def campaign(log: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "scripts" / "chaos"), *words, "--seed", "5", "--log", str(log)]
    done = subprocess.run(command, cwd=log.parent, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict: dict[str, Any] = json.loads((log / "verdict.json").read_text())
    lines = [json.loads(line) for line in (log / "faults.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["event"] == "fault"]) >= verdict["wanted"]
    return verdict


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("servers", "--count", "2", "--mix"), "kills"),
        (("cuts", "--count", "40"), "cut up"),
        (("daemons", "--count", "3"), "kills"),
        (("soak", "--count", "2", "--minutes", "0.1"), "kills"),
        (("simulate", "--count", "40"), "kill"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_short_campaign_is_good(tmp_path: Path, words: tuple[str, ...], kind: str) -> None:
    verdict = campaign(tmp_path / "log", *words)
    assert verdict["bitwise"]
    assert any(kind in name for name in verdict["counts"])


def test_a_killed_client_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    verdict = campaign(tmp_path / "log", "client", "--count", "1", "--steps", "4")
    assert verdict["bitwise"]


def test_nothing_stays_after_starts_and_ends(tmp_path: Path) -> None:
    assert campaign(tmp_path / "log", "cycles", "--count", "1")["errors"] == []


@pytest.mark.parametrize("ruin", ["different", "error", "hang", "too few"])
def test_a_bad_campaign_has_a_bad_verdict(tmp_path: Path, ruin: str) -> None:
    made = Campaign("servers", 1, 1, tmp_path)
    if ruin != "too few":
        made.fault("kills")
    made.compare(ruin != "different")
    if ruin == "error":
        made.error("a step failed")
    if ruin == "hang":
        made.hangs += 1
    assert made.finish() == 1
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"] == "bad"


def test_a_good_campaign_has_a_good_verdict_and_judge_sees_a_bad_history(tmp_path: Path) -> None:
    made = Campaign("servers", 1, 1, tmp_path)
    made.fault("kills")
    made.compare(True)
    assert made.finish() == 0
    history = tmp_path / "bad.jsonl"
    history.write_text('{"t":1.0,"event":"open"}\n{"t":2.0,"event":"accept","step":0,"pass":0,"lane":0,"number":7}\n{"t":3.0,"event":"close"}\n')
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chaos"), "judge", str(history)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "out_of_plan" in done.stdout
