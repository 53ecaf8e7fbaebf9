"""What documents are to a model: how they become tokens, rows and batches. Text is here; ``chat`` and ``labels`` have files of their own."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from swarmtune.train.documents import Document
from swarmtune.train.windows import Batch, Windows, cut, flat, stack, window

Tensors = Mapping[str, Tensor]
"""What is prepared and kept of one side: flat tensors by name."""


class Rows(Protocol):
    """The rows of one side, in memory."""

    def __len__(self) -> int:
        """How many."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of them as a batch."""

    def identity(self) -> list[Any]:
        """Digests and numbers that decide every row, as plain values."""


class Collector(Protocol):
    """Takes the tokens of one side, document by document."""

    def add(self, encoded: Any) -> None:
        """Take what ``Form.encode`` made of a document."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it, to be prepared once and kept."""


class Form(Protocol):
    """One format of data. Holds plain values, so that it travels to worker processes; the tokenizer is handed in."""

    def identity(self, tokenizer: Any) -> list[Any]:
        """Plain values that decide tokens, besides the documents and the tokenizer."""

    def encode(self, documents: Sequence[Document], tokenizer: Any) -> Iterable[Any]:
        """The tokens of each document, with whatever else is said of them."""

    def collector(self, tokenizer: Any) -> Collector:
        """An empty one."""

    def rows(self, tensors: Tensors, side: str, tokenizer: Any, limit: int | None = None) -> Rows:
        """The rows of ``side`` (``training`` or ``validation``), at most ``limit``."""

    def stream(self, encoded: Iterable[Any], tokenizer: Any) -> Iterator[Any]:
        """Rows as they come, in memory one at a time."""

    def batch(self, rows: Sequence[Any], tokenizer: Any) -> Batch:
        """Rows of ``stream`` as a batch."""


def pad_token(tokenizer: Any) -> int:
    """The token that fills rows; its value never reaches a loss."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


class TextForm:
    """Documents laid end to end, each followed by the end token, and cut into windows of ``length`` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def identity(self, tokenizer: Any) -> list[Any]:
        """Nothing else decides the tokens: they are cut later."""
        return ["text"]

    def encode(self, documents: Sequence[Document], tokenizer: Any) -> Iterable[list[int]]:
        """The tokens of each."""
        texts = [item.text for item in documents]
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return found

    def collector(self, tokenizer: Any) -> Collector:
        """Takes tokens as one flat stream."""
        return _FlatStream(tokenizer.eos_token_id)

    def rows(self, tensors: Tensors, side: str, tokenizer: Any, limit: int | None = None) -> Windows:
        """The windows of the stream."""
        return Windows(tensors["tokens"], self.length, pad_token(tokenizer), limit)

    def stream(self, encoded: Iterable[list[int]], tokenizer: Any) -> Iterator[Tensor]:
        """Windows, (T,) in int32; the last may be shorter."""
        return cut(encoded, self.length, tokenizer.eos_token_id)

    def batch(self, rows: Sequence[Tensor], tokenizer: Any) -> Batch:
        """Windows as a batch, (B, T)."""
        return stack([window(item, self.length, pad_token(tokenizer)) for item in rows])


class _FlatStream:
    """Tokens end to end, with ``end`` behind each document if there is one."""

    def __init__(self, end: int | None) -> None:
        self.end, self.tokens = end, array("i")

    def add(self, encoded: list[int]) -> None:
        """Take a document."""
        self.tokens.extend(encoded)
        if self.end is not None:
            self.tokens.append(self.end)

    def tensors(self) -> dict[str, Tensor]:
        """The stream, in int32."""
        return {"tokens": flat(self.tokens)}


class HeldRows:
    """Rows of a stream that are held in memory.

    Args:
        form: makes batches of them.
        held: what ``form.stream`` gave.
        tokenizer: the model's.
    """

    def __init__(self, form: Form, held: Sequence[Any], tokenizer: Any) -> None:
        self.form, self.held, self.tokenizer = form, held, tokenizer

    def __len__(self) -> int:
        return len(self.held)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of them as a batch."""
        return self.form.batch([self.held[index] for index in indices], self.tokenizer)

    def identity(self) -> list[Any]:
        """None: what is taken from a stream is not the whole of it."""
        raise NotImplementedError("a stream is known by its settings")
