"""Batches of a stream that is too long to be prepared, or has no end: read, tokenised and packed as they are needed.

What is held at once is a buffer of rows. Which documents are held out hangs on their text alone. To go on at a batch of a pass, the pass is read
again from its begin and as many batches are left out, because only the text says where a row begins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from swarmtune.errors import UsageError
from swarmtune.train.documents import Document, falls_to_validation
from swarmtune.train.forms import Form
from swarmtune.train.loader import Item, Position
from swarmtune.train.prepare import load_tokenizer, tokenise
from swarmtune.train.sources import Source


def side(source: Source, fraction: float | None, validation: bool) -> Iterator[Document]:
    """The documents of one side; all of them where ``fraction`` is ``None``."""
    for document in source.documents():
        if fraction is None or falls_to_validation(document.digest, fraction) == validation:
            yield document


def stream_rows(source: Source, fraction: float | None, validation: bool, form: Form, tokenizer: Any) -> Iterator[Any]:
    """The rows of one side in the order of the data."""
    pairs = tokenise(side(source, fraction, validation), form, tokenizer)
    yield from form.stream((encoded for _, encoded in pairs), tokenizer)


class StreamBatches(IterableDataset[Item]):
    """Batches of a stream; plain values, so that a worker process can be given it.

    Args:
        source: where text comes from.
        fraction: share of the documents that is left out for validation; ``None`` if none is.
        tokenizer: directory or hub id of the model's tokenizer.
        form: what documents become.
        batch_size: rows per batch.
        seed: with the number of the pass, this decides how rows are mixed.
        buffer: rows among which the next one is drawn.
    """

    per_epoch: int | None = None

    def __init__(self, source: Source, fraction: float | None, tokenizer: str, form: Form, batch_size: int, seed: int, buffer: int) -> None:
        self.source, self.fraction, self.tokenizer, self.form = source, fraction, tokenizer, form
        self.batch_size, self.seed, self.buffer = batch_size, seed, buffer
        self.start: Position = (0, 0)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise UsageError("a stream is read by one process: set data.num_workers to 0 or 1")
        tokenizer = load_tokenizer(self.tokenizer)
        epoch, first = self.start
        while True:
            index, batch = 0, []
            for row in self._mixed(tokenizer, epoch):
                batch.append(row)
                if len(batch) == self.batch_size:
                    if index >= first:
                        yield epoch, index, self.form.batch(batch, tokenizer)
                    index, batch = index + 1, []
            if batch:
                if index >= first:
                    yield epoch, index, self.form.batch(batch, tokenizer)
                index += 1
            if index < max(first, 1):
                raise UsageError(f"the stream ended after {index} batches in pass {epoch}, where at least {max(first, 1)} were expected")
            epoch, first = epoch + 1, 0

    def _mixed(self, tokenizer: Any, epoch: int) -> Iterator[Any]:
        """The rows of one pass, each drawn at random from a full buffer."""
        draw = random.Random(f"{self.seed}/{epoch}")
        held: list[Any] = []
        for row in stream_rows(self.source, self.fraction, False, self.form, tokenizer):
            if len(held) < self.buffer:
                held.append(row)
                continue
            place = draw.randrange(len(held))
            yield held[place]
            held[place] = row
        draw.shuffle(held)
        yield from held
