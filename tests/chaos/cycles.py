"""``scripts/chaos cycles``: servers and a client start and end, in every way there is; afterwards nothing of theirs may be left.

Each cycle has a mount namespace of its own, with a ``/tmp`` and a ``/dev/shm`` of its own: so what is left there is its, and so are the processes of
that namespace. Where that is not allowed, its processes are followed from parent to child, and its directories are those that their commands name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.campaign import ROOT, Campaign, environment
from tests.chaos.processes import command, descendants, everybody, runs
from tests.chaos.training import tiny_model

PROGRAM = """
import sys, torch, swarmtune
model, ending = sys.argv[1:]
with swarmtune.LocalSwarm(model, ["0:4"], dtype="float32", threads=1) as local:
    with swarmtune.connect(local.initial_peers) as swarm:
        remote = swarmtune.load_causal_lm(model, swarm)
        remote(input_ids=torch.tensor([[4, 5, 6]]))
        print("ready", *[server.address.split("/")[4] for server in local.servers], flush=True)
        if ending == "in a call":
            while True:
                remote(input_ids=torch.tensor([[4, 5, 6]]))
        sys.stdin.readline()
        if ending == "exception":
            raise ValueError("on purpose")
"""
ENDINGS = ("normal", "exception", "SIGINT", "SIGTERM", "SIGKILL", "SIGINT in a call", "SIGKILL in a call",
           "SIGINT while starting", "SIGTERM while starting", "SIGKILL while starting")  # fmt: skip
READY_BOUND_S, END_BOUND_S, GONE_BOUND_S = 90.0, 60.0, 20.0
STARTING_S = (0.3, 6.0)
NOT_OURS = ("model", "torchinductor_")
"""The model was put there from here; torch makes a cache of its own on import, for all processes of a user."""
PRIVATE = 'mount --bind "$2" /dev/shm && mount --bind "$1" /tmp && shift 2 && exec "$@"'


class Place:
    """Where one cycle happens, and what it leaves there."""

    def __init__(self, directory: Path, model: Path, unshare: list[str]) -> None:
        self.tmp, self.shm = directory / "tmp", directory / "shm"
        for each in (self.tmp, self.shm):
            each.mkdir(parents=True)
        self.private = bool(unshare)
        self.model = Path("/tmp/model") if self.private else model
        if self.private:
            shutil.copytree(model, self.tmp / "model")  # what lies below the real /tmp cannot be seen from there
        self._prefix = [*unshare, "/bin/sh", "-c", PRIVATE, "sh", str(self.tmp), str(self.shm)] if self.private else []
        self._namespace = ""
        self._family: set[int] = set()
        self._named: set[Path] = set()
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self, ending: str) -> subprocess.Popen[str]:
        """Start the program."""
        process = subprocess.Popen(
            [*self._prefix, sys.executable, "-c", PROGRAM, str(self.model), "in a call" if ending.endswith("in a call") else ending],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
        )  # fmt: skip
        self._watcher = threading.Thread(target=self._watch, args=(process.pid,), daemon=True)
        self._watcher.start()
        return process

    def _watch(self, pid: int) -> None:
        own = os.readlink("/proc/self/ns/mnt")
        while not self._ended.wait(0.03):
            self._family |= {pid, *descendants(pid)}
            self._named |= {Path(found) for each in self._family for found in re.findall(r"/tmp/swarmtune-\w+", " ".join(command(each)))}
            with contextlib.suppress(OSError):
                if not self._namespace and (found := os.readlink(f"/proc/{pid}/ns/mnt")) != own:
                    self._namespace = found

    def processes(self) -> list[int]:
        """Those of this cycle that run."""
        found = {pid for pid in self._family if runs(pid)}
        if self._namespace:
            found = {pid for pid in found if _namespace(pid) == self._namespace}  # numbers are used again
            found |= {pid for pid in everybody() if _namespace(pid) == self._namespace and runs(pid)}
        return sorted(found)

    def files(self) -> list[str]:
        """Files, directories and sockets that are left."""
        if not self.private:
            return sorted(str(path) for path in self._named if path.exists())
        return sorted(str(path) for each in (self.tmp, self.shm) for path in each.iterdir() if not path.name.startswith(NOT_OURS))

    def close(self) -> None:
        """Stop watching; end what is left, so that the next cycle is not disturbed."""
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.tmp.parent, ignore_errors=True)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def unsharing(directory: Path) -> list[str]:
    """The words that give a process mounts of its own; none where that is not allowed, or would hide this code."""
    if any(Path(each).resolve().is_relative_to("/tmp") for each in (ROOT, sys.prefix, sys.base_prefix)):
        return []
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        for each in ("try-tmp", "try-shm"):
            (directory / each).mkdir(exist_ok=True)
        done = subprocess.run(
            [*words, "/bin/sh", "-c", PRIVATE, "sh", directory / "try-tmp", directory / "try-shm", "true"], capture_output=True, check=False
        )
        if done.returncode == 0:
            return words
    return []


def run(options: argparse.Namespace) -> int:
    """The campaign."""
    campaign = Campaign("cycles", options.count, options.seed, options.log)
    with campaign.running():
        model = tiny_model(options.log)
        unshare = unsharing(options.log)
        campaign.facts["private_mounts"] = bool(unshare)
        while campaign.counts["faults"] < campaign.wanted:
            number = campaign.counts["faults"]
            ending = ENDINGS[number % len(ENDINGS)]
            directory = options.log / f"cycle-{number}"
            shutil.rmtree(directory, ignore_errors=True)
            place = Place(directory, model, unshare)
            try:
                cycle(campaign, place, ending)
            finally:
                place.close()
            campaign.fault(ending)
            campaign.steps += 1
            campaign.tell()
    return campaign.finish()


@contextlib.contextmanager
def started(place: Place, ending: str) -> Iterator[subprocess.Popen[str]]:
    """The program, which does not outlive this block."""
    process = place.start(ending)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def cycle(campaign: Campaign, place: Place, ending: str) -> None:
    """One start and one end, and a look at what is left."""
    ports: list[str] = []
    began = time.monotonic()
    with campaign.bound(f"the start of a cycle ({ending})", READY_BOUND_S + END_BOUND_S), started(place, ending) as process:
        if ending.endswith("while starting"):
            time.sleep(campaign.random.uniform(*STARTING_S))
        else:
            ports = ready(process)
            time.sleep(campaign.random.uniform(0, 0.2))
        end(process, ending)
        _, said = process.communicate(timeout=END_BOUND_S)
        if process.returncode == 0 and ending != "normal" and not ending.endswith("while starting"):
            campaign.error(f"a cycle that ended by {ending} had exit code 0")
        if process.returncode != 0 and ending == "normal":
            campaign.error(f"a cycle that ended normally had exit code {process.returncode}: {said[-1000:]}")
    ended = time.monotonic()
    while (left := (place.processes(), place.files(), taken(ports))) and any(left) and time.monotonic() - ended < GONE_BOUND_S:
        time.sleep(0.05)
    told = {"ending": ending, "start_s": round(ended - began, 2), "gone_s": round(time.monotonic() - ended, 2)}
    if any(left):
        processes, files, ports = left
        named = [f"{pid} {' '.join(command(pid))[:200]}" for pid in processes]
        campaign.counts["cycles that left something"] += 1
        campaign.error(f"after {ending}: processes {named}, files {files}, ports {ports} were left")
    campaign.note("cycle", **told)


def ready(process: subprocess.Popen[str]) -> list[str]:
    """Wait until the program is ready; its servers' ports."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], READY_BOUND_S)[0]:
        raise RuntimeError("a cycle did not become ready")
    words = process.stdout.readline().split()
    if words[:1] != ["ready"]:
        raise RuntimeError("a cycle ended before it was ready")
    return words[1:]


def end(process: subprocess.Popen[str], ending: str) -> None:
    """Make it end."""
    name = ending.partition(" ")[0]
    if name.startswith("SIG"):
        process.send_signal(signal.Signals[name])


def taken(ports: list[str]) -> list[str]:
    """Ports that cannot be listened on."""
    found = []
    for port in ports:
        with socket.socket() as each:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are nobody's
            try:
                each.bind(("127.0.0.1", int(port)))
            except OSError:
                found.append(port)
    return found
