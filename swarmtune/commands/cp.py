"""``swarmtune cp``: a bundled recipe as two files of one's own, to edit."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

from swarmtune.commands.arguments import Parser
from swarmtune.commands.bundled import recipe_files
from swarmtune.errors import UsageError
from swarmtune.own_recipe import ENDINGS


def parser() -> Parser:
    """What the verb takes."""
    made = Parser("cp", "Copy a recipe: its YAML file (the values) and, beside it, its Python file (the code).")
    made.add_argument("recipe", metavar="RECIPE", help="one of swarmtune ls")
    made.add_argument("destination", metavar="DEST", help="DEST.yaml and DEST.py are written; a directory takes them under the recipe's name")
    made.add_argument("--force", action="store_true", help="overwrite files that are there")
    made.add_argument("--make-parents", action="store_true", help="make the directory that DEST is in")
    return made


def main(words: list[str]) -> int:
    """Copy; returns the exit code.

    Raises:
        UsageError: there is no such recipe, or the files cannot be written.
    """
    given = parser().read(words)
    values, code = recipe_files(given.recipe)
    stem = _stem(given.destination, given.recipe)
    targets = [stem.with_name(f"{stem.name}.yaml"), stem.with_name(f"{stem.name}.py")]
    there = [str(path) for path in targets if path.exists() or path.is_symlink()]
    if there and not given.force:
        raise UsageError(f"cp: already there: {' and '.join(there)}; choose another name, or add --force")
    if not stem.parent.is_dir():
        if not given.make_parents:
            raise UsageError(f"cp: there is no directory {stem.parent}: make it, or add --make-parents")
        _make(stem.parent)
    texts = [path.read_text(encoding="utf-8") for path in (values, code)]
    called = re.compile(rf"\brecipe={re.escape(given.recipe)}(?![\w-]|\.\w)")
    texts = [called.sub(lambda _: f"recipe={targets[0].name}", text) for text in texts]
    texts[0] = re.sub(r"^recipe:.*$", lambda _: f"recipe: {_scalar(targets[1].name)}", texts[0], flags=re.MULTILINE)
    _write(targets, texts)
    shown = os.path.relpath(targets[0])
    print(f"wrote {shown} and {os.path.relpath(targets[1])}; run them with: swarmtune recipe={shown}")
    return 0


def _stem(destination: str, recipe: str) -> Path:
    """The path of both files without their endings."""
    path = Path(destination).expanduser()
    if destination.endswith(("/", os.sep)) or path.is_dir():
        path = path / recipe
    elif path.suffix in (*ENDINGS, ".py"):
        path = path.with_suffix("")
    if not destination or not path.name or path.name == "..":
        raise UsageError(f"cp: expected the name of a file to make, got {destination!r}")
    return path.absolute()


def _scalar(text: str) -> str:
    """``text`` as YAML reads it back."""
    return text if re.fullmatch(r"[A-Za-z_][\w.-]*", text) else "'" + text.replace("'", "''") + "'"


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cp: {directory} cannot be made: {error.strerror}") from error


def _write(paths: list[Path], texts: list[str]) -> None:
    """Write all files, whole, or none: they get their names once all of them are on the disk."""
    temporaries: list[str] = []
    path = paths[0]
    try:
        for path, text in zip(paths, texts, strict=True):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
            temporaries.append(name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
        for path, name in zip(paths, temporaries, strict=True):
            os.replace(name, path)
    except OSError as error:
        raise UsageError(f"cp: {path} cannot be written: {error.strerror}") from error
    finally:
        for name in temporaries:
            Path(name).unlink(missing_ok=True)
