"""Every error pickles with its data, and the tree in the docstring is the real tree."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from swarmtune import errors
from swarmtune.errors import (
    BlocksUnserved,
    GraphLost,
    NonFinite,
    PeerBusy,
    PeerCutOff,
    PeerDraining,
    PeerFault,
    PeerSlow,
    SwarmtuneError,
    TensorsLost,
)
from swarmtune.types import BlockSpan

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
EXAMPLES: dict[str, list[SwarmtuneError]] = {
    "NonFinite": [NonFinite("NaN in the loss", 3), NonFinite("outside")],
    "BlocksUnserved": [BlocksUnserved("nobody serves 2:4", (BlockSpan(2, 4), BlockSpan(6, 8))), BlocksUnserved("nobody")],
    "PeerFault": [PeerFault("12D3KooW", BlockSpan(0, 4), "it is busy"), PeerFault("12D3KooW", None, "gone")],
    "PeerBusy": [PeerBusy("12D3KooW", BlockSpan(0, 4), "no room", 0.5)],
    "PeerDraining": [PeerDraining("12D3KooW", BlockSpan(0, 4), "it is shutting down")],
    "GraphLost": [GraphLost("12D3KooW", BlockSpan(0, 4), "no graph is kept under handle 7")],
    "TensorsLost": [TensorsLost("12D3KooW", BlockSpan(0, 4), "no tensor is kept")],
    "PeerCutOff": [PeerCutOff("12D3KooW", BlockSpan(0, 4), "the p2p daemon ended")],
    "PeerSlow": [PeerSlow("12D3KooW", None, "no answer")],
}


def tree_of_docstring() -> dict[str, str | None]:
    """Class to parent, as drawn."""
    parents: dict[str, str | None] = {}
    stack: list[str] = []
    for line in str(errors.__doc__).splitlines():
        match = re.match(r"^ {4}([│├└─ ]*)([A-Z]\w+)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        parents[match[2]] = stack[depth - 1] if depth else None
        stack[depth:] = [match[2]]
    return parents


def test_the_tree_in_the_docstring_is_the_real_tree() -> None:
    real = {name: (value.__base__.__name__ if value.__base__ is not Exception else None) for name, value in CLASSES.items()}
    assert tree_of_docstring() == real


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_pickles_and_copies_with_its_attributes(name: str) -> None:
    for error in EXAMPLES.get(name) or [CLASSES[name]("one clear sentence")]:
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(again) is type(error)
            assert str(again) == str(error)
            assert vars(again) == vars(error)


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_caught_by_the_root_and_documented(name: str) -> None:
    assert issubclass(CLASSES[name], SwarmtuneError)
    assert inspect.getdoc(CLASSES[name])


def test_errors_raised_elsewhere_pickle_too() -> None:
    from servers.executor import Busy, Expired
    from swarmtune.transport.base import TransportError

    for kind in (Busy, Expired, TransportError):
        error = pickle.loads(pickle.dumps(kind("why")))
        assert type(error) is kind
        assert str(error) == "why"
        assert isinstance(error, SwarmtuneError)


def test_a_peer_fault_names_the_peer_the_blocks_and_the_cause() -> None:
    assert str(PeerFault("12D3KooW", BlockSpan(0, 4), "it is busy")) == "peer 12D3KooW failed blocks 0:4: it is busy"
    assert str(PeerFault("12D3KooW", None, "gone")) == "peer 12D3KooW failed: gone"
