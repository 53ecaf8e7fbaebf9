"""Batches of a stream that is too long to be prepared, or has no end: read, tokenised and packed as they are needed.

What is held at once is a buffer of windows. Which documents are held out hangs on their text alone. To go on at a batch of a pass, the pass is read
again from its begin and as many batches are left out, because only the text says where a window begins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from swarmtune.errors import UsageError
from swarmtune.train.documents import Document, falls_to_validation
from swarmtune.train.loader import Item, Position
from swarmtune.train.prepare import load_tokenizer, pad_token, tokenise
from swarmtune.train.sources import Source
from swarmtune.train.windows import cut, stack, window


def side(source: Source, fraction: float | None, validation: bool) -> Iterator[Document]:
    """The documents of one side; all of them where ``fraction`` is ``None``."""
    for document in source.documents():
        if fraction is None or falls_to_validation(document.digest, fraction) == validation:
            yield document


def stream_windows(source: Source, fraction: float | None, validation: bool, tokenizer: Any, length: int) -> Iterator[Tensor]:
    """The windows of one side in the order of the data, (T,) in int32; the last may be shorter."""
    pairs = tokenise(side(source, fraction, validation), tokenizer)
    yield from cut((tokens for _, tokens in pairs), length, tokenizer.eos_token_id)


class StreamBatches(IterableDataset[Item]):
    """Batches of a stream; plain values, so that a worker process can be given it.

    Args:
        source: where text comes from.
        fraction: share of the documents that is left out for validation; ``None`` if none is.
        tokenizer: directory or hub id of the model's tokenizer.
        length: T.
        batch_size: windows per batch.
        seed: with the number of the pass, this decides how windows are mixed.
        buffer: windows among which the next one is drawn.
    """

    per_epoch: int | None = None

    def __init__(self, source: Source, fraction: float | None, tokenizer: str, length: int, batch_size: int, seed: int, buffer: int) -> None:
        self.source, self.fraction, self.tokenizer, self.length = source, fraction, tokenizer, length
        self.batch_size, self.seed, self.buffer = batch_size, seed, buffer
        self.start: Position = (0, 0)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UsageError("a stream is read by one process: set data.num_workers to 0 or 1")
        tokenizer = load_tokenizer(self.tokenizer)
        pad = pad_token(tokenizer)
        epoch, first = self.start
        while True:
            index, batch = 0, []
            for tokens_S in self._mixed(tokenizer, epoch):
                batch.append(tokens_S)
                if len(batch) == self.batch_size:
                    if index >= first:
                        yield epoch, index, stack([window(item, self.length, pad) for item in batch])
                    index, batch = index + 1, []
            if batch:
                if index >= first:
                    yield epoch, index, stack([window(item, self.length, pad) for item in batch])
                index += 1
            if index < max(first, 1):
                raise UsageError(f"the stream ended after {index} batches in pass {epoch}, where at least {max(first, 1)} were expected")
            epoch, first = epoch + 1, 0

    def _mixed(self, tokenizer: Any, epoch: int) -> Iterator[Tensor]:
        """The windows of one pass, each drawn at random from a full buffer."""
        draw = random.Random(f"{self.seed}/{epoch}")
        held: list[Tensor] = []
        for tokens_S in stream_windows(self.source, self.fraction, False, tokenizer, self.length):
            if len(held) < self.buffer:
                held.append(tokens_S)
                continue
            place = draw.randrange(len(held))
            yield held[place]
            held[place] = tokens_S
        draw.shuffle(held)
        yield from held
