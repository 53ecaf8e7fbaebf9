"""Several sequences in one row, kept apart by positions that begin again at 0.

Called without a mask, the library reads positions that begin again as the beginnings of sequences, and lets no attention cross them. That is exact
where all that a model knows of positions comes from ``position_ids``, as in rotary models. Whether it is for the model at hand is measured, on its
own blocks, before anything is packed.
"""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swarmtune.errors import UsageError
from swarmtune.train.examples import Example
from swarmtune.train.windows import IGNORED_LABEL, Batch

PROBE_LENGTHS = (6, 9)
"""Tokens of the two sequences on which packing is tried."""
TOLERANCE = 0.1
"""Packed, the second of them must differ from itself alone by less than this share of what it would differ if it saw the first one."""


def plan_rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which sequences share a row of ``length`` tokens: the longest first, each into the fullest row that has room.

    Args:
        sizes: tokens of each sequence, at most ``length``.
        length: T.

    Returns:
        Their numbers, row by row; within a row, and from row to row, in the order of the data.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # room that is left, and row, in order
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        place = bisect.bisect_left(spaces, (sizes[index], -1))
        if place == len(spaces):
            rows.append([index])
            space, row = length, len(rows) - 1
        else:
            space, row = spaces.pop(place)
            rows[row].append(index)
        if (left := space - sizes[index]) > 0:
            bisect.insort(spaces, (left, row))
    return sorted(sorted(row) for row in rows)


def fill_rows(examples: Iterable[Example], length: int) -> Iterator[list[Example]]:
    """Rows of a stream: examples as they come, as many as have room."""
    row: list[Example] = []
    used = 0
    for example in examples:
        if row and used + len(example) > length:
            yield row
            row, used = [], 0
        row.append(example)
        used += len(example)
    if row:
        yield row


def pack_rows(rows: Sequence[Sequence[Example]], length: int, fill: int) -> Batch:
    """Rows of several examples as a batch (B, T): ``input_ids``, ``position_ids`` and ``labels``.

    The first token of an example is predicted from nothing. What fills a row up stands at position 0, token by token, so it is seen by nobody.
    """
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, fill, dtype=torch.int64),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED_LABEL, dtype=torch.int64),
    }
    for row, examples in enumerate(rows):
        begin = 0
        for example in examples:
            end = begin + len(example)
            ids_S = torch.tensor(example.tokens, dtype=torch.int64)
            batch["input_ids"][row, begin:end] = ids_S
            batch["position_ids"][row, begin:end] = torch.arange(len(example))
            batch["labels"][row, begin + 1 : end] = ids_S.where(torch.tensor(example.learned), torch.tensor(IGNORED_LABEL))[1:]
            begin = end
    return batch


def real_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch, without those that fill it up; every packed sequence has two tokens or more."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "position_ids" not in batch:
        return batch["input_ids"].numel()
    first_BT = batch["position_ids"] == 0
    next_first_BT = torch.cat([first_BT[:, 1:], torch.ones_like(first_BT[:, :1])], dim=1)
    return int((~(first_BT & next_first_BT)).sum())


# --- which models can --------------------------------------------------------------------------------------------------------


def why_not(model: Any) -> str | None:
    """Why sequences that share a row would not be apart in this model; ``None`` where they are.

    Two short sequences are run, packed and each alone. Costs three small forwards.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{model.config.model_type} takes no position_ids"
    vocabulary = int(model.config.get_text_config().vocab_size)
    first, second = PROBE_LENGTHS
    ids_T = (torch.arange(first + second) * 7919 + 11) % vocabulary
    restarting_T = torch.cat([torch.arange(first), torch.arange(second)])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = _last_logits(model, ids_T, restarting_T, second)
            joined = _last_logits(model, ids_T, torch.arange(first + second), second)
            alone = _last_logits(model, ids_T[first:], torch.arange(second), second)
    finally:
        model.train(was_training)
    if (packed - alone).norm() <= TOLERANCE * (joined - alone).norm():
        return None
    return f"in {model.config.model_type} a sequence sees what stands before it in its row, whatever its positions say"


def _last_logits(model: Any, ids_T: Tensor, positions_T: Tensor, last: int) -> Tensor:
    logits_TV: Tensor = model(input_ids=ids_T[None].to(model.device), position_ids=positions_T[None].to(model.device), use_cache=False).logits[0]
    return logits_TV[-last:].float()


def choose_packing(wanted: str, model: Any, tell: Callable[[str], None] = print) -> str:
    """``always`` or ``never``, for a value of ``data.packing``.

    Args:
        wanted: the value.
        model: the client's part of the model, its blocks within reach.
        tell: told why ``auto`` means never.

    Raises:
        UsageError: ``always``, for a model that cannot.
    """
    if wanted == "never":
        return wanted
    reason = why_not(model)
    if reason is None:
        return "always"
    if wanted == "always":
        raise UsageError(f"data.packing=always is not possible: {reason}; with data.packing=auto each conversation has a row of its own")
    tell(f"conversations are not packed, each has a row of its own: {reason}")
    return "never"
