"""The schema of the group ``data``: which texts, conversations or labelled texts, and how they become batches."""

from __future__ import annotations

import enum
import re
import string
from dataclasses import dataclass
from typing import Any


class Source(enum.Enum):
    """Where the data come from: texts that come with Python, or a dataset."""

    PYTHON_TOPICS = "python_topics"
    PYTHON_QUESTIONS = "python_questions"
    PYTHON_PACKAGES = "python_packages"
    DATASET = "dataset"


class Format(enum.Enum):
    """What a row is."""

    TEXT = "text"
    CHAT = "chat"
    LABELS = "labels"


class TrainOn(enum.Enum):
    """Which tokens of a conversation are learned."""

    COMPLETIONS = "completions"
    EVERYTHING = "everything"


class Packing(enum.Enum):
    """Whether several conversations share a row; ``auto`` does so where the model can keep them apart."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class TooLong(enum.Enum):
    """What happens to a conversation or labelled text that is longer than a row."""

    TRUNCATE = "truncate"
    DROP = "drop"


FORMAT_OF = {Source.PYTHON_TOPICS: Format.TEXT, Source.PYTHON_QUESTIONS: Format.CHAT, Source.PYTHON_PACKAGES: Format.LABELS}
"""What the texts that come with Python are."""
ONLY_FOR: dict[str, tuple[Format, ...]] = {
    "text_column": (Format.TEXT, Format.LABELS),
    "text_template": (Format.TEXT, Format.LABELS),
    "label_column": (Format.LABELS,),
    "label_names": (Format.LABELS,),
    "messages_column": (Format.CHAT,),
    "role_field": (Format.CHAT,),
    "content_field": (Format.CHAT,),
    "prompt_column": (Format.CHAT,),
    "completion_column": (Format.CHAT,),
    "chat_template": (Format.CHAT,),
    "chat_template_file": (Format.CHAT,),
    "train_on": (Format.CHAT,),
    "packing": (Format.CHAT,),
    "too_long": (Format.CHAT, Format.LABELS),
}
"""Keys that say nothing in the other formats."""
DATASET_ONLY = (
    *("path", "name", "revision", "text_column", "text_template", "label_column", "label_names", "messages_column", "role_field", "content_field"),
    *("prompt_column", "completion_column", "split", "validation_split", "validation_path", "streaming"),
)
"""Keys that say nothing about texts that come with Python."""


def need(ok: bool, sentence: str) -> None:
    """Refuse a value; ``sentence`` begins with the field's name, and the full key is put before it."""
    if not ok:
        raise ValueError(sentence)


def template_columns(template: str) -> list[str]:
    """The columns that ``"{question} {answer}"`` names.

    Raises:
        ValueError: none, or anything but plain names in the braces.
    """
    example = "such as '{question} {answer}'"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"text_template cannot be read: {error}; columns stand in braces, {example}") from error
    names = [name for _, name, _, _ in parts if name is not None]
    plain = all(re.fullmatch(r"[^\W\d][\w -]*", name) and not spec and not conversion for _, name, spec, conversion in parts if name is not None)
    need(bool(names) and plain, f"text_template must hold names of columns in braces, {example}, and nothing but names; got {template!r}")
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how they are cut."""

    source: Source = Source.PYTHON_TOPICS
    """What comes with Python (help topics, questions about its library, docstrings by package), or anything that ``datasets`` reads."""
    format: Format = Format.TEXT
    """What a row is: a ``text``, a conversation (``chat``), or a text with its class (``labels``)."""
    path: str | None = None
    """For ``dataset``: a json, jsonl, parquet, csv, tsv, txt or arrow file, a pattern (``a/*.csv``), a directory, a saved dataset, a hub id."""
    name: str | None = None
    """Which configuration of a hub dataset, or of a directory with a dataset card."""
    revision: str | None = None
    """Which commit, branch or tag of a hub dataset."""
    text_column: str = "text"
    """The column that holds the text."""
    text_template: str | None = None
    """Text made of several columns instead, such as ``{question}\\n{answer}``; ``\\n`` is a line break."""
    label_column: str = "label"
    """For ``labels``: the column that holds the class: text, a whole number, or true and false."""
    label_names: tuple[str, ...] | None = None
    """For ``labels``: every class, in the order of the model's outputs; those that occur, sorted, if not given. A stream needs it."""
    messages_column: str = "messages"
    """For ``chat``: the column that holds a list of messages."""
    role_field: str = "role"
    """For ``chat``: the field of a message that says who speaks; ``human`` is taken for ``user``, ``gpt`` for ``assistant``."""
    content_field: str = "content"
    """For ``chat``: the field of a message that holds what is said."""
    prompt_column: str | None = None
    """For ``chat``: a column with the prompt, instead of messages: a text, or a list of messages."""
    completion_column: str | None = None
    """For ``chat``: the column with its completion, likewise."""
    chat_template: str | None = None
    """For ``chat``: the Jinja text that renders a conversation, instead of the tokenizer's own; a plain one is used where it has none."""
    chat_template_file: str | None = None
    """For ``chat``: a file with that text."""
    train_on: TrainOn = TrainOn.COMPLETIONS
    """For ``chat``: learn what the assistant says, or everything."""
    packing: Packing = Packing.AUTO
    """For ``chat``: put several conversations into a row, kept apart by their positions: exact for rotary models, refused for others."""
    too_long: TooLong = TooLong.TRUNCATE
    """What is longer than ``sequence_length``: its end is cut off, or it is left out; either is counted and said."""
    split: str = "train"
    """The split that is trained on, of data that has several."""
    validation_fraction: float = 0.15
    """Share of the text held out for validation, by whole documents, unless one of the next two is given."""
    validation_split: str | None = None
    """Another split of the same data, for validation."""
    validation_path: str | None = None
    """Other data of any kind that ``path`` takes, for validation."""
    validation_windows: int | None = None
    """Rows of validation data at most; all if not given, and 256 of a stream."""
    streaming: bool = False
    """Read while training, holding only ``shuffle_windows``: for data too long to be prepared. Needs ``trainer.max_steps``."""
    shuffle_windows: int = 1024
    """Of a stream, how many rows are held to draw the next one from."""
    sequence_length: int = 128
    """Tokens of a row: exactly, for windows of text and packed conversations; at most, for others."""
    batch_size: int = 8
    """Rows per batch."""
    num_workers: int = 0
    """Processes that prepare training batches; rows are ready in memory, so 0 is rarely slower. A stream takes 1 at most."""
    cache: bool = True
    """Keep the tokens of prepared data on disk for the next run."""
    cache_dir: str | None = None
    """Where; ``$XDG_CACHE_HOME/swarmtune`` or ``~/.cache/swarmtune`` if not given."""

    def __post_init__(self) -> None:
        need(self.source is not Source.DATASET or bool(self.path), "path must name a file, a directory or a hub id")
        need(0 < self.validation_fraction < 1, f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        need(self.sequence_length >= 2, f"sequence_length must be at least 2, got {self.sequence_length}")
        need(self.sequence_length <= 1 << 15, f"sequence_length must be at most {1 << 15}, got {self.sequence_length}")
        for name, low in (("batch_size", 1), ("num_workers", 0), ("shuffle_windows", 1), ("validation_windows", 1)):
            value = getattr(self, name)
            need(value is None or value >= low, f"{name} must be at least {low}, got {value}")
        self._refuse_other_formats()
        self._refuse_ignored()
        for name in ("split", "validation_split"):
            value = getattr(self, name)
            need(value is None or re.fullmatch(r"\w+([.-]\w+)*", value) is not None, f"{name} must be the name of a split, got {value!r}")
        if self.text_template is not None:
            template_columns(self.text_template)
        names = self.label_names
        need(names is None or len(set(names)) == len(names) >= 2, f"label_names must list two different classes or more, got {list(names or ())}")

    def _changed(self, name: str) -> bool:
        default: Any = getattr(type(self), name)
        return bool(getattr(self, name) != default)

    def _refuse_other_formats(self) -> None:
        """Refuse a key of another format, and texts of another format than the one that is asked for."""
        own = FORMAT_OF.get(self.source, self.format)
        fitting = next((source.value for source, other in FORMAT_OF.items() if other is self.format), "")
        need(own is self.format, f"format={self.format.value} needs data=PATH or ID, or data={fitting}: {self.source.value} is no such data")
        for name, formats in ONLY_FOR.items():
            words = " or ".join(f"data.format={item.value}" for item in formats)
            need(self.format in formats or not self._changed(name), f"{name} needs {words}: it says nothing about data.format={self.format.value}")
        both = (self.prompt_column is None) == (self.completion_column is None)
        need(both, "prompt_column and data.completion_column go together: give both, or neither")
        for name in ("messages_column", "chat_template_file"):
            other = "prompt_column" if name == "messages_column" else "chat_template"
            unused = getattr(self, other) is not None and self._changed(name)
            need(not unused, f"{name} says nothing beside data.{other}")
        streamed = self.streaming and self.format is Format.LABELS
        need(not streamed or self.label_names is not None, "label_names must be given for a stream: nobody knows before which classes it holds")

    def _refuse_ignored(self) -> None:
        """Refuse a key that would change nothing beside the others."""
        for name in DATASET_ONLY:
            unused = self.source is not Source.DATASET and self._changed(name)
            need(not unused, f"{name} needs data=PATH or ID: it says nothing about the texts that come with Python")
        apart = [name for name in ("validation_split", "validation_path") if getattr(self, name) is not None]
        need(len(apart) < 2, "validation_split and data.validation_path exclude each other: validation text comes from one place")
        unused = bool(apart) and self.validation_fraction != type(self).validation_fraction
        need(not unused, f"validation_fraction says nothing beside data.{''.join(apart)}: no text is cut off then")
        need(self.validation_split != self.split, f"validation_split must be another split than data.split, got {self.split!r} for both")
        need(self.text_template is None or self.text_column == "text", "text_column says nothing beside data.text_template")
        need(self.streaming or self.shuffle_windows == type(self).shuffle_windows, "shuffle_windows needs data.streaming=true")
        need(not self.streaming or self.num_workers <= 1, f"num_workers must be 0 or 1 for a stream, got {self.num_workers}")
        need(self.cache or self.cache_dir is None, "cache_dir says nothing beside data.cache=false")
        need(not self.streaming or self.cache_dir is None, "cache_dir says nothing beside data.streaming=true: a stream is not kept")
