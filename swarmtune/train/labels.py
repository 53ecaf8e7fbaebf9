"""Labelled texts as rows: the tokens of a text, and the number of its class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from swarmtune.errors import UsageError
from swarmtune.train.documents import Document
from swarmtune.train.examples import Example, ExampleCollector, Examples, Fitter, pad
from swarmtune.train.forms import Collector, Tensors, pad_token
from swarmtune.train.windows import Batch, tensor_digest

MOST_CLASSES = 1000
"""More different values than this are no classes."""
Labelled = tuple[Example, str]
"""A text, and the name of its class."""


class LabelForm:
    """Texts of at most ``length`` tokens with their classes.

    Args:
        length: T.
        names: every class, in the order of the model's outputs; those of the training texts, sorted, if empty.
        drop: leave out what is too long, instead of cutting off its end.
    """

    def __init__(self, length: int, names: list[str], *, drop: bool = False) -> None:
        self.length, self.names, self.drop = length, names, drop

    def identity(self, tokenizer: Any) -> list[Any]:
        """Nothing else decides the tokens."""
        return ["labels"]

    def encode(self, documents: Sequence[Document], tokenizer: Any) -> Iterable[Labelled]:
        """The tokens of each text, with the name of its class.

        A model reads its answer at the last token that does not fill: a text must not end in one that looks like it.
        """
        fill = pad_token(tokenizer)
        coded = tokenizer([item.text for item in documents], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for item, tokens in zip(documents, coded, strict=True):
            while tokens and tokens[-1] == fill:
                tokens.pop()
            yield Example(tokens, [True] * len(tokens)), item.label

    def collector(self, tokenizer: Any) -> Collector:
        """Takes texts and their classes."""
        return _LabelCollector()

    def rows(self, tensors: Tensors, side: str, tokenizer: Any, limit: int | None = None) -> LabelRowsInMemory:
        """The rows; what is cut off or left out is counted and said."""
        return LabelRowsInMemory(self, tensors, side, pad_token(tokenizer), limit)

    def stream(self, encoded: Iterable[Labelled], tokenizer: Any) -> Iterator[Labelled]:
        """Texts as they come."""
        fitter = self.fitter()
        for example, label in encoded:
            fitted = fitter.fit(example)
            fitter.report("a pass of the stream so far")
            if fitted is not None:
                yield fitted, label

    def batch(self, rows: Sequence[Labelled], tokenizer: Any) -> Batch:
        """Rows as a batch: ``input_ids`` and ``attention_mask``, (B, T), and ``labels``, (B,)."""
        return self.to_batch(rows, self.names, pad_token(tokenizer))

    def to_batch(self, rows: Sequence[Labelled], names: Sequence[str], fill: int) -> Batch:
        """Rows as a batch, as long as the longest of them."""
        padded = pad((example for example, _ in rows), fill)
        return {**padded, "labels": torch.tensor([number_of(label, names) for _, label in rows])}

    def fitter(self) -> Fitter:
        """Makes texts fit."""
        return Fitter(self.length, self.drop, noun="texts", predicted=False)


def number_of(label: str, names: Sequence[str]) -> int:
    """The number of a class.

    Raises:
        UsageError: there is no such class.
    """
    if label not in names:
        raise UsageError(f"data: there is no class {label!r}; there are: {', '.join(names[:20])} (those of the training texts, or data.label_names)")
    return names.index(label)


class _LabelCollector:
    """Takes labelled texts one by one; the names of classes are kept as JSON, in bytes."""

    def __init__(self) -> None:
        self.examples = ExampleCollector()
        self.classes: dict[str, int] = {}
        self.numbers: list[int] = []

    def add(self, encoded: Labelled) -> None:
        """Take one.

        Raises:
            UsageError: there are too many classes.
        """
        example, label = encoded
        self.examples.add(example)
        self.numbers.append(self.classes.setdefault(label, len(self.classes)))
        if len(self.classes) > MOST_CLASSES:
            raise UsageError(f"data: more than {MOST_CLASSES} different classes, such as {label[:40]!r}: does data.label_column hold classes?")

    def tensors(self) -> dict[str, Tensor]:
        """Those of the texts; ``classes``, numbers in the order in which classes first came, and their ``names``."""
        names = torch.frombuffer(bytearray(json.dumps(list(self.classes)).encode()), dtype=torch.uint8).clone()
        return {**self.examples.tensors(), "classes": torch.tensor(self.numbers, dtype=torch.int32), "names": names}


class LabelRowsInMemory:
    """The rows of one side."""

    def __init__(self, form: LabelForm, tensors: Tensors, side: str, fill: int, limit: int | None) -> None:
        self.form, self.fill = form, fill
        self.examples = Examples(tensors["tokens"], tensors["learned"], tensors["ends"])
        self.classes_N, self._come = tensors["classes"], list(json.loads(bytes(tensors["names"].tolist())))
        fitter = form.fitter()
        self.kept = [index for index in range(len(self.examples)) if fitter.fit(self.examples[index]) is not None][:limit]
        fitter.report(side)
        if not form.names:  # those of the training texts, which are laid into rows first
            form.names = sorted(self._come)
        for label in self._come:
            number_of(label, form.names)

    @property
    def names(self) -> list[str]:
        """The names of the classes, in the order of a model's outputs."""
        return self.form.names

    def __len__(self) -> int:
        return len(self.kept)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of them as a batch."""
        fitter = self.form.fitter()
        rows = []
        for index in (self.kept[place] for place in indices):
            if (fitted := fitter.fit(self.examples[index])) is not None:
                rows.append((fitted, self._come[int(self.classes_N[index])]))
        return self.form.to_batch(rows, self.names, self.fill)

    def identity(self) -> list[Any]:
        """Digests of all texts and their classes, and what makes rows of them."""
        kept = (self.examples.tokens_M, self.examples.ends_N, self.classes_N)
        return ["labels", *map(tensor_digest, kept), self._come, self.names, self.form.length, self.form.drop, len(self.kept)]
