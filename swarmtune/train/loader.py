"""Training batches in an order that can be taken up again at any batch.

The batches of a run are one endless sequence, a pure function of settings and seed: item ``index`` of pass ``epoch`` is always the same batch. A
position in it is all that a checkpoint needs, and nothing here ever draws from torch's global random numbers, so a run that was broken off and
resumed sees the batches and the random numbers of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from swarmtune.errors import UsageError
from swarmtune.train.forms import Rows
from swarmtune.train.windows import Batch

Position = tuple[int, int]
"""A pass over the data and a batch in it, both counted from 0."""
Item = tuple[int, int, Batch]
"""A batch behind its position."""


class Batches(Protocol):
    """An endless sequence of batches."""

    start: Position
    """Where the next iteration begins."""
    per_epoch: int | None
    """Batches of every pass; ``None`` where that is not known before."""

    def __iter__(self) -> Iterator[Item]:
        """The sequence from ``start`` on; in a worker process, that worker's share of it."""


class RowBatches(IterableDataset[Item]):
    """Batches of rows in memory, in a new order in each pass.

    Args:
        rows: what is put into batches.
        batch_size: rows per batch; the last batch of a pass may be smaller.
        seed: with the number of the pass, this alone decides the order.
        shuffle: if not, every pass is in the order of the rows.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, shuffle: bool = True) -> None:
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.start: Position = (0, 0)
        self.per_epoch: int | None = -(-len(rows) // batch_size)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        (epoch, first), turn = self.start, 0
        while True:
            order = self._order(epoch)
            for index in range(first, len(order)):
                if turn % workers == mine:
                    yield epoch, index, self.rows.batch(order[index])
                turn += 1
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> list[list[int]]:
        count = len(self.rows)
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(pass_seed(self.seed, epoch))) if self.shuffle else torch.arange(count)
        return [batch.tolist() for batch in mixed.split(self.batch_size)]


class InOrder(Dataset[Batch]):
    """Batches of rows in memory, in the order of the rows: one pass."""

    def __init__(self, rows: Rows, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.rows.batch(range(index * self.batch_size, min((index + 1) * self.batch_size, len(self.rows))))


def pass_seed(seed: int, epoch: int) -> int:
    """A seed of its own for each pass."""
    return (seed << 31) + epoch


class ResumableLoader:
    """What Lightning trains on: one pass over the batches for each iteration, resumable at any batch.

    Lightning keeps ``state_dict`` in a checkpoint and gives it back before the first batch of a resumed run. Of a checkpoint at the end of an epoch
    it may give nothing back but the number of the next epoch, through ``sampler``. That number cannot be trusted otherwise: an epoch that
    ``max_steps`` broke off is counted as whole, yet gone on with.

    Args:
        batches: the sequence; its ``per_epoch`` batches make an iteration. Where that is not known, an iteration goes on where the last one stopped.
        length: for the latter, how many batches an iteration has; no end if not given.
        num_workers: processes that make batches ahead; they change nothing in the sequence.
        trained: says how many batches of this epoch have been trained, so that one that was fetched and broken off is not counted as seen.
    """

    def __init__(self, batches: Any, *, length: int | None = None, num_workers: int = 0, trained: Callable[[], int] | None = None) -> None:
        self.batches: Batches = batches
        self.num_workers, self.trained = num_workers, trained
        self.length: int | None = batches.per_epoch if length is None else length
        self._before: Position = batches.start
        self._after: Position = batches.start
        self._continues = self._counts_alone = False  # after a position was loaded: go on there, and do not listen to Lightning's epochs
        self._taken, self._trained_before = 0, 0
        self._iterator: Any = None  # under this name Lightning finds it and stops its workers
        self._iterator_at: Position | None = None

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a stream without an end has no length")
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        self._begin()
        while self.length is None or self._taken < self.length:
            if self.batches.per_epoch is not None and self._after[1] >= self.batches.per_epoch:
                return
            epoch, index, batch = self._next()
            self._before, self._after = (epoch, index), (epoch, index + 1)
            whole = self.batches.per_epoch is not None and index + 1 == self.batches.per_epoch
            self._iterator_at = (epoch + 1, 0) if whole else self._after
            self._taken += 1
            yield batch

    def _begin(self) -> None:
        """Choose where this iteration begins, and have an iterator that stands there."""
        epoch, done = self._after
        self._taken, self._trained_before = 0, self.trained() if self.trained is not None else done
        epoch_is_over = done > 0 and (not self._continues or self._trained_before == 0)
        if self.batches.per_epoch is not None and (epoch_is_over or done >= self.batches.per_epoch):
            epoch, done = epoch + 1, 0
        self._before = self._after = (epoch, done)
        self._continues = False
        if self._iterator is not None and self._iterator_at == self._after:
            return
        self.close()
        self.batches.start = self._after
        options: dict[str, Any] = {"num_workers": self.num_workers, "multiprocessing_context": "spawn"} if self.num_workers else {}
        loader: Any = DataLoader(self.batches, batch_size=None, generator=torch.Generator(), **options)  # type: ignore[arg-type]
        self._iterator, self._iterator_at = iter(loader), self._after

    def _next(self) -> Item:
        try:
            item: Item = next(self._iterator)
        except UsageError as error:
            self.close()
            raise UsageError(_last_line(error)) from error
        return item

    def close(self) -> None:
        """Stop the worker processes, if there are any; an iteration that is under way has ended with this."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and self.num_workers:
            iterator._shutdown_workers()

    @property
    def sampler(self) -> ResumableLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be pass ``epoch``, unless a position was loaded; a stream goes on where it is in any case."""
        self._taken = 0
        if self.batches.per_epoch is not None and not self._counts_alone:
            self._before = self._after = (epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """The position behind the last batch that was trained."""
        broken_off = self.trained is not None and self._taken > 0 and self._taken > self.trained() - self._trained_before
        epoch, batches = self._before if broken_off else self._after
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; the next iteration begins there."""
        self._before = self._after = (int(state["epoch"]), int(state["batches"]))
        self._continues = self._counts_alone = True
        self._taken = 0


def _last_line(error: BaseException) -> str:
    """The sentence of an error, without the traceback that a worker process puts before it."""
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
