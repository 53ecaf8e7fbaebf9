"""What comes along: groups, their options and the recipes, with a line about each, read without importing any of it."""

from __future__ import annotations

import ast
import importlib.resources
import re
from pathlib import Path

from swarmtune.config import options
from swarmtune.conversion import nearest
from swarmtune.errors import UsageError


def groups() -> list[str]:
    """The groups of ``conf`` that have options."""
    folder = importlib.resources.files("conf")
    return sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith("_") and options(item.name))


def recipe_files(name: str) -> tuple[Path, Path]:
    """The YAML file and the Python file of a bundled recipe.

    Raises:
        UsageError: there is no such recipe.
    """
    names = options("recipe")
    if name not in names:
        raise UsageError(f"there is no recipe {name!r}; there are: {', '.join(names)}{nearest(name, names)}")
    values = _path("conf") / "recipe" / f"{name}.yaml"
    code = re.search(r"^recipe:\s*(\w+)", values.read_text(encoding="utf-8"), re.MULTILINE)
    return values, _path("recipes") / f"{code[1] if code else name}.py"


def describe(group: str, name: str) -> str:
    """One line about an option: the first of the recipe's docstring, or the first comment of the YAML file."""
    if group == "recipe":
        _, code = recipe_files(name)
        if code.stem == name and (text := ast.get_docstring(ast.parse(code.read_text(encoding="utf-8")))):
            return text.splitlines()[0]
    text = (_path("conf") / group / f"{name}.yaml").read_text(encoding="utf-8")
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0] if comments else ""


def _path(package: str) -> Path:
    return Path(str(importlib.resources.files(package)))
