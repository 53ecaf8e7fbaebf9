"""The sentences that docs/troubleshooting.md explains are those that the code says; its commands run in tests/swarm."""

from __future__ import annotations

import re
from pathlib import Path

import swarmtune

ROOT = Path(swarmtune.__file__).parent.parent
DOCUMENT = ROOT / "docs" / "troubleshooting.md"


def symptoms() -> list[str]:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [row.split("|")[1].strip().partition("` ")[0].strip("`") for row in rows]


def test_every_symptom_is_a_sentence_of_the_code() -> None:
    sources = " ".join(path.read_text(encoding="utf-8") for package in ("swarmtune", "servers") for path in (ROOT / package).rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)
    assert len(symptoms()) > 10
    for symptom in symptoms():
        for fragment in re.split(r"\.\.\.|\(.*|\d[\d.]*", symptom):
            assert fragment.strip(" :") in said, symptom


def test_the_example_is_what_a_run_printed() -> None:
    (example,) = re.findall(r"```text\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    for part in ("answers", "cannot be reached: refused", "ms round trip", "servers per block", "0 failed"):
        assert part in example
    assert "192." not in example
    assert not re.findall(r"/(?:tmp|home|root)/", example)
