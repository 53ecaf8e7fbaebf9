"""A recipe of the user's own: a YAML file anywhere, and the Python file that it names. ``swarmtune cp`` makes a pair.

Whatever is wrong in either is said in one sentence that names the file and, where it is known, the line.
"""

from __future__ import annotations

import ast
import importlib.resources
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtune.errors import UsageError

ENDINGS = (".yaml", ".yml")
BROKEN_CODE = (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, OSError, RuntimeError)
"""What a recipe's Python file may raise while it is imported."""


@dataclass(frozen=True)
class OwnRecipe:
    """A YAML file of the user's own, read but not yet composed.

    Attributes:
        path: the file, absolute.
        shown: the file as the user named it.
        text: its content: YAML whose top is a group of keys.
        lines: line of each full key, from 1.
    """

    path: Path
    shown: str
    text: str
    lines: dict[str, int]

    @classmethod
    def read(cls, shown: str) -> OwnRecipe:
        """Read and parse the file.

        Raises:
            UsageError: it cannot be read, is not YAML, or holds a key twice.
        """
        import yaml

        path = Path(shown).expanduser().absolute()
        if path.suffix not in ENDINGS:
            raise UsageError(f"recipe: expected a YAML file, got {shown}; swarmtune cp makes a YAML file and a Python file beside it")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe: {shown} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            place = f"{shown}, line {error.problem_mark.line + 1}" if error.problem_mark else shown
            raise UsageError(f"{place}: this is not YAML: {error.problem}") from error
        except yaml.YAMLError as error:
            raise UsageError(f"{shown}: this is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{shown}: expected keys and values such as 'recipe: lora_bloom', got {'nothing' if root is None else 'something else'}")
        lines: dict[str, int] = {}
        for key, line in _keys_of(root):
            if key in lines:
                raise UsageError(f"{shown}, line {line}: the key {key} stands in line {lines[key]} already")
            lines[key] = line
        return cls(path, shown, text, lines)

    @property
    def name(self) -> str:
        """The file's name without its ending: what its runs are filed under."""
        return self.path.stem

    def code(self, value: Any) -> str:
        """What the key ``recipe`` of the composed configuration stands for: the name of a bundled recipe, or an absolute Python file.

        Raises:
            UsageError: neither; or a file without ``build``.
        """
        bundled = ", ".join(code_names())
        if not isinstance(value, str) or not value:
            raise UsageError(f"{self.shown}: needs a key recipe: a Python file beside it, such as {self.name}.py, or one of {bundled}")
        if value in code_names():
            return value
        place = self.place("recipe")
        if not value.endswith(".py"):
            raise UsageError(f"{place}: there is no recipe {value!r}; there are: {bundled}; a file of your own ends in .py")
        path = self.path.parent / Path(value).expanduser()
        if not path.is_file():
            raise UsageError(f"{place}: there is no file {path}")
        check_code(path)
        return str(path)

    def place(self, key: str) -> str:
        """``file`` or ``file, line 3`` where a key stands."""
        return f"{self.shown}, line {self.lines[key]}" if key in self.lines else self.shown

    def line_with(self, word: str) -> int | None:
        """The first line that holds ``word`` outside of a comment."""
        pattern = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
        lines = (line.partition("#")[0] for line in self.text.splitlines())
        return next((number for number, line in enumerate(lines, 1) if pattern.search(line)), None)

    def blame(self, sentence: str, elsewhere: Sequence[str]) -> str:
        """``sentence`` with the place before it, where it is about a key that this file sets and no word (``elsewhere``) sets again."""
        found = []
        subject = sentence.partition("; did you mean")[0]
        for key in self.lines:
            if key == "defaults" or any(key == other or key.startswith(f"{other}.") for other in elsewhere):
                continue
            if about := re.search(rf"(?<![\w./]){re.escape(key)}(?![\w./])", subject):
                found.append((about.start(), -len(key), key))
        return f"{self.place(min(found)[2])}: {sentence}" if found and not sentence.startswith(self.shown) else sentence


def code_names() -> list[str]:
    """The Python files of the package ``recipes``."""
    folder = importlib.resources.files("recipes")
    return sorted(item.name.removesuffix(".py") for item in folder.iterdir() if item.name.endswith(".py") and not item.name.startswith("_"))


def _keys_of(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every full key under a YAML mapping node, with its line."""
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        yield key, name.start_mark.line + 1
        if value.id == "mapping":
            yield from _keys_of(value, f"{key}.")


def check_code(path: Path) -> None:
    """See that a recipe's Python file parses and has a function ``build(config, swarm)``; nothing of it runs.

    Raises:
        UsageError: it does not.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    names = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "build":
            given = statement.args
            most = len(given.posonlyargs) + len(given.args)
            if not (most - len(given.defaults) <= 2 <= most or given.vararg) or None in given.kw_defaults:
                raise UsageError(f"{path}, line {statement.lineno}: build must take (config, swarm)")
            return
        if isinstance(statement, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    if "build" not in names:
        raise UsageError(f"{path} needs a function build(config, swarm)")


def load_build(path: Path) -> Callable[[Any, Any], Any]:
    """The function ``build`` of a recipe's Python file, with its result checked.

    The file's directory does not join ``sys.path``: what it imports must be installed, or reachable through ``PYTHONPATH``.

    Raises:
        UsageError: the file cannot be imported.
    """
    check_code(path)
    name = f"swarmtune_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data-loader workers find its classes by this name
    try:
        spec.loader.exec_module(module)
        build = module.build
    except BROKEN_CODE as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UsageError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error

    def checked(config: Any, swarm: Any) -> Any:
        made = build(config, swarm)
        if not isinstance(made, tuple) or len(made) != 2:
            raise UsageError(f"{path}: build must return a LightningModule and a LightningDataModule, got {type(made).__name__}")
        adapter = getattr(getattr(made[0], "model", None), "adapter", None)
        if not hasattr(adapter, "save_pretrained"):
            raise UsageError(f"{path}: the module that build returns must keep the model of swarmtune.load_causal_lm, with an adapter, as its .model")
        return made

    return checked
