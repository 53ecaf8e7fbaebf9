"""What a row of a dataset is: a text, a conversation, or a text with its class.

A conversation travels as JSON, the text of its document; so everything that reads, splits and streams documents needs to know nothing of messages.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from swarmtune.data_schema import template_columns
from swarmtune.errors import UsageError
from swarmtune.train.documents import Document

USER, ASSISTANT = "user", "assistant"
ROLES = {"human": USER, "gpt": ASSISTANT}
"""Other words for the two roles that data sets use."""
Message = dict[str, Any]
"""``role``, ``content`` and whatever else a chat template reads."""


class RowReader(Protocol):
    """Makes a document of the values of some columns; plain values, so that it travels to worker processes."""

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""

    @property
    def keys(self) -> str:
        """The keys of the configuration that name them."""

    @property
    def noun(self) -> str:
        """What a row without them lacks."""

    def document(self, values: Sequence[Any], place: str) -> Document | None:
        """The document of a row; ``None`` where there is nothing in it.

        Raises:
            UsageError: a value is not what the column must hold; ``place`` is named.
        """


@dataclass(frozen=True, slots=True)
class TextRows:
    """The text of one column, or of several that ``template`` puts together; equal texts share a group."""

    column: str = "text"
    template: str | None = None
    noun = "text"

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [self.column] if self.template is None else template_columns(self.template)

    @property
    def keys(self) -> str:
        """The key of the configuration that names them."""
        return "data.text_column" if self.template is None else "data.text_template"

    def document(self, values: Sequence[Any], place: str) -> Document | None:
        """The text, unless a value is missing or all is blank."""
        if any(value is None for value in values):
            return None
        allowed = (str,) if self.template is None else (str, int, float)
        for column, value in zip(self.columns, values, strict=True):
            if not isinstance(value, allowed):
                raise UsageError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
        text = str(values[0]) if self.template is None else self._fill(self.template, values)
        return Document(text, text) if text.strip() else None

    def _fill(self, template: str, values: Sequence[Any]) -> str:
        named = dict(zip(self.columns, values, strict=True))
        parts = string.Formatter().parse(template)
        return "".join(literal + (str(named[name]) if name is not None else "") for literal, name, _, _ in parts)


@dataclass(frozen=True, slots=True)
class LabelRows:
    """A text and its class, which is text, a whole number, or true and false."""

    text: TextRows
    label: str = "label"
    noun = "text or class"

    @property
    def columns(self) -> list[str]:
        """The columns that are read, the class last."""
        return [*self.text.columns, self.label]

    @property
    def keys(self) -> str:
        """The keys of the configuration that name them."""
        return f"{self.text.keys} and data.label_column"

    def document(self, values: Sequence[Any], place: str) -> Document | None:
        """The text with its class, unless either is missing."""
        found, label = self.text.document(values[:-1], place), values[-1]
        if label is not None and not isinstance(label, str | int):
            raise UsageError(f"{place}: column {self.label!r} holds {type(label).__name__}, not a class (text, a whole number, true or false)")
        name = "" if label is None else str(label).strip()
        return Document(found.text, found.group, name) if found is not None and name else None


@dataclass(frozen=True, slots=True)
class ChatRows:
    """A conversation: a list of messages, or a prompt and its completion; conversations that begin with the same prompt share a group.

    Args:
        messages: the column of messages.
        prompt: the column of prompts, if they stand apart; texts or lists of messages.
        completion: the column of completions, likewise.
        role: the field of a message that says who speaks.
        content: the field that holds what is said.
    """

    messages: str = "messages"
    prompt: str | None = None
    completion: str | None = None
    role: str = "role"
    content: str = "content"
    noun = "conversation"

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [self.prompt, self.completion] if self.prompt is not None and self.completion is not None else [self.messages]

    @property
    def keys(self) -> str:
        """The keys of the configuration that name them."""
        return "data.messages_column" if self.prompt is None else "data.prompt_column and data.completion_column"

    def document(self, values: Sequence[Any], place: str) -> Document | None:
        """The conversation as JSON, unless a column is empty or the assistant says nothing."""
        if any(value is None or (isinstance(value, str) and not value.strip()) for value in values):
            return None
        roles = [""] if self.prompt is None else [USER, ASSISTANT]
        parts = [self._read(value, role, f"{place}: column {column!r}") for value, role, column in zip(values, roles, self.columns, strict=True)]
        found = [message for part in parts for message in part]
        if not any(message["role"] == ASSISTANT for message in found):
            return None
        return conversation(found)

    def _read(self, value: Any, role: str, place: str) -> list[Message]:
        """Messages of one column; a text is one of ``role``, or JSON where it stands for all of them."""
        if isinstance(value, str) and role:
            return [{"role": role, "content": value}]
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UsageError(f"{place} holds text, not a list of messages") from error
        if isinstance(value, Mapping) and value and all(isinstance(item, list) for item in value.values()):  # how some versions of arrow data say it
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        if not isinstance(value, list):
            raise UsageError(f"{place} holds {type(value).__name__}, not a list of messages")
        return [self._message(item, place) for item in value]

    def _message(self, item: Any, place: str) -> Message:
        if not isinstance(item, Mapping) or not isinstance(item.get(self.role), str):
            there = f"; it has: {', '.join(map(str, item))}" if isinstance(item, Mapping) else f", but is {type(item).__name__}"
            raise UsageError(f"{place}: a message needs the text field {self.role!r}{there} (set data.role_field and data.content_field)")
        content = item.get(self.content)
        others = {name: value for name, value in item.items() if name not in (self.role, self.content) and value is not None}
        if content is None and not others:
            raise UsageError(f"{place}: a message has no field {self.content!r}; it has: {', '.join(map(str, item))} (set data.content_field)")
        if not isinstance(content, str | None):
            raise UsageError(f"{place}: the field {self.content!r} of a message holds {type(content).__name__}, not text")
        said = {} if content is None else {"content": content}
        return {"role": ROLES.get(item[self.role], item[self.role]), **said, **others}


def conversation(messages: Sequence[Message]) -> Document:
    """A conversation as a document: JSON as its text, what stands before the assistant's first words as its group."""
    first = next((place for place, message in enumerate(messages) if message["role"] == ASSISTANT), len(messages))
    return Document(_json(messages), _json(messages[:first]) if first else _json(messages))


def _json(messages: Sequence[Message]) -> str:
    return json.dumps(list(messages), ensure_ascii=False, default=str)


def messages_of(document: Document) -> list[Message]:
    """The messages of a conversation that travels as a document."""
    found: list[Message] = json.loads(document.text)
    return found
