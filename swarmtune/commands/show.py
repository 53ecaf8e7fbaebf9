"""``swarmtune show``: the configuration that a recipe composes to, or that a run had."""

from __future__ import annotations

from pathlib import Path

from swarmtune.commands.arguments import Parser
from swarmtune.commands.bundled import recipe_files
from swarmtune.errors import UsageError


def parser() -> Parser:
    """What the verb takes."""
    made = Parser("show", "Print the whole configuration, composed and checked, as YAML.")
    made.add_argument("recipe", metavar="RECIPE|FILE|RUN", help="one of swarmtune ls, a YAML file of your own, or the directory of a run")
    made.add_argument("words", nargs="*", metavar="key=value", help="what to change in the recipe, as when training")
    made.add_argument("--source", action="store_true", help="print the recipe's YAML file and Python file as they are instead")
    return made


def main(words: list[str]) -> int:
    """Print; returns the exit code.

    Raises:
        UsageError: there is no such recipe, file or run, or something in it is wrong.
    """
    given = parser().read(words)
    name, text = recipe_word("show", given.recipe)
    if is_run(name):
        if given.words or given.source:
            raise UsageError(f"show: {name} is a run, which has been: show it without {'--source' if given.source else given.words[0]}")
        from swarmtune.config import load_saved, to_yaml

        print(to_yaml(load_saved(Path(name).expanduser() / "config.yaml")), end="")
        return 0
    if given.source:
        _print_source(name, [text, *given.words])
        return 0
    from swarmtune.config import load_config, to_yaml

    print(to_yaml(load_config([text, *given.words])), end="")
    return 0


def recipe_word(verb: str, first: str) -> tuple[str, str]:
    """The recipe that a verb's first argument names, and the word ``recipe=...`` for it.

    Raises:
        UsageError: it is the setting of another key.
    """
    key, equals, value = first.partition("=")
    if equals and key == "recipe":
        return value, first
    if equals and not Path(first).exists():
        raise UsageError(f"{verb}: expected a recipe first, such as swarmtune {verb} lora_bloom {first}")
    return first, f"recipe={first}"


def is_run(name: str) -> bool:
    """Whether ``name`` is the directory of a run, and no recipe.

    Raises:
        UsageError: a directory that is none.
    """
    from swarmtune.config import options

    path = Path(name).expanduser()
    if name in options("recipe") or not path.is_dir():
        return False
    if not (path / "config.yaml").is_file():
        raise UsageError(f"{name} is not the directory of a run: it has no config.yaml")
    return True


def _print_source(name: str, words: list[str]) -> None:
    from swarmtune.config import load_config, options

    if name in options("recipe"):
        files = recipe_files(name)
    else:
        code = load_config(words).recipe
        files = (Path(name).expanduser(), Path(code) if code.endswith(".py") else recipe_files(code)[1])
    for path in files:
        print(f"# --- {path}")
        print(path.read_text(encoding="utf-8"), end="")
