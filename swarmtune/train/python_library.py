"""Texts that come with Python: its help topics, questions and answers, and texts by package, made of the docstrings of its library.

The library's sources are parsed, never imported: what comes depends on the installed Python alone.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swarmtune.errors import UsageError
from swarmtune.train.documents import Document, python_topics
from swarmtune.train.rows import ASSISTANT, USER, conversation

PACKAGES = ("asyncio", "email", "importlib", "unittest", "xml")
"""Packages of many files with many docstrings each, so that whole files can be held out."""
SHORTEST_CHARS = 40
"""A docstring shorter than this does not tell where it comes from."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def library_folder() -> Path:
    """Where the library's sources are.

    Raises:
        UsageError: this Python comes without them.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "asyncio" / "tasks.py").is_file():
        raise UsageError(f"data: this Python comes without the sources of its library in {folder}: give data=PATH or ID")
    return folder


def python_questions() -> list[Document]:
    """Conversations about the public functions and classes of the library's modules: what is it, and, where there is more to say, what else.

    Those about one module share a group, because docstrings of a module repeat each other.
    """
    found = []
    for path in sorted(library_folder().glob("*.py")):
        if path.stem not in sys.stdlib_module_names or path.stem.startswith("_"):
            continue
        for node in _parse(path).body:
            text = ast.get_docstring(node) if isinstance(node, Definition) and not node.name.startswith("_") else None
            if text is None or not isinstance(node, Definition):
                continue
            paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
            asked = "is" if isinstance(node, ast.ClassDef) else "does"
            ending = "" if isinstance(node, ast.ClassDef) else " do"
            messages = [{"role": USER, "content": f"What {asked} {path.stem}.{node.name}{ending}?"}, {"role": ASSISTANT, "content": paragraphs[0]}]
            if len(paragraphs) > 1:
                messages += [{"role": USER, "content": "What else should I know?"}, {"role": ASSISTANT, "content": paragraphs[1]}]
            found.append(Document(conversation(messages).text, path.stem))
    return found


def python_packages() -> list[Document]:
    """Docstrings with the package that they come from as their class, as many of each; those of one file share a group."""
    by_package = {name: list(_docstrings(library_folder(), name)) for name in PACKAGES}
    most = min(map(len, by_package.values()))
    return [item for items in by_package.values() for item in _spread(items, most)]


def _docstrings(folder: Path, package: str) -> Iterator[Document]:
    seen = set()
    for path in sorted((folder / package).rglob("*.py")):
        if "test" in path.relative_to(folder).parts:
            continue
        for node in ast.walk(_parse(path)):
            text = ast.get_docstring(node) if isinstance(node, Definition | ast.Module) else None
            if text is not None and len(text) >= SHORTEST_CHARS and text not in seen:
                seen.add(text)
                yield Document(inspect.cleandoc(text), path.relative_to(folder).as_posix(), package)


def _spread(items: list[Document], count: int) -> list[Document]:
    """``count`` of the items, evenly spread, so that every file gives its share."""
    return [items[index * len(items) // count] for index in range(count)]


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"data: {path} cannot be read: {error}") from error


PYTHON_TEXTS: dict[str, Callable[[], list[Document]]] = {
    "python_topics": python_topics,
    "python_questions": python_questions,
    "python_packages": python_packages,
}
"""What comes with Python, by the name of its source."""


@dataclass(frozen=True, slots=True)
class PythonText:
    """Texts that come with Python.

    Args:
        kind: a key of ``PYTHON_TEXTS``.
    """

    kind: str

    def documents(self, warn: bool = False) -> Iterator[Document]:
        """Every text."""
        yield from PYTHON_TEXTS[self.kind]()

    def digest(self, said: Callable[[int], None]) -> str:
        """A digest of the texts, their groups and classes."""
        parts = [f"{item.group}\0{item.text}\0{item.label}\0" for item in self.documents()]
        return hashlib.sha256("".join(parts).encode(errors="surrogatepass")).hexdigest()

    def names(self) -> list[str]:
        """What a stream is known by; nothing streams these."""
        return [self.kind]

    def check(self) -> None:
        """See that they are here.

        Raises:
            UsageError: this Python comes without the sources of its library.
        """
        if self.kind != "python_topics":
            library_folder()
