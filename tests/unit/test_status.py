"""What a run shows of its swarm: the status line, the events of a step, the file of events."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import TextColumn

from swarmtune.remote.events import KEPT_EVENTS, EventKind, EventLog, SwarmEvent, SwarmStatus, Waiting
from swarmtune.remote.totals import ServerTotals
from swarmtune.swarm import SwarmTraffic
from swarmtune.train import events_file
from swarmtune.train.callbacks import Meter, flat_totals
from swarmtune.train.events_file import EventsFile
from swarmtune.train.status import SwarmProgress, status_line, troubles
from swarmtune.types import BlockSpan

ROUTE = (("alpha", BlockSpan(0, 4)), ("beta", BlockSpan(4, 8)))


def status(**changes: object) -> SwarmStatus:
    fields = {"route": ROUTE, "slow": (), "waiting": None, "retries": 0, "events": {}, "last": None}
    return SwarmStatus(**{**fields, **changes})  # type: ignore[arg-type]


def waiting(left_s: float, what: str = "nobody serves blocks 4:8 of 0:8") -> Waiting:
    return Waiting(what, time.monotonic() + left_s)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"route": ()}, ""),
        ({}, "alpha 0:4 -> beta 4:8"),
        ({"retries": 1}, "alpha 0:4 -> beta 4:8  1 retry"),
        ({"retries": 2, "slow": ("gamma", "delta")}, "alpha 0:4 -> beta 4:8  2 retries  slow: gamma, delta"),
        ({"route": tuple((f"s{n}", BlockSpan(n, n + 1)) for n in range(9))}, "s0 0:1 -> 7 servers -> s8 8:9"),
    ],
)
def test_the_line_says_route_retries_and_who_is_slow(changes: dict[str, object], line: str) -> None:
    assert status_line(status(**changes)) == line


def test_a_wait_counts_down_and_control_characters_of_peers_do_not_reach_the_terminal() -> None:
    found = troubles(status(waiting=waiting(23.4, "nobody serves\x1b[31m blocks")))
    assert found == ["nobody serves [31m blocks: 23 s left"]
    assert status_line(status(waiting=Waiting("x", time.monotonic() - 5))).endswith("0 s left")


def test_the_bar_shows_the_status_below_and_draws_it_anew_while_nobody_calls_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    bar = SwarmProgress(TextColumn("{task.description}"), console=console, refresh_per_second=50)
    bar.statuses = lambda: [status(waiting=waiting(23.0, "nobody [bold]serves[/bold] blocks 4:8"))]
    bar.add_task("training", total=3)
    with bar:
        time.sleep(0.3)  # as the main thread does inside a backward
        bar.statuses = lambda: [status(retries=7)]
        time.sleep(0.3)
    assert "nobody [bold]serves[/bold] blocks 4:8: 2" in out.getvalue()
    assert "alpha 0:4 -> beta 4:8  7 retries" in out.getvalue()


def log_of(count: int) -> EventLog:
    log = EventLog()
    for number in range(count):
        log.add(EventKind.FAILED, f"number {number}", server="alpha", span=BlockSpan(0, 4), lost_s=0.5)
    return log


def test_an_event_log_keeps_the_latest_and_sums_all() -> None:
    log = log_of(KEPT_EVENTS + 5)
    assert len(log.latest) == KEPT_EVENTS
    assert log.latest[-1].detail == f"number {KEPT_EVENTS + 4}"
    assert (log.by_kind[EventKind.FAILED].count, log.by_server["alpha"].lost_s) == (KEPT_EVENTS + 5, (KEPT_EVENTS + 5) / 2)
    assert log.by_kind[EventKind.SLOW].count == 0


def test_the_wait_that_ends_first_is_the_one_that_is_shown() -> None:
    log = EventLog()
    assert log.longest_wait() is None
    log.waiting.update({1: waiting(20.0, "a"), 2: waiting(5.0, "b")})
    found = log.longest_wait()
    assert found is not None
    assert found.what == "b"


def traffic(log: EventLog) -> SwarmTraffic:
    return SwarmTraffic(1, 2, 3, 4, 5.0, (ServerTotals("alpha", BlockSpan(0, 4), failures=2, lost_s=1.5),), events=log.by_kind)


def test_every_kind_of_event_is_a_total_and_a_resumed_run_goes_on_counting() -> None:
    flat = flat_totals(traffic(log_of(3)))
    assert {name for name in flat if name.startswith("events/")} == {f"events/{kind}" for kind in EventKind} | {"events/lost_s"}
    assert (flat["events/failed"], flat["events/lost_s"], flat["events/slow"], flat["server/alpha/lost_s"]) == (3, 1.5, 0, 1.5)
    first, second = Meter(lambda: traffic(log_of(3)), 0.0), Meter(lambda: traffic(log_of(2)), 0.0)
    second.load_state_dict(first.state_dict())
    assert second.totals()["events/failed"] == 5
    old = first.state_dict()
    old["totals"] = {name: value for name, value in old["totals"].items() if not name.startswith("events/")}
    second.load_state_dict(old)
    assert second.totals()["events/failed"] == 2


def file_of(path: Path, log: EventLog) -> EventsFile:
    def events(after: float) -> list[SwarmEvent]:
        return [event for event in log.latest if event.at > after]

    return EventsFile(path, events)


def test_each_event_is_written_once_and_a_resumed_run_appends(tmp_path: Path) -> None:
    path, log = tmp_path / "events.jsonl", log_of(2)
    file = file_of(path, log)
    file.write(3)
    file.write(3)
    log.add(EventKind.WAITED, "a wait", lost_s=1.25)
    file.write(4)
    with path.open("a") as torn:
        torn.write('{"time": 1')
    file_of(path, log_of(1)).write(9)
    lines = [json.loads(line) for line in path.read_text().splitlines() if line != '{"time": 1']
    assert [(line["step"], line["kind"], line["server"], line["blocks"], line["lost_s"]) for line in lines] == [
        (3, "failed", "alpha", "0:4", 0.5),
        (3, "failed", "alpha", "0:4", 0.5),
        (4, "waited", "", None, 1.25),
        (9, "failed", "alpha", "0:4", 0.5),
    ]
    assert all(abs(line["time"] - time.time()) < 60 for line in lines)


def test_a_quiet_run_writes_no_file_and_a_loud_one_no_endless_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    file_of(path, EventLog()).write(1)
    assert not path.exists()
    monkeypatch.setattr(events_file, "MAX_LINES", 5)
    log = log_of(3)
    file = file_of(path, log)
    for _ in range(4):
        file.write(1)
        log.add(EventKind.BUSY, "no room")
        log.add(EventKind.BUSY, "no room")
    assert len(path.read_text().splitlines()) == 5


def test_a_disk_that_is_full_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file_of(tmp_path / "absent" / "events.jsonl", log_of(1)).write(1)
    assert "1 events could not be written to" in caplog.text


def test_a_resumed_run_counts_what_broke_the_last_one_off(tmp_path: Path) -> None:
    """The checkpoint is from before it."""
    path = tmp_path / "events.jsonl"
    file_of(path, log_of(3)).write(1)
    with path.open("a") as file:
        file.write('{"kind": "waited", "lost_s": 9.5}\n{"kind": "unheard of", "lost_s": 1}\nhalf a li')
    meter = Meter(lambda: traffic(log_of(1)), 0.0)
    again = EventsFile(path, lambda after: [], lambda: meter.before)
    again.on_train_start(None, None)  # type: ignore[arg-type]
    totals = meter.totals()
    assert (totals["events/failed"], totals["events/waited"], totals["events/lost_s"], totals["retries"]) == (4, 1, 11.5, 3 + 4)
