"""Sequences of tokens of their own length, each with what is to be learned of it: conversations and labelled texts."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from swarmtune.train.windows import IGNORED_LABEL, Batch, flat

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: its tokens, and for each whether it is learned."""

    tokens: Sequence[int]
    learned: Sequence[bool]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Fitter:
    """Makes examples fit into rows of ``length`` tokens, and counts what that costs.

    An example that is too long loses its end, or is left out if ``drop``. One of which nothing is left to learn is left out too: where tokens are
    ``predicted``, each from the one before, the first never is.
    """

    length: int
    drop: bool
    noun: str = "conversations"
    predicted: bool = True
    seen: int = 0
    cut: int = 0
    too_long: int = 0
    mute: int = 0
    said: set[str] = field(default_factory=set)

    def fit(self, example: Example) -> Example | None:
        """The example, its beginning, or ``None`` where it is left out."""
        self.seen += 1
        long = len(example) > self.length
        if long and self.drop:
            self.too_long += 1
            return None
        if long:
            example = replace(example, tokens=example.tokens[: self.length], learned=example.learned[: self.length])
        if not any(example.learned[int(self.predicted) :]):
            self.mute += 1
            return None
        self.cut += long
        return example

    def report(self, side: str) -> None:
        """Say what was cut off and left out; of a stream, whose end nobody knows, that it begins to happen."""
        limit = f"longer than data.sequence_length={self.length}"
        for count, what in (
            (self.cut, f"{limit}: their ends are cut off"),
            (self.too_long, f"{limit}: left out"),
            (self.mute, f"without a token to learn in the first {self.length}: left out"),
        ):
            if count and what not in self.said:
                self.said.add(what)
                log.warning("%d of %d %s for %s are %s", count, self.seen, self.noun, side, what)


class Examples:
    """Examples as flat tensors, which is how they are kept.

    Args:
        tokens_M: all tokens end to end, in int32.
        learned_M: whether each is learned.
        ends_N: where each example ends, in int64.
    """

    def __init__(self, tokens_M: Tensor, learned_M: Tensor, ends_N: Tensor) -> None:
        self.tokens_M, self.learned_M, self.ends_N = tokens_M, learned_M, ends_N

    def __len__(self) -> int:
        return len(self.ends_N)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, end = int(self.ends_N[index - 1]) if index else 0, int(self.ends_N[index])
        return Example(self.tokens_M[begin:end].tolist(), self.learned_M[begin:end].tolist())


class ExampleCollector:
    """Takes examples one by one; see ``Examples`` for what comes of them."""

    def __init__(self) -> None:
        self.tokens, self.learned, self.ends = array("i"), bytearray(), array("q")

    def add(self, encoded: Example) -> None:
        """Take one."""
        self.tokens.extend(encoded.tokens)
        self.learned.extend(bytes(encoded.learned))
        self.ends.append(len(self.tokens))

    def tensors(self) -> dict[str, Tensor]:
        """``tokens`` in int32, ``learned`` in bool, ``ends`` in int64."""
        learned = torch.frombuffer(self.learned, dtype=torch.bool).clone() if self.learned else torch.empty(0, dtype=torch.bool)
        return {"tokens": flat(self.tokens), "learned": learned, "ends": torch.tensor(self.ends, dtype=torch.int64)}


def pad(examples: Iterable[Example], fill: int) -> Batch:
    """Examples as rows (B, T), T being the longest, filled up on the right; labels are ignored where nothing is learned."""
    rows = list(examples)
    length = max(map(len, rows))
    batch = {
        "input_ids": torch.full((len(rows), length), fill, dtype=torch.int64),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.int64),
        "labels": torch.full((len(rows), length), IGNORED_LABEL, dtype=torch.int64),
    }
    for row, example in enumerate(rows):
        ids_S = torch.tensor(example.tokens, dtype=torch.int64)
        batch["input_ids"][row, : len(ids_S)] = ids_S
        batch["attention_mask"][row, : len(ids_S)] = 1
        batch["labels"][row, 1 : len(ids_S)] = ids_S.where(torch.tensor(example.learned), torch.tensor(IGNORED_LABEL))[1:]
    return batch
