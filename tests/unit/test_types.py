"""Spans and kwargs are checked at birth."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarmtune.errors import KwargError, UsageError
from swarmtune.types import BlockSpan, Kwarg, gaps

SPANS = st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda pair: BlockSpan(pair[0], pair[0] + pair[1]))


def blocks(span: BlockSpan | None) -> set[int]:
    return set(range(span.start, span.stop)) if span else set()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (4, 4), (5, 4), (-1, 3), (-3, -1)])
def test_an_empty_or_negative_span_cannot_be_made(start: int, stop: int) -> None:
    with pytest.raises(UsageError, match="0 <= start < stop"):
        BlockSpan(start, stop)


@pytest.mark.parametrize(("text", "span"), [("4:8", (4, 8)), (" 0 : 1 ", (0, 1)), ("00:010", (0, 10))])
def test_a_span_is_read_from_text(text: str, span: tuple[int, int]) -> None:
    assert BlockSpan.parse(text) == BlockSpan(*span)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "4:",
        ":8",
        "4-8",
        "4:8:2",
        "a:b",
        "-1:3",
        "4.0:8",
        "8:4",
        "4:4",
        "1e1:20",
        "٤:٨٨٨٨٨٨٨٨٨٨",
        "9" * 10 + ":1",
        "4:8\n5",
        None,
        4,
        ["4:8"],
    ],
)
def test_other_text_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(UsageError):
        BlockSpan.parse(text)


def test_yamls_sexagesimal_reading_of_a_span_is_refused_and_explained() -> None:
    with pytest.raises(UsageError, match=r"quoted string.*248"):
        BlockSpan.parse(248)


@given(SPANS)
def test_a_span_prints_as_it_is_read(span: BlockSpan) -> None:
    assert BlockSpan.parse(str(span)) == span
    assert pickle.loads(pickle.dumps(span)) == span
    assert len(span) == len(blocks(span))
    assert {block for block in range(-1, 20) if block in span} == blocks(span)


@given(SPANS, SPANS)
def test_overlap_and_cover_are_those_of_sets(one: BlockSpan, other: BlockSpan) -> None:
    assert blocks(one.overlap(other)) == blocks(one) & blocks(other)
    assert one.covers(other) == (blocks(one) >= blocks(other))


@given(st.lists(SPANS, max_size=6), st.integers(1, 16))
def test_gaps_are_the_maximal_spans_that_nobody_covers(spans: list[BlockSpan], num_blocks: int) -> None:
    found = gaps(spans, num_blocks)
    served = set().union(*map(blocks, spans)) if spans else set()
    assert set().union(*map(blocks, found)) if found else set() == set(range(num_blocks)) - served
    assert all(earlier.stop < later.start for earlier, later in itertools.pairwise(found))
    assert sum(map(len, found)) == len(set(range(num_blocks)) - served)


def test_a_kwarg_takes_what_it_is_told_and_guesses_nothing() -> None:
    kwarg = Kwarg("prompt", torch.zeros(4, 4), {"batch": 0}, "2:4")
    assert kwarg.span(8) == BlockSpan(2, 4)
    assert Kwarg("prompt", torch.zeros(4, 4), blocks=3).span(8) == BlockSpan(3, 4)
    assert Kwarg("prompt", torch.zeros(4, 4)).span(8) == BlockSpan(0, 8)
    assert Kwarg("prompt", torch.zeros(4, 4)).axes == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": ""}, "1 to 512 printable"), ({"name": "x" * 513}, "1 to 512 printable"), ({"name": "a\nb"}, "printable"),
        ({"name": None}, "printable"),
        ({"axes": {"rows": 0}}, "axes may be"), ({"axes": {"batch": 2}}, "outside a tensor"), ({"axes": {"batch": -1}}, "outside a tensor"),
        ({"axes": {"batch": "0"}}, "outside a tensor"),
        ({"axes": {"batch": 0, "sequence": 0}}, "same axis"), ({"tensor": torch.zeros(()), "axes": {"batch": 0}}, "outside a tensor"),
        ({"blocks": True}, "blocks must be"), ({"blocks": 1.0}, "blocks must be"), ({"blocks": (1, 2)}, "blocks must be"),
    ],
)  # fmt: skip
def test_a_kwarg_that_means_nothing_cannot_be_made(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KwargError, match=sentence):
        Kwarg(**{"name": "prompt", "tensor": torch.zeros(4, 4), **changes})


@pytest.mark.parametrize("where", ["7:9", 8, "3", "x", -1, "4:2"])
def test_blocks_outside_the_model_are_refused_by_name(where: str | int) -> None:
    with pytest.raises(KwargError, match="kwarg prompt"):
        Kwarg("prompt", torch.zeros(2, 2), blocks=where).span(8)
