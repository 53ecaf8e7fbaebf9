"""Conversations as text, by a chat template, and which of its tokens the assistant has said.

The library's own ``return_assistant_tokens_mask`` asks which token holds a character. Where a tokenizer leaves spaces out of its offsets the answer
is none, and the mask is too long or empty without an error. So the template is rendered by the library, and the tokens are found here.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarmtune.errors import UsageError
from swarmtune.train.rows import ASSISTANT, Message

MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Where a template begins to say what the assistant does."""
Span = tuple[int, int]
"""Characters of a text, half-open."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja text, and where it comes from."""

    text: str
    origin: str

    @property
    def marked(self) -> bool:
        """Whether it marks what the assistant says with ``{% generation %}``."""
        return MARKER.search(self.text) is not None

    def render(self, messages: Sequence[Message], special: Mapping[str, Any], prompt: bool = False) -> tuple[str, list[Span]]:
        """A conversation as text, and the marked parts of it; none for a template without marks.

        Args:
            messages: what has been said.
            special: the tokenizer's special tokens by name.
            prompt: end with what makes the assistant speak.

        Raises:
            UsageError: the template fails on these messages.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # the library says that a text comes back, but it is a list of texts with a list of spans for each
            found: Any = render_jinja_template(
                [list(messages)], chat_template=self.text, return_assistant_tokens_mask=self.marked, add_generation_prompt=prompt, **special
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            shown = " ".join(str(messages[0].get("content", "")).split())[:60] if messages else ""
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"the chat template ({self.origin}) fails on the conversation that begins with {shown!r}: {reason}") from error
        texts, spans = found
        return str(texts[0]), [(int(begin), int(end)) for begin, end in spans[0]] if self.marked else []

    def assistant_spans(self, messages: Sequence[Message], special: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """A conversation as text, and what of it the assistant says, from behind what makes it speak to the end of its turn.

        Where the template has no marks, this is what a turn adds to the text of the turns before it.

        Raises:
            UsageError: a turn changes the text before it, so that nothing says what it adds.
        """
        text, spans = self.render(messages, special)
        if self.marked:
            return text, spans
        for place, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before, _ = self.render(messages[:place], special, prompt=True)
            through, _ = self.render(messages[: place + 1], special)
            if not (text.startswith(through) and through.startswith(before)):
                raise UsageError(
                    f"the chat template ({self.origin}) has no {{% generation %}} marks, and a later turn changes the text of an earlier one, so it "
                    "cannot be told which tokens are the assistant's: give a template with marks in data.chat_template_file, or set "
                    "data.train_on=everything"
                )
            spans.append((len(before), len(through)))
        return text, spans


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """Which template: a text, a file, else the tokenizer's own, else the plain one that comes along."""

    text: str | None = None
    file: str | None = None

    def of(self, tokenizer: Any) -> ChatTemplate:
        """The template.

        Raises:
            UsageError: the file cannot be read, or the tokenizer has several templates and none is the default.
        """
        if self.text is not None:
            return ChatTemplate(self.text, "data.chat_template")
        if self.file is not None:
            try:
                return ChatTemplate(Path(self.file).expanduser().read_text(encoding="utf-8"), self.file)
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
                raise UsageError(f"data.chat_template_file: {self.file} cannot be read: {reason}") from error
        if not tokenizer.chat_template:
            plain = importlib.resources.files("swarmtune").joinpath("assets", "chat_template.jinja").read_text(encoding="utf-8")
            return ChatTemplate(plain, "the plain one that comes with swarmtune")
        try:
            return ChatTemplate(tokenizer.get_chat_template(), "the tokenizer's own")
        except ValueError as error:
            raise UsageError("the tokenizer has several chat templates and no default one: give one in data.chat_template_file") from error


def learned_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, whether it holds a character of ``spans``.

    Args:
        offsets: the characters of each token, in order; where a tokenizer leaves leading spaces out, they are given back to the token.
        spans: parts of the text, in order and apart.
    """
    found, reached, place = [], 0, 0
    for begin, end in offsets:
        begin = min(begin, reached)
        while place < len(spans) and spans[place][1] <= begin:
            place += 1
        found.append(place < len(spans) and end > spans[place][0])
        reached = max(reached, end)
    return found
