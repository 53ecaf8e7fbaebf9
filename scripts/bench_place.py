"""Where a measurement runs: servers and client on loopback, or each on a host of an emulated network. All of it ends with the ``with``."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import swarmtune
from swarmtune.discovery.identity_file import ensure_identity
from swarmtune.errors import ServerStartFailed
from swarmtune.swarm import Swarm
from tests.netlab import PRESETS as LINKS
from tests.netlab import NetLab

ROOT = Path(__file__).resolve().parent.parent
CLIENT, PORT, STOP_S = "client", 31337, 10.0


@dataclass(frozen=True, slots=True)
class Preset:
    """What ``--preset`` stands for.

    Attributes:
        servers: unless ``--servers`` says otherwise.
        link: of every host, client and servers alike, by its name in the network emulator; ``None`` is loopback without any.
        micro_batch_tokens: unless ``--micro-batch-tokens`` says otherwise: several micro-batches hide a network's delay, and one is enough without.
    """

    servers: int
    link: str | None
    micro_batch_tokens: int

    @property
    def says(self) -> str:
        """The network in words."""
        if self.link is None:
            return "loopback"
        link = LINKS[self.link]
        return f"{4 * link.delay_ms:.0f} ms round trip and {link.rate_mbit} Mbit/s per host"


PRESETS = {"loopback": Preset(2, None, 4096), "wan": Preset(2, "wan", 256), "wan4": Preset(4, "wan4", 256)}


@dataclass(frozen=True, slots=True)
class Place:
    """Servers that serve.

    Attributes:
        addresses: of the servers.
        pids: of the servers.
        lab: the network between them, if it is not loopback.
    """

    addresses: Sequence[str]
    pids: Sequence[int]
    lab: NetLab | None = None

    def connect(self, **settings: Any) -> Swarm:
        """A connection from this process, on the client's host: its loop thread and its daemon stay there."""
        with self.lab.inside(CLIENT) if self.lab is not None else contextlib.nullcontext():
            return swarmtune.connect(self.addresses, **settings)


def complete(options: argparse.Namespace) -> Preset:
    """Fill in what ``options`` leave to the preset."""
    preset = PRESETS[options.preset]
    options.servers = options.servers or preset.servers
    options.in_flight = options.in_flight or max(4, options.servers + 2)
    options.micro_batch_tokens = options.micro_batch_tokens or preset.micro_batch_tokens
    return preset


@contextlib.contextmanager
def serving(model: Path, spans: Sequence[str], options: argparse.Namespace, directory: Path, link: str | None = None) -> Iterator[Place]:
    """Servers of ``spans``, ready to be asked.

    Raises:
        ServerStartFailed: one of them ended before it served.
        NetLabError: there can be no network here.
    """
    if link is not None:
        with _in_lab(model, spans, options, directory, link) as place:
            yield place
        return
    with swarmtune.LocalSwarm(model, spans, dtype=options.dtype, threads=options.threads, device=options.device) as local:
        yield Place(local.initial_peers, [server.pid for server in local.servers])


@contextlib.contextmanager
def _in_lab(model: Path, spans: Sequence[str], options: argparse.Namespace, directory: Path, link: str) -> Iterator[Place]:
    """Each server on a host of its own; in sessions of their own, so that Ctrl-C is ours."""
    hosts = [f"server{number}" for number in range(len(spans))]
    with NetLab(dict.fromkeys((CLIENT, *hosts), LINKS[link])) as lab, contextlib.ExitStack() as stack:
        keys = {host: directory / f"{host}.key" for host in hosts}
        addresses = [f"/ip4/{lab.address(host)}/tcp/{PORT}/p2p/{ensure_identity(keys[host]).peer_id}" for host in hosts]
        servers: list[subprocess.Popen[str]] = []
        for host, span in zip(hosts, spans, strict=True):
            words = [f"model={model}", f"blocks={span}", f"dtype={options.dtype}", f"threads={options.threads}", f"device={options.device}"]
            words += [f"listen={lab.address(host)}", f"port={PORT}", f"identity={keys[host]}", f"initial_peers=[{','.join(addresses)}]"]
            log = stack.enter_context((directory / f"{host}.log").open("wb"))
            command = [sys.executable, "-P", "-m", "servers", *words]
            pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
            server = lab.popen(host, command, cwd=ROOT, text=True, start_new_session=True, **pipes)
            stack.callback(_end, server)
            servers.append(server)
        stack.callback(_ask_to_stop, servers)
        for host, span, server in zip(hosts, spans, servers, strict=True):
            assert server.stdout is not None
            if "serving blocks" not in server.stdout.readline():
                said = (directory / f"{host}.log").read_text(errors="replace").strip().splitlines() or ["it said nothing"]
                raise ServerStartFailed(f"the server of blocks {span} did not start: {said[-1][:500]}")
        yield Place(addresses, [server.pid for server in servers], lab)


def _ask_to_stop(servers: Sequence[subprocess.Popen[str]]) -> None:
    """All at once; they are waited for afterwards."""
    for server in servers:
        server.terminate()


def _end(server: subprocess.Popen[str]) -> None:
    """It was told to stop; wait for that, but not for ever."""
    assert server.stdout is not None
    server.stdout.close()
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
