"""docs/adapters.md is what the tables say."""

from __future__ import annotations

from pathlib import Path

from tests.adapter_cases import page


def test_the_page_of_adapters_is_made_from_the_tables() -> None:
    committed = Path(__file__).parents[2] / "docs" / "adapters.md"
    assert committed.read_text(encoding="utf-8") == page(), "run python -m tests.adapter_cases > docs/adapters.md"
