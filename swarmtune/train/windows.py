"""Windows of a token stream: how documents are laid end to end and cut."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED_LABEL = -100
"""The label that Hugging Face losses skip."""
Batch = dict[str, Tensor]
"""What a model is called with, in int64: of text, ``input_ids``, ``attention_mask`` and ``labels``, each (T,) or (B, T)."""


def pack(documents: Iterable[Sequence[int]], end: int | None) -> Tensor:
    """The tokens of all documents, each followed by ``end`` if there is one: a flat tensor in int32."""
    stream = array("i")
    for tokens in documents:
        stream.extend(tokens)
        if end is not None:
            stream.append(end)
    return flat(stream)


def flat(stream: array[int]) -> Tensor:
    """An array as a tensor in int32, copied."""
    return torch.frombuffer(stream, dtype=torch.int32).clone() if len(stream) else torch.empty(0, dtype=torch.int32)


def window(tokens_S: Tensor, length: int, pad: int) -> Batch:
    """One window of at most ``length`` tokens, filled up with ``pad``; what fills is masked, and ignored in the labels."""
    size = len(tokens_S)
    ids_T = torch.full((length,), pad, dtype=torch.int64)
    ids_T[:size] = tokens_S
    mask_T = (torch.arange(length) < size).to(torch.int64)
    return {"input_ids": ids_T, "attention_mask": mask_T, "labels": ids_T.masked_fill(mask_T == 0, IGNORED_LABEL)}


def tensor_digest(tensor: Tensor) -> str:
    """A digest of the bytes of a flat tensor."""
    return hashlib.sha256(tensor.numpy().data).hexdigest()


def stack(windows: Sequence[Batch]) -> Batch:
    """Windows as one batch."""
    return {name: torch.stack([item[name] for item in windows]) for name in windows[0]}


def cut(documents: Iterable[Sequence[int]], length: int, end: int | None) -> Iterator[Tensor]:
    """The windows of a stream as it comes, (T,) in int32, in memory one at a time; the last may be shorter, but never a single token."""
    stream = array("i")
    for tokens in documents:
        stream.extend(tokens)
        if end is not None:
            stream.append(end)
        whole = len(stream) - len(stream) % length
        yield from flat(stream[:whole]).view(-1, length)
        del stream[:whole]
    if len(stream) > 1:
        yield flat(stream)


class Windows(Dataset[Batch]):
    """Fixed windows of a flat stream of tokens, built when they are asked for.

    Args:
        tokens_M: the whole stream, in int32.
        length: T.
        pad: token that fills the last window.
        limit: how many windows at most.
    """

    def __init__(self, tokens_M: Tensor, length: int, pad: int, limit: int | None = None) -> None:
        if len(tokens_M) % length == 1:
            tokens_M = tokens_M[:-1]  # alone in its window it has nothing to predict, and its loss would be 0 / 0
        self.tokens_M = tokens_M if limit is None else tokens_M[: limit * length]
        self.length, self.pad = length, pad

    def __len__(self) -> int:
        return -(-len(self.tokens_M) // self.length)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some of them as a batch, (B, T)."""
        return stack([self[index] for index in indices])

    def identity(self) -> list[Any]:
        """What decides every window: a digest of the stream, and T."""
        return [tensor_digest(self.tokens_M), self.length]

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return window(self.tokens_M[index * self.length : (index + 1) * self.length], self.length, self.pad)
