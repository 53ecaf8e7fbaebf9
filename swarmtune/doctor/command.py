"""``swarmtune doctor``: its flags, and the order in which things are checked."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from swarmtune.doctor.check import Check, Status
from swarmtune.errors import ServerStartFailed, UsageError

DESCRIPTION = """\
Check this machine, and with --peer a swarm: versions, ports, addresses, IPv6, clock, the p2p daemon, disk and caches; and of a swarm each
server's blocks, numeric class, latency and bandwidth, gaps in coverage, and servers that do not fit together. Says what to do.
"""
EPILOG = """\
Exit code: 0 when nothing failed, 1 when something did, 2 for a wrong flag.

Example: swarmtune doctor --peer /ip4/10.0.0.1/tcp/31337/p2p/12D3Koo... --model path/to/model
"""


@dataclass(frozen=True, slots=True)
class Target:
    """What to look at besides this machine.

    Attributes:
        runs: where runs are written.
    """

    peers: tuple[str, ...]
    model: str | None
    runs: Path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a flag in one sentence."""
        raise UsageError(f"doctor: {message}; swarmtune doctor --help lists the flags")


def main(words: Sequence[str]) -> int:
    """Run all checks and print the report; returns the exit code.

    Raises:
        UsageError: a flag is wrong.
    """
    began = time.monotonic()
    options = parser().parse_args(list(words))
    _check_options(options)
    target = find_target(options)
    with _working(options.json):
        checks, servers = run_checks(options, target)
    from swarmtune.doctor.report import Report, show

    report = Report(tuple(checks), tuple(servers), time.monotonic() - began)
    if options.json:
        _print_json(report.to_json())
    else:
        show(report)
    return int(report.failed)


def _print_json(values: dict[str, Any]) -> None:
    """Print for programs; one that has read enough, such as ``head``, is no error."""
    try:
        print(json.dumps(values, indent=2), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed when the process ends


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = _Parser(
        prog="swarmtune doctor", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument("--peer", action="append", default=[], metavar="ADDRESS", help="address of a server of a swarm; may be given several times")
    found.add_argument("--model", metavar="PATH|ID", help="the model to train: does the swarm serve it?")
    found.add_argument("--run", type=Path, metavar="DIR", help="a run directory: its model, its swarm's peers, its disk")
    found.add_argument("--listen", default="127.0.0.1", metavar="IP", help="where a server would listen (default: 127.0.0.1)")
    found.add_argument("--port", type=int, default=0, metavar="N", help="the port on which a server would listen (default: any free one)")
    found.add_argument("--cache", type=Path, metavar="DIR", help="swarmtune's own cache (default: ~/.cache/swarmtune)")
    found.add_argument("--json", action="store_true", help="print the results for programs")
    return found


def _check_options(options: argparse.Namespace) -> None:
    try:
        ipaddress.ip_address(options.listen)
    except ValueError as error:
        raise UsageError(f"doctor: --listen must be an IP address such as 127.0.0.1 or 0.0.0.0, got {options.listen!r}") from error
    if not 0 <= options.port < 1 << 16:
        raise UsageError(f"doctor: --port must be from 0 to 65535, got {options.port}")


def find_target(options: argparse.Namespace) -> Target:
    """The flags, with what the run directory says where they say nothing.

    Raises:
        UsageError: there is no run in that directory.
    """
    if options.run is None:
        return Target(tuple(options.peer), options.model, Path("runs"))
    settings = _run_settings(options.run)
    peers = tuple(options.peer) or tuple(map(str, settings.get("swarm", {}).get("initial_peers") or ()))
    path = settings.get("model", {}).get("path")
    if options.model is None and path is not None:
        from swarmtune.config import resolve_path

        path = resolve_path(str(path))
    return Target(peers, options.model or path, options.run)


def _run_settings(run: Path) -> dict[str, Any]:
    import yaml

    file = run / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        detail = error.strerror if isinstance(error, OSError) else "it is not YAML"
        raise UsageError(f"doctor: --run must be the directory of a run, with a config.yaml; {file}: {detail}") from error
    if not isinstance(settings, dict) or not all(isinstance(settings.get(key, {}), dict) for key in ("swarm", "model")):
        raise UsageError(f"doctor: --run: {file} is not the configuration of a run")
    return settings


def run_checks(options: argparse.Namespace, target: Target) -> tuple[list[Check], list[Any]]:
    """All checks, and the servers that were found."""
    from swarmtune.doctor.machine import check_machine

    checks = check_machine(options.listen, options.port, target.runs, caches(options.cache))
    facts = None
    if target.model is not None:
        from swarmtune.doctor.model import find_model

        found, facts = find_model(target.model)
        checks += found
    from swarmtune.doctor.daemon import check_daemon

    port_is_free = all(check.status is not Status.FAILED for check in checks if check.name == "port")
    checks += asyncio.run(check_daemon(options.listen if port_is_free else "127.0.0.1", options.port if port_is_free else 0))
    if not target.peers:
        return checks, []
    from swarmtune.doctor.judge import judge
    from swarmtune.doctor.survey import survey

    try:
        result = asyncio.run(survey(target.peers, facts.digest if facts else None, facts.hidden if facts else None))
    except ServerStartFailed as error:
        return [*checks, Check("swarm", Status.FAILED, str(error), "mend the daemon first")], []
    return checks + judge(result, (facts.digest, facts.num_blocks) if facts else None), list(result.servers)


def caches(own: Path | None) -> dict[str, Path]:
    """The caches whose size and room are checked."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return {"Hugging Face cache": Path(HF_HUB_CACHE), "swarmtune's cache": own or Path(root) / "swarmtune"}


def _working(quiet: bool) -> Any:
    """A spinner on a terminal while the checks run."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet).status("checking; every check has a deadline")
