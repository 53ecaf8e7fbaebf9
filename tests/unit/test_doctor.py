"""The checks of ``swarmtune doctor``, with real sockets, real daemons and real version ranges; swarms are in tests/swarm."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from swarmtune.doctor import command, judge, machine, model, report
from swarmtune.doctor.check import Check, Status
from swarmtune.doctor.daemon import check_daemon
from swarmtune.doctor.survey import Server, Survey, survey
from swarmtune.errors import UsageError
from swarmtune.transport.hivemind import _brief
from swarmtune.types import BlockSpan
from swarmtune.wire.messages import ServerInfo

PEER = "12D3KooWMEUhm3PfKTu7SMn27jjfqRMZDvWXWLvtJoGAokbb25mF"


def server(span: str, peer: str, *, announced: bool = True, ahead_s: float | None = 0.1, **changes: object) -> Server:
    blocks = BlockSpan.parse(span)
    digests = tuple(f"digest {block}" for block in range(blocks.start, blocks.stop))
    info = ServerInfo("model", 4, blocks, digests, "float32", "class", {}, "0.1.0")
    return Server(peer, "/ip4/127.0.0.1/tcp/1", replace(info, **changes), announced, ahead_s, 0.5, 0.01)  # type: ignore[arg-type]


def by_name(checks: Sequence[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


# --- this machine ------------------------------------------------------------------------------------------------------------


def test_a_machine_that_runs_these_tests_is_well(tmp_path: Path) -> None:
    checks = machine.check_machine("127.0.0.1", 0, tmp_path, {"cache": tmp_path / "none"})
    assert [check for check in checks if check.status is Status.FAILED] == []
    names = {"Python", "libraries", "locale", "clock", "cores and memory", "device", "disk for runs", "cache", "addresses", "IPv6", "port"}
    assert {check.name for check in checks} == names


def test_libraries_outside_the_declared_ranges_are_named_with_the_command_that_mends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["rich<2,>=1", "no-such-library>=3", 'pytest<1; extra == "test"']
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    wrong, missing = machine.check_libraries()
    assert wrong.status is missing.status is Status.FAILED
    assert wrong.found == f"rich {metadata.version('rich')} is installed, swarmtune needs <2,>=1"
    assert wrong.advice == "pip install 'rich<2,>=1'"
    assert missing.found == "no-such-library is not installed"


def test_an_unsupported_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": "<3"})
    assert machine.check_python().status is Status.FAILED


@pytest.mark.parametrize(("kind", "status"), [(socket.SOCK_STREAM, Status.FAILED), (socket.SOCK_DGRAM, Status.WARNING)])
def test_a_port_in_use_is_found_for_tcp_and_for_udp(kind: socket.SocketKind, status: Status) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            taken.listen()
        port = taken.getsockname()[1]
        found = machine.check_port("127.0.0.1", port)
    assert found.status is status
    assert f"port {port} cannot be listened on: Address already in use" in found.found
    assert machine.check_port("127.0.0.1", port).status is Status.OK


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    assert machine.check_port("203.0.113.7", 0).status is Status.FAILED


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1", "loopback"), ("::1", "loopback"), ("10.1.2.3", "private"), ("8.8.8.8", "public"), ("fe80::1%eth0", "private")]
)
def test_addresses_say_who_can_dial_them(address: str, said: str) -> None:
    assert machine.reach(address).startswith(said)


def test_a_clock_before_the_installation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert machine.check_clock().status is Status.FAILED


def test_a_disk_that_is_nearly_full_fails_and_a_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(bytes(123_000))
    assert "123 KB at" in machine.check_cache("cache", tmp_path).found
    assert machine.check_disk(tmp_path / "not" / "yet").status is Status.OK
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert machine.check_disk(tmp_path).status is Status.FAILED
    assert machine.check_cache("cache", tmp_path).status is Status.WARNING


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0"])
def test_a_daemon_starts_and_two_nodes_reach_each_other(listen: str) -> None:
    checks = asyncio.run(check_daemon(listen, 0))
    assert [check.name for check in checks] == ["daemon", "announced addresses", "round trip"]
    assert all(check.status is Status.OK for check in checks)
    assert re.search(r"/ip4/\d+\.\d+\.\d+\.\d+/tcp/\d+", checks[1].found)


def test_a_daemon_that_cannot_listen_fails_with_advice() -> None:
    (check,) = asyncio.run(check_daemon("203.0.113.7", 0))
    assert check.status is Status.FAILED
    assert check.advice


# --- a swarm, as it would be found -------------------------------------------------------------------------------------------


def test_peers_that_cannot_be_dialled_are_told_apart() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{PEER}"
    began = time.monotonic()
    found = asyncio.run(survey([refused, "nonsense\x1b[31m", f"/ip4/127.0.0.1/tcp/99999/p2p/{PEER}", refused], None, None))
    assert time.monotonic() - began < 30
    checks = judge.judge(found)
    assert [check.status for check in checks] == [Status.FAILED] * 4
    texts = [check.found for check in checks]
    assert sum("refused: nothing listens there" in text for text in texts) == 1
    assert sum("malformed" in text for text in texts) == 2
    assert "no server describes itself" in texts
    assert "\x1b" not in "".join(texts)


def test_a_refusal_speaks_of_the_address_that_was_dialled() -> None:
    """The daemon lists every address that it knows of the peer, in any order."""
    lines = ["[/ip4/127.0.0.1/tcp/1] dial backoff", "[/ip4/127.0.0.1/tcp/2] connection refused", "[/ip4/127.0.0.1/tcp/22] peer id mismatch"]
    error = OSError("failed to dial: all dials failed\n" + "\n".join(f"  * {line}" for line in lines))
    assert _brief(error, "/ip4/127.0.0.1/tcp/2") == "connection refused"
    assert _brief(error, "/dns4/unknown/tcp/2") == _brief(error) == "peer id mismatch"


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ("failed to negotiate security protocol: peer id mismatch: expected A, but remote key matches B", "another peer listens there"),
        ("dial tcp4 127.0.0.1:1: connect: connection refused", "refused"),
        ("failed to negotiate security protocol: context deadline exceeded", "something else listens there"),
        ("dial tcp4 10.0.0.1:1: i/o timeout", "no answer in time"),
        ("lookup x: no such host", "the name is not known"),
        ("connect: network is unreachable", "no route"),
    ],
)
def test_the_likely_reason_of_a_refusal(refusal: str, reason: str) -> None:
    (check,) = judge.check_peers(Survey(refusals={"address": f"peer P cannot be reached at address: {refusal}"}, reached=("other",)))[1:]
    assert f"address cannot be reached: {reason}" in check.found
    assert refusal in check.found
    assert check.status is Status.WARNING
    assert check.advice


def test_gaps_fail_single_servers_warn_and_replicas_are_well() -> None:
    gap = judge.check_coverage([server("0:1", "a"), server("2:3", "b")], "", True)
    assert (gap.status, gap.found) == (Status.FAILED, "nobody serves blocks 1:2, 3:4 of 0:4")
    single = judge.check_coverage([server("0:4", "a"), server("0:2", "b")], "", True)
    assert single.status is Status.WARNING
    assert "2:4 by one server only" in single.found
    assert judge.check_coverage([server("0:4", "a"), server("0:4", "b")], "", True).status is Status.OK


def test_coverage_counts_servers_per_block() -> None:
    spans = [BlockSpan(0, 2), BlockSpan(1, 3), BlockSpan(1, 2), BlockSpan(4, 5)]
    assert [(str(span), count) for span, count in judge.coverage(spans, 6)] == [
        ("0:1", 1),
        ("1:2", 3),
        ("2:3", 1),
        ("3:4", 0),
        ("4:5", 1),
        ("5:6", 0),
    ]


def test_a_mixed_swarm_is_explained() -> None:
    servers = (
        server("0:4", "a", numeric_class="one", numeric={"threads": "1"}),
        server("0:4", "b", numeric_class="two", numeric={"threads": "2"}, block_digests=("digest 0", "digest 1", "x", "digest 3")),
        server("0:2", "c", model="other", num_blocks=2),
    )
    checks = judge.judge(Survey(servers, ("address",)))
    models = by_name(checks, "models")
    assert models.status is Status.WARNING
    assert "model (4 blocks) on a, b; other (2 blocks) on c" in models.found
    assert by_name(checks, "weights of model").found == "different weights under one configuration: blocks 2:3: a against b"
    assert by_name(checks, "weights of model").status is Status.FAILED
    assert by_name(checks, "numeric class of model").found == "2 classes: threads is 1 on a, 2 on b"
    assert "last digits" in by_name(checks, "numeric class of model").advice
    assert by_name(checks, "coverage of other").status is Status.WARNING


def test_a_model_that_nobody_serves_fails_and_one_that_is_served_does_not_suffer_from_others() -> None:
    infos = {"a": server("0:4", "a").info}
    assert judge.check_models(infos, ("mine", 4)).status is Status.FAILED
    assert judge.check_models(infos, ("model", 4)).status is Status.OK
    servers = (server("0:4", "a"), server("0:1", "b", model="other"))
    checks = judge.judge(Survey(servers, ("address",)), ("model", 4))
    assert by_name(checks, "coverage of other").status is Status.WARNING
    assert not [check for check in checks if check.status is Status.FAILED]


def test_different_dtypes_are_more_than_last_digits() -> None:
    servers = [server("0:4", "a"), server("0:4", "b", numeric_class="two", dtype="bfloat16")]
    assert "results differ visibly" in judge.check_numeric(servers, "").advice


@pytest.mark.parametrize(
    ("ahead_s", "said"),
    [(0.2, None), (-3.2, None), (100.0, "a is 100.0 s ahead"), (-25.0, "a is 25.0 s behind"), (1e18, "s ahead")],
)
def test_a_clock_that_is_visibly_off_is_named(ahead_s: float, said: str | None) -> None:
    check = judge.check_clocks([server("0:4", "a", ahead_s=ahead_s)])
    assert check.status is (Status.OK if said is None else Status.WARNING)
    assert said is None or said in check.found


def test_servers_of_another_version_and_unannounced_ones_are_named() -> None:
    odd = server("0:4", "a", announced=False, ahead_s=None, version="9.9.9")
    assert "a runs 9.9.9" in judge.check_versions({"a": odd.info}).found
    assert judge.check_announced([odd]).found == "not found in the DHT: a"
    assert judge.check_clocks([odd]).status is Status.WARNING


# --- the report and the command ----------------------------------------------------------------------------------------------


def test_nothing_that_a_peer_says_becomes_markup_or_an_escape(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "[bold red]x[/]\x1b[31m\r\n\x9b[link=http://a]"
    shown = report.Report(
        (Check("peer", Status.WARNING, evil, evil), Check(evil, Status.OK, evil)),
        (server("0:4", "a", name=evil, model=evil, version=evil, dtype=evil, numeric_class=evil, numeric={"quantisation": evil}),),
        1.0,
    )
    report.show(shown)
    out = capsys.readouterr().out
    assert "[bold red]x[/]" in out
    assert not set(out) & {"\x1b", "\r", "\x9b"}
    assert "\x1b" not in json.dumps(shown.to_json())


def test_coverage_of_a_model_with_many_blocks_stays_short(capsys: pytest.CaptureFixture[str]) -> None:
    many = server("0:5", "a", num_blocks=1 << 20)
    report.show(report.Report((), (many,), 1.0))
    assert "0:5: 1, 5:1048576: 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--listen", "here"], "--listen must be an IP address"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--port", "x"], "--port"),
        (["--pear", "x"], "unrecognized arguments: --pear"),
        (["--run", "/no/such/run"], "--run must be the directory of a run"),
        (["--model", "/no/such/model"], "is not a directory"),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        command.main(words)
    assert "\n" not in str(caught.value)


def test_a_run_directory_gives_model_peers_and_disk(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: 'pkg://swarmtune/assets/pocket_bloom'}\nswarm: {initial_peers: [/ip4/a]}\n")
    target = command.find_target(command.parser().parse_args(["--run", str(tmp_path)]))
    assert target.peers == ("/ip4/a",)
    assert target.model is not None
    assert (Path(target.model) / "config.json").is_file()
    assert target.runs == tmp_path
    mine = command.find_target(command.parser().parse_args(["--run", str(tmp_path), "--peer", "x", "--model", "y"]))
    assert (mine.peers, mine.model) == (("x",), "y")


def test_a_hub_model_that_is_not_cached_is_not_asked_for_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ((check,), facts) = model.find_model("no-such-org/no-such-model")
    assert check.status is Status.FAILED
    assert "HF_HUB_OFFLINE is set" in check.found
    assert facts is None


def test_work_that_never_returns_ends_at_its_deadline() -> None:
    with pytest.raises(UsageError, match="no answer within"):
        model.within(0.05, lambda: time.sleep(1))


def test_the_command_prints_json_with_exit_code_1_when_something_failed(bloom: Path) -> None:
    words = ["doctor", "--json", "--peer", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", "--model", str(bloom)]
    done = subprocess.run([sys.executable, "-m", "swarmtune.cli", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    printed = json.loads(done.stdout)
    assert printed["ok"] is False
    assert {check["name"] for check in printed["checks"] if check["status"] == "failed"} == {"peer", "servers"}
    assert any("bloom, 4 blocks of width 48" in check["found"] for check in printed["checks"])
    assert "Traceback" not in done.stderr


def test_a_reader_that_stops_reading_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    probe = "from swarmtune.doctor.command import _print_json; _print_json({'a': 1})"
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([sys.executable, "-c", probe], stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_table_of_servers_names_their_owner(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(report.Report((), (server("0:2", PEER, name="one", family="lab 3"), server("2:4", PEER, name="two")), 1.0))
    words = " ".join(capsys.readouterr().out.split())
    assert "(lab 3)" in words
    assert words.count("(lab 3)") == 1
