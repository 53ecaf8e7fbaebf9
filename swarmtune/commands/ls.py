"""``swarmtune ls``: the recipes, or the options of a group, with a line about each."""

from __future__ import annotations

from swarmtune.commands.arguments import Parser
from swarmtune.commands.bundled import describe, groups
from swarmtune.config import options
from swarmtune.conversion import nearest
from swarmtune.errors import UsageError


def parser() -> Parser:
    """What the verb takes."""
    made = Parser("ls", "List the recipes, or the options of a group such as adapter.", f"groups: {', '.join(groups())}")
    made.add_argument("group", nargs="?", default="recipe", metavar="GROUP", help="a group of options (default: recipe)")
    return made


def main(words: list[str]) -> int:
    """List; returns the exit code.

    Raises:
        UsageError: there is no such group.
    """
    group = parser().read(words).group
    if group not in groups():
        raise UsageError(f"ls: there is no group {group!r}; there are: {', '.join(groups())}{nearest(group, groups())}")
    names = options(group)
    width = max(len(name) for name in names)
    for name in names:
        print(f"{name:<{width}}  {describe(group, name)}".rstrip())
    return 0
