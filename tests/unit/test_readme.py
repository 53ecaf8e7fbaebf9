"""The README says what is true: its tree, its Python, its picture, its keys."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

import swarmtune

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_tree_names_every_tracked_top_level_entry_and_nothing_else() -> None:
    (tree,) = [block for block in blocks("text") if "conf/" in block]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line and not line.startswith(" ")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert named == {path.split("/")[0] for path in tracked if not path.startswith(".")}


def test_tree_names_every_package_of_swarmtune() -> None:
    (tree,) = [block for block in blocks("text") if "conf/" in block]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    packages = {path.parent.name for path in (ROOT / "swarmtune").glob("*/__init__.py")}
    assert packages <= named
    assert all(list((ROOT / "swarmtune").glob(f"{name}*")) for name in named)


def test_python_in_it_compiles_and_uses_public_names() -> None:
    for block in blocks("python"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "swarmtune"
        }
        assert names <= set(swarmtune.__all__)


def test_pictures_and_documents_that_it_links_to_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_picture_is_of_a_run_whose_summary_is_kept_beside_it() -> None:
    summary = json.loads((ROOT / "docs" / "images" / "lora_bloom.json").read_text())
    assert f"{summary['val_ppl_before']:.1f} -> {summary['val_ppl_after']:.1f}" in README
