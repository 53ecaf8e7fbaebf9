"""The ledger holds the chain to its plan, and the verdict on its history sees every way to break it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtune.errors import NotExact, UsageError
from swarmtune.remote.ledger import History, Ledger, Page
from swarmtune.remote.verdict import Verdict, judge, judge_lines
from swarmtune.types import BlockSpan


class Lines:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.at = 0.0

    def write(self, fields: dict[str, Any]) -> None:
        self.at += 0.5
        self.lines.append({"t": self.at, **fields})

    def close(self) -> None:
        self.write({"event": "close"})


def page_of(lines: Lines, micro: int = 1, blocks: int = 4) -> Page:
    return Ledger(lines).open([(index, 1) for index in range(micro)], blocks)  # type: ignore[arg-type]


def done(page: Page, span: str, micro: int = 0, way: Any = "forward", replay: bool = False) -> None:
    blocks = BlockSpan.parse(span)
    page.accept(page.ask(micro, way, blocks, "peer", 30.0, replay), micro, blocks, replay)


def forward(page: Page, *spans: str) -> None:
    page.begin("forward")
    for span in spans:
        done(page, span)
    page.end("forward")


def verdict_of(write: Callable[[Page], None], change: Callable[[list[dict[str, Any]]], None] = lambda lines: None) -> Verdict:
    lines = Lines()
    write(page_of(lines))
    lines.close()
    change(lines.lines)
    return judge_lines(lines.lines)


def test_a_plan_that_is_kept_is_clean_and_counted() -> None:
    def write(page: Page) -> None:
        forward(page, "0:2", "2:4")
        page.begin("backward", 1)
        number = page.ask(0, "backward", BlockSpan(2, 4), "peer", 30.0, False)
        page.fail(number, "it died")
        done(page, "2:4", way="backward")
        done(page, "0:1", replay=True)
        done(page, "1:2", way="backward")
        page.end("backward", 1)

    found = verdict_of(write)
    assert found.clean
    assert found.counts() == {
        "lost": 0,
        "doubled": 0,
        "out_of_plan": 0,
        "over_deadline": 0,
        "unended": 0,
        "passes": 2,
        "given_up": 0,
        "tries": 6,
        "failed": 1,
    }


@given(st.lists(st.integers(1, 7), max_size=6, unique=True), st.permutations(range(7)))
def test_any_cut_in_any_order_is_whole(cuts: list[int], order: list[int]) -> None:
    edges = [0, *sorted(cuts), 8]
    spans = [BlockSpan(a, b) for a, b in itertools.pairwise(edges)]
    lines = Lines()
    page = page_of(lines, blocks=8)
    page.begin("forward")
    for span in sorted(spans, key=lambda span: order[span.start % 7]):
        done(page, str(span))
    page.end("forward")
    assert judge_lines(lines.lines).clean


def test_blocks_that_are_accepted_twice_are_refused() -> None:
    page = page_of(Lines())
    page.begin("forward")
    done(page, "0:3")
    with pytest.raises(NotExact, match="blocks 2:4 of micro-batch 0 of call 0 were about to be counted twice, 0:3 had been accepted"):
        done(page, "2:4")


@pytest.mark.parametrize(("spans", "lacking"), [((), "0:4"), (("0:2",), "0:4"), (("2:4",), "0:2"), (("0:1", "2:4"), "0:2")])
def test_a_pass_with_a_gap_does_not_end(spans: tuple[str, ...], lacking: str) -> None:
    page = page_of(Lines())
    with pytest.raises(NotExact, match=f"the forward of micro-batch 0 of call 0 lacks blocks {lacking}"):
        forward(page, *spans)


def test_a_backward_needs_no_blocks_below_the_lowest_that_learns_and_may_have_some() -> None:
    for spans in (["2:4"], ["1:2", "2:4"], ["0:4"]):
        page = page_of(Lines())
        page.begin("backward", 2)
        for span in spans:
            done(page, span, way="backward")
        page.end("backward", 2)


def test_each_micro_batch_needs_its_own() -> None:
    page = page_of(Lines(), micro=2)
    page.begin("forward")
    done(page, "0:4", micro=0)
    with pytest.raises(NotExact, match="micro-batch 1"):
        page.end("forward")


def test_a_second_backward_is_a_pass_of_its_own() -> None:
    lines = Lines()
    page = page_of(lines)
    forward(page, "0:4")
    for _ in range(2):
        page.begin("backward")
        done(page, "0:4", way="backward")
        page.end("backward")
    assert judge_lines(lines.lines).passes == 3


def drop(event: str, number: int = 0) -> Callable[[list[dict[str, Any]]], None]:
    def change(lines: list[dict[str, Any]]) -> None:
        del lines[[index for index, line in enumerate(lines) if line["event"] == event][number]]

    return change


def repeat(event: str) -> Callable[[list[dict[str, Any]]], None]:
    def change(lines: list[dict[str, Any]]) -> None:
        index = next(index for index, line in enumerate(lines) if line["event"] == event)
        lines.insert(index, dict(lines[index]))

    return change


def ask_again(lines: list[dict[str, Any]]) -> None:
    """The same blocks are asked for and accepted once more."""
    index = next(index for index, line in enumerate(lines) if line["event"] == "accept")
    ask = next(line for line in lines if line["event"] == "ask")
    lines[index + 1 : index + 1] = [{**ask, "number": 99}, {**lines[index], "number": 99}]


def late(lines: list[dict[str, Any]]) -> None:
    for line in lines[next(index for index, line in enumerate(lines) if line["event"] == "accept") :]:
        line["t"] += 40.0


def fail_first(lines: list[dict[str, Any]]) -> None:
    index = next(index for index, line in enumerate(lines) if line["event"] == "accept")
    lines.insert(index, {**lines[index], "event": "fail"})


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        (drop("accept"), "lost", "ended without blocks [0, 1]"),
        (ask_again, "doubled", "blocks 0:2 of micro-batch 0 were accepted twice"),
        (drop("ask"), "out_of_plan", "was not under way"),
        (repeat("accept"), "out_of_plan", "had been accepted before"),
        (fail_first, "out_of_plan", "had failed before"),
        (drop("plan"), "out_of_plan", "began without a plan"),
        (repeat("end"), "out_of_plan", "ended that was not under way"),
        (late, "over_deadline", "after its deadline of 30.0 s"),
        (drop("end"), "unended", "the forward (pass 0) of call 0 never ended"),
        (drop("accept", 1), "unended", "ended while tries [1] were under way"),
    ],
)
def test_the_verdict_sees(change: Callable[[list[dict[str, Any]]], None], field: str, sentence: str) -> None:
    found = verdict_of(lambda page: forward(page, "0:2", "2:4"), change)
    assert not found.clean
    assert any(sentence in each for each in getattr(found, field)), found


def test_a_pass_that_is_given_up_is_no_loss() -> None:
    def write(page: Page) -> None:
        page.begin("forward")
        page.fail(page.ask(0, "forward", BlockSpan(0, 4), "peer", 30.0, False), "gone")
        page.give_up("forward", "nobody serves blocks 0:4")

    found = verdict_of(write)
    assert found.clean
    assert (found.given_up, found.passes) == (1, 0)


def test_a_history_of_a_killed_client_goes_on_after_its_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    script = (
        "import sys, os, signal; from swarmtune.remote.ledger import *; from swarmtune.types import BlockSpan\n"
        "page = Ledger(History(sys.argv[1])).open([(0, 1)], 4)\n"
        "page.begin('forward'); page.ask(0, 'forward', BlockSpan(0, 4), 'peer', 30.0, False)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=60)
    with path.open("a") as file:
        file.write('{"t":1.0,"event":"acc')  # as a full disk or a crash of the machine leaves it
    ledger = Ledger(History(path))
    forward(ledger.open([(0, 1)], 4), "0:4")
    ledger.close()
    found = judge(path)
    assert found.clean, found
    assert (found.tries, found.passes) == (2, 1)
    assert [json.loads(line)["pid"] for line in path.read_text().splitlines() if '"open"' in line][1] == os.getpid()


@pytest.mark.parametrize("text", ['{"event": "open"}\nnonsense\n{"event": "close"}\n', "[1, 2]\n{}\n", '{"no": "event"}\n{"event": "close"}\n'])
def test_a_file_that_is_no_history_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"line [12]: not a line of a history"):
        judge(path)


def test_paths_that_cannot_be_read_or_written_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no history can be read"):
        judge(tmp_path / "absent")
    with pytest.raises(UsageError, match="the history cannot be written"):
        History(tmp_path / "absent" / "history.jsonl")
