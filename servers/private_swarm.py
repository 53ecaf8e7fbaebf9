"""``scripts/swarm up|status|down``: the servers of one YAML file as background processes of this machine, or as commands for several."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servers.addresses import check_port
from servers.config import ServeConfig
from servers.swarm_plan import Member, Plan, read_plan
from swarmtune.discovery.identity_file import ensure_identity
from swarmtune.errors import ServerStartFailed, SwarmtuneError, UsageError, WireError
from swarmtune.notices import printable

READY_LINE = "serving blocks "
READY_S = 600.0
DRAIN_S = 40.0
KILL_S = 5.0
INFO_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0; 1 where a server is not there; 2 for wrong input."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    if options.show and options.what != "up":
        parser.error("--print goes with up")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a half-started swarm is stopped then, too
    try:
        plan = read_plan(options.file, options.state, elsewhere=options.show or options.what != "up")  # what runs can be stopped, model or not
        if options.what == "up":
            for warning in plan.warnings:
                sys.stderr.write(f"scripts/swarm: warning: {warning}\n")
            return show_commands(plan) if options.show else up(plan, options.wait)
        return status(plan) if options.what == "status" else down(plan)
    except SwarmtuneError as error:
        sys.stderr.write(f"scripts/swarm: {printable(str(error), 4000)}\n")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        sys.stderr.write(f"scripts/swarm: {printable(str(error), 4000)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("scripts/swarm: interrupted\n")
        return 130


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/swarm", description="Run a private swarm from one YAML file (docs/operations.md has one).")
    parser.add_argument("what", choices=("up", "status", "down"), help="start all servers and wait for them; ask each; stop all")
    parser.add_argument("file", help="the YAML file")
    parser.add_argument("--state", help="directory of keys, logs and process ids (default: NAME.state beside the file)")
    parser.add_argument("--print", action="store_true", dest="show", help="up: start nothing, print the commands for several machines")
    parser.add_argument("--wait", type=float, default=READY_S, metavar="SECONDS", help="up: how long the servers may take until they are ready")
    return parser


@dataclass(slots=True)
class Running:
    """A server, and the process that runs it, if any: what ``NAME.json`` in the state directory says.

    Attributes:
        member: what the plan says of it; ``None`` where the plan has no server of this name, because the file was another one at the last ``up``.
        pid: 0 where no process runs.
        born: when that process started, as the system says it: another process with this number is not ours.
    """

    name: str
    member: Member | None
    state: Path
    blocks: str = "unknown"
    port: int = 0
    pid: int = 0
    born: str = ""
    addresses: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of(cls, member: Member, state: Path) -> Running:
        """What is known of a server of the plan since the last ``up``; a damaged file counts as no process.

        Raises:
            UsageError: the file cannot be read.
        """
        file = state / f"{member.name}.json"
        found = cls(member.name, member, state, member.config.blocks)
        try:
            found._read(file)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror}), so nobody knows whether {member.name} runs") from error
        except ValueError:
            sys.stderr.write(f"scripts/swarm: warning: {file} is damaged: {member.name} counts as not running\n")
        if not found.alive:
            found.blocks = member.config.blocks
        return found

    @classmethod
    def strays(cls, plan: Plan) -> list[Running]:
        """Servers that still run by files of the state directory, but are not in the plan; other files there are not ours."""
        found: list[Running] = []
        for file in sorted(plan.state.glob("[!.]*.json")):
            stray = cls(file.stem, None, plan.state)
            try:
                stray._read(file)
            except (OSError, ValueError):
                continue
            if stray.alive and all(file.stem != member.name for member in plan.members):
                found.append(stray)
        return found

    def _read(self, file: Path) -> None:
        facts = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"port": int, "pid": int, "born": str, "addresses": list}
        if not isinstance(facts, dict) or any(type(facts.get(key)) is not kind for key, kind in kinds.items()):
            raise ValueError("it is no state of a server")
        self.port, self.pid, self.born, self.addresses = facts["port"], facts["pid"], facts["born"], tuple(map(str, facts["addresses"]))
        self.blocks = str(facts.get("blocks", self.blocks))

    @property
    def alive(self) -> bool:
        """Whether the process that we started still runs."""
        if self.process is not None and self.process.poll() is not None:
            return False
        return self.pid > 0 and born_at(self.pid) == self.born

    @property
    def log(self) -> Path:
        """Where the server writes."""
        return self.state / f"{self.name}.log"

    @property
    def key(self) -> Path:
        """Its identity file."""
        return self.state / f"{self.name}.key"

    def save(self) -> None:
        """Write ``NAME.json``, whole or not at all."""
        facts = {"blocks": self.blocks, "port": self.port, "pid": self.pid, "born": self.born, "addresses": list(self.addresses)}
        partial = self.state / f".{self.name}.json"
        partial.write_text(json.dumps(facts), encoding="utf-8")
        partial.replace(self.state / f"{self.name}.json")

    def start(self, member: Member, peers: Sequence[str], threads: int, sharing: int) -> int:
        """Start the process; returns where its part of the log begins."""
        config = member.config
        self.blocks = config.blocks
        more: dict[str, Any] = {"port": self.port, "identity": self.key, "initial_peers": [*config.initial_peers, *peers]}
        more["threads"] = config.threads or threads
        more["sharing"] = config.sharing if config.sharing > 1 else sharing
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "servers", *member.words(**more)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid, self.born = self.process.pid, born_at(self.process.pid)
        self.save()
        return begin

    def signal(self, number: int) -> None:
        """Send a signal to our process and to no other."""
        if self.alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass

    def forget(self) -> None:
        """Its process has ended; port and address stay for the next ``up``."""
        self.pid, self.born = 0, ""
        self.save()


def born_at(pid: int) -> str:
    """When a process started, in words that no other process with this number shares; empty where there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if state == "Z" else f"{boot} {fields[18]}"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    except ProcessLookupError:
        return ""
    done = subprocess.run(["ps", "-o", "state=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = done.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else started.strip()


def up(plan: Plan, wait_s: float) -> int:
    """Start all servers, wait until each serves, print where they are. If one fails, all are stopped.

    Raises:
        UsageError: a server runs already in this state directory, is for another machine, or has a port that is in use.
        ServerStartFailed: a server ended before it was ready, or took too long.
    """
    for member in plan.members:
        if member.host is not None:
            raise UsageError(f"{member.name} is for host {member.host}: use up --print, which prints the commands for each machine")
    _make(plan.state)
    with _only_one(plan.state):
        return _up(plan, wait_s)


def _make(state: Path) -> None:
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the state directory {state} cannot be made ({error.strerror}): give another one with --state") from error


@contextmanager
def _only_one(state: Path) -> Iterator[None]:
    """Keep a second ``up`` or ``down`` away from a state directory; the lock ends with this process, however it ends."""
    try:
        lock = (state / "lock").open("ab")
    except OSError as error:
        raise UsageError(f"the state directory {state} cannot be written ({error.strerror}): give another one with --state") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another scripts/swarm works with {state} at this moment: wait until it has finished, or end it with Ctrl-C") from error
        yield


def _up(plan: Plan, wait_s: float) -> int:
    strays = Running.strays(plan)
    if strays:
        named = ", ".join(f"{stray.name} (process {stray.pid})" for stray in strays)
        raise UsageError(f"servers of another plan run in {plan.state}: {named}; scripts/swarm down first, or give another directory with --state")
    swarm = [Running.of(member, plan.state) for member in plan.members]
    for running in swarm:
        if running.alive:
            raise UsageError(f"{running.name} runs already (process {running.pid}): scripts/swarm down first")
    for member, running in zip(plan.members, swarm, strict=True):
        running.port = _port(member.config, running.port)
        running.addresses = tuple(member.addresses(running.port, ensure_identity(running.key).peer_id))
    threads = max(1, (os.cpu_count() or 1) // len(swarm))  # servers that compete for cores wait for each other
    try:
        begins = [
            running.start(member, [address for other in swarm if other is not running for address in other.addresses], threads, len(swarm))
            for member, running in zip(plan.members, swarm, strict=True)
        ]
        ends_at = time.monotonic() + wait_s
        for running, begin in zip(swarm, begins, strict=True):
            running.addresses = _wait_ready(running, begin, ends_at, wait_s)
            running.save()
            print(f"{running.name} serves blocks {running.blocks} (process {running.pid}) at {' '.join(running.addresses)}")
            sys.stdout.flush()
    except BaseException:
        _stop(swarm, KILL_S)
        raise
    peers = ",".join(address for running in swarm for address in running.addresses)
    print(f"logs and keys: {plan.state}")
    print("train: " + shlex.join(["swarmtune", "recipe=lora_bloom", f"model={plan.model}", "swarm=join", f"swarm.initial_peers=[{peers}]"]))
    return 0


def _port(config: ServeConfig, last: int) -> int:
    """The port of the plan; otherwise the one of the last time, or a free one."""
    if config.port or not last:
        return check_port(config.listen, config.port, config.transport)
    try:
        return check_port(config.listen, last, config.transport)
    except UsageError:
        return check_port(config.listen, 0, config.transport)


def _wait_ready(running: Running, begin: int, ends_at: float, wait_s: float) -> tuple[str, ...]:
    """The addresses in the line that says that it serves."""
    while True:
        ended = not running.alive
        with running.log.open("rb") as log:
            log.seek(begin)
            lines = log.read().decode("utf-8", "replace").splitlines(keepends=True)
        for line in lines:
            if line.startswith(READY_LINE) and line.endswith("\n"):
                return tuple(line.rpartition(" at ")[2].split())
        if ended:
            said = lines[-1].strip()[:500].removeprefix("swarmtune serve: ") if lines else "it said nothing"
            raise ServerStartFailed(f"{running.name} ended before it was ready, so all were stopped: {said} (log: {running.log})")
        if time.monotonic() > ends_at:
            raise ServerStartFailed(f"{running.name} was not ready within {wait_s:.0f} s, so all were stopped (log: {running.log})")
        time.sleep(0.1)


def _stop(swarm: Sequence[Running], drain_s: float) -> list[str]:
    """SIGTERM to all, SIGKILL to those that are left; returns the names of those that had to be killed."""
    for running in swarm:
        running.signal(signal.SIGTERM)
    killed: list[str] = []
    for number, limit_s in ((signal.SIGKILL, drain_s), (None, KILL_S)):
        ends_at = time.monotonic() + limit_s
        while any(running.alive for running in swarm) and time.monotonic() < ends_at:
            time.sleep(0.1)
        for running in swarm:
            if number is not None and running.alive:
                killed.append(running.name)
                running.signal(number)
    for running in swarm:
        if running.pid and not running.alive:
            running.forget()
    return killed


def down(plan: Plan) -> int:
    """Ask all servers of the state directory to finish and end, those of an earlier plan too; end those that do not."""
    if not plan.state.is_dir():
        print("no server of this plan runs")
        return 0
    with _only_one(plan.state):
        return _down(plan)


def _down(plan: Plan) -> int:
    swarm = [*(Running.of(member, plan.state) for member in plan.members), *Running.strays(plan)]
    there = [running for running in swarm if running.alive]
    for running in swarm:
        if running.pid and running not in there:
            running.forget()
    killed = _stop(there, DRAIN_S)
    for running in there:
        how = "killed, because it did not finish in time" if running.name in killed else "stopped"
        print(f"{running.name} {how if not running.alive else 'still runs'}")
    if not there:
        print("no server of this plan runs")
    return 1 if any(running.alive for running in there) else 0


def status(plan: Plan) -> int:
    """One line per server, those of another plan that run here too: process, blocks, address, and what it answers when asked to describe itself."""
    swarm = [*(Running.of(member, plan.state) for member in plan.members), *Running.strays(plan)]
    asked = [running for running in swarm if running.alive]
    answers = dict(zip((r.name for r in asked), asyncio.run(_ask_all([r.addresses[:1] for r in asked])), strict=True)) if asked else {}
    fine = True
    for running in swarm:
        answered, said = answers.get(running.name, (False, "does not run"))
        process = f"process {running.pid}" if running.alive else "no process"
        said = said if running.member is not None else f"{said} (not in the plan)"
        print(f"{running.name}  blocks {running.blocks}  {process}  {' '.join(running.addresses) or 'no address yet'}  {said}")
        fine = fine and answered
    return 0 if fine else 1


async def _ask_all(addresses: Sequence[Sequence[str]]) -> list[tuple[bool, str]]:
    from swarmtune.transport.hivemind import HivemindNode

    node = HivemindNode()
    try:
        await node.start()
        return list(await asyncio.gather(*(_ask(node, address) for address in addresses)))
    finally:
        await node.close()


async def _ask(node: Any, addresses: Sequence[str]) -> tuple[bool, str]:
    from swarmtune.transport.base import TransportError
    from swarmtune.wire.codec import Message, decode, encode
    from swarmtune.wire.messages import CallKind, ServerInfo

    if not addresses:
        return False, "not ready yet"
    try:
        peer = await node.connect(addresses[0])
        await node.call(peer, encode(Message(CallKind.INFO), answer_bytes=0), INFO_S)  # the first one opens the stream
        began = time.monotonic()
        reply = decode(await node.call(peer, encode(Message(CallKind.INFO), answer_bytes=0), INFO_S))
        latency_s = time.monotonic() - began
        info = ServerInfo.from_json(reply.fields)
    except (TransportError, WireError) as error:
        return False, f"does not answer: {error}"
    return True, f"answers in {latency_s * 1e3:.1f} ms: blocks {info.span} in {info.dtype}, {info.rate_tok_s:,} tokens x blocks/s"


def show_commands(plan: Plan) -> int:
    """Print what to run on each machine. The keys are made here, so that every address is known before any server starts."""
    _make(plan.state)
    known: dict[str, list[str]] = {}
    for member in plan.members:
        if not member.config.port:
            raise UsageError(f"{member.name} needs a port, because its address must be known before it starts")
        known[member.name] = member.addresses(member.config.port, ensure_identity(plan.state / f"{member.name}.key").peer_id)
    for host in dict.fromkeys(member.host for member in plan.members):
        print(f"# on {host or 'this machine'}" + (f", after: scp {' '.join(_keys_of(plan, host))} {host}:" if host else ""))
        for member in plan.members:
            if member.host == host:
                others = [address for name, addresses in known.items() if name != member.name for address in addresses]
                key = f"{member.name}.key" if host else str(plan.state / f"{member.name}.key")
                words = member.words(identity=key, initial_peers=[*member.config.initial_peers, *others])
                print(shlex.join(["swarmtune", "serve", *words]))
        print()
    peers = ",".join(address for addresses in known.values() for address in addresses)
    print("# to train")
    print(shlex.join(["swarmtune", "recipe=lora_bloom", f"model={plan.model}", "swarm=join", f"swarm.initial_peers=[{peers}]"]))
    return 0


def _keys_of(plan: Plan, host: str) -> list[str]:
    return [shlex.quote(str(plan.state / f"{member.name}.key")) for member in plan.members if member.host == host]
