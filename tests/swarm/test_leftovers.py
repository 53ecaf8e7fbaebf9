"""Nothing stays behind: no process, no socket, no directory, however a run ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.swarm

PROGRAM = """
import os, signal, sys, time
import torch, swarmtune
model, ending = sys.argv[1:]
with swarmtune.LocalSwarm(model, ["0:2", "2:4"], dtype="float32") as local:
    with swarmtune.connect(local.initial_peers) as swarm:
        remote = swarmtune.load_causal_lm(model, swarm)
        remote(input_ids=torch.tensor([[4, 5, 6]]))
        print("ready", *[server.pid for server in local.servers], flush=True)
        sys.stdin.readline()
        if ending == "exception":
            raise ValueError("on purpose")
        if ending != "normal":
            time.sleep(60)
"""


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def directories() -> set[str]:
    return {str(path) for path in Path("/tmp").glob("swarmtune-*") if not path.name.startswith("swarmtune-bench")}


@pytest.mark.parametrize("ending", ["normal", "exception", "ctrl-c", "sigkill"])
def test_no_process_socket_or_directory_is_left(bloom: Path, tmp_path: Path, ending: str) -> None:
    before = directories()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(bloom), ending], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line[:1] == ["ready"]
    family = descendants(process.pid)
    assert len(family) >= 2 + 3 * 2, "two servers, and a keeper with its daemon for each of three nodes"
    assert directories() - before
    if ending == "ctrl-c":
        process.send_signal(signal.SIGINT)
    elif ending == "sigkill":
        process.kill()
    else:
        process.stdin.write("go\n")
        process.stdin.flush()
    process.wait(30)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and (any(runs(child) for child in family) or directories() - before):
        time.sleep(0.1)
    assert [child.pid for child in family if runs(child)] == []
    assert directories() - before == set()
    assert (process.returncode == 0) is (ending == "normal")
    process.stdin.close()
    process.stdout.close()


def test_killed_server_leaves_no_daemon_and_no_directory(bloom: Path) -> None:
    import swarmtune

    before = directories()
    with swarmtune.LocalSwarm(bloom, ["0:4"]) as local:
        family = descendants(local.servers[0].pid)
        assert len(family) == 2
        os.kill(local.servers[0].pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (any(runs(child) for child in family) or directories() - before):
            time.sleep(0.1)
        assert not any(runs(child) for child in family)
        assert directories() - before == set()


def test_killed_server_leaves_nothing_of_a_daemon_that_took_anothers_place(bloom: Path) -> None:
    import swarmtune

    before = directories()
    with swarmtune.LocalSwarm(bloom, ["0:4"]) as local:
        first = descendants(local.servers[0].pid)
        next(child for child in first if child.name() == "p2pd").kill()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (any(runs(child) for child in first) or len(_daemons(local.servers[0].pid)) != 1):
            time.sleep(0.1)
        assert not any(runs(child) for child in first), "the old keeper goes too"
        family = descendants(local.servers[0].pid)
        assert len(family) == 2
        os.kill(local.servers[0].pid, signal.SIGKILL)
        while time.monotonic() < deadline and (any(runs(child) for child in family) or directories() - before):
            time.sleep(0.1)
        assert not any(runs(child) for child in family)
        assert directories() - before == set()


def _daemons(pid: int) -> list[psutil.Process]:
    return [child for child in descendants(pid) if runs(child) and child.name() == "p2pd"]


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(bloom: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [f"model='{bloom}'", "blocks='0:4'", f"port={taken.getsockname()[1]}"]
        done = subprocess.run([sys.executable, "-P", "-m", "servers", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
