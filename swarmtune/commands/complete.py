"""The hidden verb ``__complete``: what may stand where the cursor is. It answers within a keystroke, so it imports nothing heavy."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.resources
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtune.cli import VERBS
from swarmtune.commands.bundled import groups
from swarmtune.config import PATH_GROUPS, VERBATIM, options
from swarmtune.own_recipe import ENDINGS
from swarmtune.schema import Config, Dtype, Quantize
from swarmtune.train.library_keys import OURS, annotation_names, peft_fields, trainer_flags

UNFINISHED = ("=", ".", "/")
"""How a reply ends that the user will go on with, so that no space follows it."""
SPECIAL = frozenset(" \t\"'\\$`&|;<>()*?[]{}!#")
"""What bash would read as something else, unless a backslash stands before it."""


def main(words: list[str]) -> int:
    """Print one reply per line; ``words`` are the shell's name and what its script passes on."""
    if words[:1] == ["bash"]:
        line = Line.parse(*words[1:3])
        for reply in candidates(line.words[1:-1], line.words[-1]) if len(line.words) > 1 else []:
            print(line.reply(reply))
        return 0
    rest = words[1:] or [""]
    if words[:1] == ["fish"]:
        rest[-1] = Line.parse(rest[-1], "").words[-1]  # fish hands over the last word with its quotes
    for reply in candidates(rest[:-1], rest[-1]):
        print(reply)
    return 0


@dataclass
class Line:
    """A command line of bash up to the cursor.

    Attributes:
        words: without their quotes; the last one is unfinished, and empty after a space.
        kept: how many characters of the last word bash keeps: up to its last word break or open quote.
        quote: the quote that is open at the cursor.
    """

    words: list[str]
    kept: int
    quote: str

    @classmethod
    def parse(cls, line: str, breaks: str) -> Line:
        """Split as bash does; ``breaks`` is ``COMP_WORDBREAKS``, because bash completes only what follows one of these."""
        words, kept, quote, escaped = [""], 0, "", False
        for letter in line:
            if escaped or (quote and letter != quote and not (letter == "\\" and quote == '"')):
                words[-1] += letter
                escaped = False
            elif letter == "\\":
                escaped = True
            elif letter in "'\"":
                quote, kept = ("", kept) if quote else (letter, len(words[-1]))
            elif letter.isspace():
                if words[-1]:
                    words.append("")
                    kept = 0
            else:
                words[-1] += letter
                kept = len(words[-1]) if letter in breaks else kept
        while len(words) > 1 and re.match(r"\w+=", words[0]):
            del words[0]  # variables set for this command only
        return cls(words, kept, quote)

    def reply(self, candidate: str) -> str:
        """What bash shall put after what it keeps of the last word."""
        rest = candidate[self.kept :]
        if self.quote:
            return rest
        return "".join(f"\\{letter}" if letter in SPECIAL else letter for letter in rest) + ("" if rest.endswith(UNFINISHED) else " ")


def candidates(before: list[str], current: str) -> list[str]:
    """Whole words that begin with ``current``, after the words ``before`` it (without ``swarmtune``)."""
    found = _first(current) if not before else _after(before[0], before[1:], current)
    return sorted({word for word in found if word.startswith(current) and "\n" not in word})


def _first(current: str) -> Iterable[str]:
    if current.startswith("-"):
        return ["--help", "--version", "-m"]
    plain = "=" not in current and "." not in current
    return [*VERBS, "recipe=", "resume="] if plain and not current.startswith(("+", "~")) else _settings([], current)


def _after(verb: str, before: list[str], current: str) -> Iterable[str]:
    if verb not in VERBS:
        return _settings([verb, *before], current)
    if verb == "serve":
        return _serve_settings(before, current)
    if before[-1:] and before[-1].startswith("--") and (choices := _flags(verb).get(before[-1])):
        return choices
    if current.startswith("-"):
        return ["--help", *_flags(verb)]
    words = [word for word in before if not word.startswith("-")]
    if verb in ("show", "validate"):
        return [*options("recipe"), *paths(current, ENDINGS)] if not words else _settings([f"recipe={words[0]}", *words[1:]], current)
    if verb == "cp" and not words:
        return options("recipe")
    if verb in ("ls", "completion"):
        return [] if words else groups() if verb == "ls" else ("bash", "fish", "zsh")
    return paths(current, None)


def _flags(verb: str) -> dict[str, list[str]]:
    """The options of a verb whose module tells them, each with the words that may follow it where these can be listed."""
    module = importlib.import_module(VERBS[verb][0])
    actions = module.parser()._actions if hasattr(module, "parser") else []
    return {name: list(action.choices or []) for action in actions for name in action.option_strings if name.startswith("--")}


def paths(current: str, endings: tuple[str, ...] | None) -> list[str]:
    """Directories, with a slash after each, and files with one of ``endings`` (any, if ``None``), as continuations of a typed path."""
    typed, _, begun = current.rpartition("/")
    typed = f"{typed}/" if "/" in current else ""
    try:
        entries = list(os.scandir(Path(typed or ".").expanduser()))
    except OSError:
        return []
    found = []
    for entry in entries:
        if not entry.name.startswith(begun) or (entry.name.startswith(".") and not begun.startswith(".")):
            continue
        if entry.is_dir():
            found.append(f"{typed}{entry.name}/")
        elif endings is None or entry.name.endswith(endings):
            found.append(typed + entry.name)
    return found


# --- keys and values ---------------------------------------------------------------------------------------------------------


def _settings(before: list[str], current: str) -> list[str]:
    """``key=`` and ``key=value`` of a training run."""
    sign = current[:1] if current[:1] in ("+", "~") else ""
    key, equals, value = current.removeprefix(sign).partition("=")
    if equals:
        return [f"{sign}{key}={word}" for word in _values(before, key, value)]
    given = {word.partition("=")[0] for word in before}
    return [sign + word for word in _keys(before, key) if word.removesuffix("=") not in given]


def _keys(before: list[str], key: str) -> list[str]:
    hints = typing.get_type_hints(Config)
    group, dot, _ = key.partition(".")
    if dot:
        return [f"{group}.{name}=" for name in _fields(before, group)]
    found = ["resume=", *(f"{name}=" for name in groups())]
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
            found.append(f"{name}.")
        elif name not in groups():
            found.append(f"{name}=")
    return found


def _fields(before: list[str], group: str) -> dict[str, Any]:
    """The keys of a group, with what tells their type: a hint, or the names in an annotation."""
    if group == "trainer":
        return {name: annotation_names(hint) for name, hint in trainer_flags().items() if name not in OURS}
    if group == "adapter":
        return {"path": set(), **{name: annotation_names(hint) for name, hint in peft_fields(_adapter_type(before)).items()}}
    hint = typing.get_type_hints(Config).get(group)
    return typing.get_type_hints(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else {}


def _adapter_type(before: list[str]) -> str:
    """The PEFT type that the words choose: ``adapter.peft_type=``, or what the chosen option of the group says."""
    chosen = dict(word.partition("=")[::2] for word in before)
    if kind := chosen.get("adapter.peft_type"):
        return kind
    option = chosen.get("adapter", "lora")
    if option not in options("adapter"):
        return ""
    text = importlib.resources.files("conf").joinpath("adapter", f"{option}.yaml").read_text(encoding="utf-8")
    found = re.search(r"^peft_type:\s*(\w+)", text, re.MULTILINE)
    return found[1] if found else ""


def _values(before: list[str], key: str, value: str) -> list[str]:
    if key in groups():
        files = {"recipe": ENDINGS, "data": None}.get(key, ())
        return [*options(key), *(paths(value, files) if key in (*PATH_GROUPS, "recipe") else [])]
    if key == "resume":
        return ["auto", *paths(value, ())]
    if key in VERBATIM:
        return paths(value, None if key in ("data.path", "data.chat_template_file") else ())
    group, _, name = key.rpartition(".")
    hints = _fields(before, group) if group else typing.get_type_hints(Config)
    return _values_of(hints.get(name))


def _values_of(hint: Any) -> list[str]:
    """The words that a value of a type may be, where they can be listed."""
    if isinstance(hint, set):
        return ["true", "false"] if "bool" in hint else []
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [word for part in typing.get_args(hint) for word in _values_of(part)]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [str(member.value) for member in hint]
    return ["true", "false"] if hint is bool else []


def _serve_settings(before: list[str], current: str) -> list[str]:
    """``key=`` and ``key=value`` of a server, whose schema lies in a package that is not imported here."""
    key, equals, value = current.partition("=")
    text = importlib.resources.files("conf").joinpath("server.yaml").read_text(encoding="utf-8")
    if equals:
        if key in ("model", "identity"):
            return [f"{key}={word}" for word in paths(value, () if key == "model" else None)]
        hint = {"dtype": Dtype, "quantize": Quantize}.get(key)
        listed = re.search(rf"^{re.escape(key)}: \w+ +# (\w+(?:, \w+)+)", text, re.MULTILINE)  # "tcp, quic, both" in the comment
        flag = re.search(rf"^{re.escape(key)}: (?:true|false)\b", text, re.MULTILINE)
        words = _values_of(hint) if hint else listed[1].split(", ") if listed else _values_of(bool) if flag else []
        return [f"{key}={word}" for word in words]
    given = {word.partition("=")[0] for word in before}
    names = [name for name in re.findall(r"^(\w+):", text, re.MULTILINE) if name not in (*given, "parent_fd", "defaults")]
    return ["--help", *(f"{name}=" for name in names)]
