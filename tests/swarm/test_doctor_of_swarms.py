"""``swarmtune doctor`` and a training run against real servers that fit together badly."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import swarmtune
from tests.harness import save_tiny

pytestmark = pytest.mark.swarm

ABSENT = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWMEUhm3PfKTu7SMn27jjfqRMZDvWXWLvtJoGAokbb25mF"
POCKET = Path(swarmtune.__file__).parent / "assets" / "pocket_bloom"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-m", "swarmtune.cli", *words], capture_output=True, text=True, timeout=200, check=False)


def doctor(*words: str) -> tuple[int, dict[str, Any]]:
    done = run("doctor", "--json", *words)
    assert done.stdout, done.stderr
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def check(printed: dict[str, Any], name: str) -> dict[str, str]:
    (found,) = [each for each in printed["checks"] if each["name"] == name]
    return found


@contextmanager
def joined(peers: list[str], model: Path, spans: list[str], **settings: Any) -> Iterator[list[str]]:
    """More servers for the swarm of ``peers``; yields their peer ids."""
    more = swarmtune.LocalSwarm(model, spans, **settings)
    try:
        for server in more.servers:
            server.start(peers)
        for server in more.servers:
            server.wait_ready()
        yield [server.peer_id for server in more.servers]
    finally:
        more.close()


@pytest.fixture(scope="module")
def well(bloom: Path) -> Iterator[swarmtune.LocalSwarm]:
    with swarmtune.LocalSwarm(bloom, ["0:2", "2:4", "0:4"], dtype="float32", threads=1) as local:
        yield local


def until(found: Any, what: Any, patience_s: float = 40.0) -> Any:
    """Ask again until the DHT knows everybody."""
    ends_at = time.monotonic() + patience_s
    while True:
        answer = found()
        if what(answer[1]) or time.monotonic() > ends_at:
            return answer


def test_a_swarm_in_good_order_is_listed_measured_and_covered(bloom: Path, well: swarmtune.LocalSwarm) -> None:
    code, printed = until(
        lambda: doctor("--peer", well.initial_peers[0], "--model", str(bloom)),
        lambda printed: len(printed["servers"]) == 3 and check(printed, "announcements")["status"] == "ok",
    )
    assert code == 0
    assert {each["peer"] for each in printed["servers"]} == {server.peer_id for server in well.servers}
    for each in printed["servers"]:
        assert 0 < each["latency_s"] < 5
        assert each["up_bytes_s_at_least"] > 1e5
        assert each["down_bytes_s_at_least"] > 1e4
        assert abs(each["clock_ahead_s"]) <= each["clock_ahead_error_s"] + 0.05
        assert each["version"] == swarmtune.__version__
    assert printed["coverage"][0]["spans"] == [{"blocks": "0:4", "servers": 2}]
    assert not [each for each in printed["checks"] if each["status"] != "ok" and each["name"] not in ("locale", "cores and memory", "disk for runs")]
    assert check(printed, "models")["found"].startswith("your model ")


def test_a_mixed_swarm_is_explained_and_an_unreachable_peer_is_told(
    bloom: Path, models: dict[str, Path], well: swarmtune.LocalSwarm, tmp_path: Path
) -> None:
    other = save_tiny("bloom", tmp_path / "other", seed=1)
    peers = well.initial_peers
    with ExitStack() as stack:
        (false,) = stack.enter_context(joined(peers, other, ["0:2"], dtype="float32", threads=2))
        (llama,) = stack.enter_context(joined(peers, models["llama"], ["1:4"], dtype="float32", threads=1))
        code, printed = until(
            lambda: doctor("--peer", peers[1], "--peer", ABSENT, "--model", str(models["llama"])),
            lambda printed: {false, llama} <= {each["peer"] for each in printed["servers"]},
        )
    assert code == 1
    assert [(each["status"], "refused" in each["found"]) for each in printed["checks"] if each["name"] == "peer"] == [
        ("ok", False),
        ("warning", True),
    ]
    assert "2 models in one swarm" in check(printed, "models")["found"]
    digest = next(each["model"] for each in printed["servers"] if each["peer"] == false)
    assert check(printed, f"weights of {digest[:8]}")["status"] == "warning", "it is not the model that was asked for"
    assert f"against …{false[-8:]}" in check(printed, f"weights of {digest[:8]}")["found"]
    assert f"2 on …{false[-8:]}" in check(printed, f"numeric class of {digest[:8]}")["found"]
    assert "servers" in check(printed, "clocks")["found"]
    other_digest = next(each["model"] for each in printed["servers"] if each["peer"] == llama)
    assert "nobody serves blocks 0:1 of 0:4" in check(printed, f"coverage of {other_digest[:8]}")["found"]


def test_a_run_with_an_unreachable_peer_goes_on_and_says_so_in_one_line(tmp_path: Path) -> None:
    with swarmtune.LocalSwarm(POCKET, ["0:4"], threads=2) as local:
        words = [f"swarm.initial_peers=[{ABSENT},{local.initial_peers[0]}]", "debug=fast", f"run_dir={tmp_path / 'run'}"]
        done = run("recipe=lora_bloom", "swarm=join", *words)
        assert done.returncode == 0, done.stderr
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("swarmtune: warning:")]
        assert said.startswith("swarmtune: warning: an initial peer is left out, the run goes on without it: ")
        assert ABSENT in said
        assert said.endswith("connection refused")
        code, printed = doctor("--run", str(tmp_path / "run"))
        assert code == 0
        assert [each["status"] for each in printed["checks"] if each["name"] == "peer"] == ["ok", "warning"]
        assert check(printed, "models")["found"].startswith("your model ")


def test_ctrl_c_ends_the_doctor_and_leaves_nothing() -> None:
    """The peer takes the connection and never says a word."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        words = ["doctor", "--peer", ABSENT.replace("/tcp/1/", f"/tcp/{mute.getsockname()[1]}/")]
        process = subprocess.Popen([sys.executable, "-P", "-m", "swarmtune.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        mute.settimeout(60)
        silent, _ = mute.accept()
        family = psutil.Process(process.pid).children(recursive=True)
        (directory,) = {Path(word) for child in family for word in child.cmdline() if word.startswith("/tmp/swarmtune-") and "." not in word}
        assert directory.is_dir()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        silent.close()
    assert process.returncode == 130
    assert err == "swarmtune: interrupted\n"
    assert out == ""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (any(map(runs, family)) or directory.exists()):
        time.sleep(0.1)
    assert not any(map(runs, family))
    assert not directory.exists()


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_commands_of_the_document_run(bloom: Path, well: swarmtune.LocalSwarm, tmp_path: Path) -> None:
    document = (Path(swarmtune.__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", document, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"path": str(bloom)}, "swarm": {"initial_peers": well.initial_peers}}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = {"ADDRESS": well.initial_peers[0], "PATH": str(bloom), "31337": port}
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "swarmtune"
        done = run(*(str(tmp_path) if word.startswith("runs/") else places.get(word, word) for word in words))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0 failed" in done.stdout
