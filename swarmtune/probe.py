"""Stand-in layers that show what a model gives to its layers, so that a cut can be compared with the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Given:
    """What one call of a layer was given.

    Attributes:
        hidden_BTH: its hidden states.
        others: all other arguments, by position or name.
    """

    hidden_BTH: Tensor
    others: dict[int | str, Any]


class StandIn(nn.Module):
    """Returns its input plus a constant tensor, keeps what it was given, and says of itself what a layer says (``marks``)."""

    def __init__(self, marks: Mapping[str, str], output_items: int, added_BTH: Tensor | None = None) -> None:
        super().__init__()
        vars(self).update(marks)
        self.output_items, self.added_BTH = output_items, added_BTH
        self.given: list[Given] = []

    def forward(self, hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Keep the arguments; the hidden states go on, changed by what was asked for."""
        others: dict[int | str, Any] = dict(enumerate(args))
        others.update(kwargs)
        self.given.append(Given(hidden_BTH.clone(), others))
        output_BTH = hidden_BTH if self.added_BTH is None else hidden_BTH + self.added_BTH
        return as_output(output_BTH, self.output_items, self.added_BTH)


def as_output(hidden_BTH: Tensor, items: int, rest: Tensor | None = None) -> Tensor | tuple[Tensor | None, ...]:
    """Hidden states in the form in which a loop over layers expects them: bare (0 items), or first in a tuple whose other items are ``rest``."""
    return (hidden_BTH, *(rest,) * (items - 1)) if items else hidden_BTH


def first_difference(whole: Sequence[Given], cut: Sequence[Given]) -> str | None:
    """The name of the first argument that differs between two runs of a layer; ``None`` where all are alike to the bit."""
    if len(whole) != len(cut):
        return "call"
    for one, other in zip(whole, cut, strict=True):
        if not same(one.hidden_BTH, other.hidden_BTH):
            return "hidden states"
        if one.others.keys() != other.others.keys():
            return "arguments"
        for name, value in one.others.items():
            if not same(value, other.others[name]):
                return str(name)
    return None


def carrier(given: Sequence[Given]) -> str | None:
    """The name of an argument through which layers could hand something to each other; ``None`` where there is none."""
    return next((str(name) for call in given for name, value in call.others.items() if not _is_plain(value)), None)


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are alike, tensors to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and bool(one == other)


def _is_plain(value: Any) -> bool:
    """Whether a value is data only, with nothing that a layer could write into unseen."""
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return bool(value) and all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, Tensor | str | int | float | torch.dtype | torch.Size)
