"""The report of a doctor: tables for people, JSON for programs. What peers say is shown as plain text, never as markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swarmtune.doctor.check import Check, Status
from swarmtune.doctor.judge import coverage
from swarmtune.doctor.machine import size
from swarmtune.doctor.survey import Server
from swarmtune.notices import printable
from swarmtune.remote.census import by_model, short

STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red"}
PLAIN_WIDTH = 140
"""Columns where the output is no terminal."""
MAX_BAR = 64
MAX_ROWS = 24


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found.

    Attributes:
        seconds: what it took.
    """

    checks: tuple[Check, ...]
    servers: tuple[Server, ...]
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether anything failed."""
        return any(check.status is Status.FAILED for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "ok": not self.failed,
            "seconds": round(self.seconds, 3),
            "checks": [asdict(check) for check in self.checks],
            "servers": [_server_json(server) for server in self.servers],
            "coverage": [
                {"model": model, "num_blocks": num_blocks, "spans": [{"blocks": str(span), "servers": count} for span, count in spans]}
                for model, num_blocks, spans in _coverages(self.servers)
            ],
        }


def show(report: Report) -> None:
    """Print the tables."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in report.checks:
        found = Text(check.found)
        if check.advice:
            found.append(f"\n-> {check.advice}", style="italic")
        table.add_row(Text(str(check.status), style=STYLES[check.status]), Text(check.name, style="bold"), found)
    console.print(table)
    if report.servers:
        console.print(_server_table(report.servers))
        for model, num_blocks, spans in _coverages(report.servers):
            console.print(_coverage_text(model, num_blocks, spans), soft_wrap=True)
    counts = {status: sum(check.status is status for check in report.checks) for status in Status}
    verdict = f"{counts[Status.FAILED]} failed, {counts[Status.WARNING]} warnings, {counts[Status.OK]} ok, in {report.seconds:.1f} s"
    console.print(Text(verdict, style=STYLES[Status.FAILED if report.failed else Status.OK]))


def _server_table(servers: Sequence[Server]) -> Table:
    table = Table(box=SIMPLE_HEAD, caption_justify="left", pad_edge=False)
    for heading in ("server", "address", "blocks", "model", "computes in", "class", "version", "says tok/s", "latency", "up", "down"):
        table.add_column(heading, overflow="fold")
    for server in servers:
        info = server.info
        quantisation = info.numeric.get("quantisation", "none")
        cells = (
            f"{info.name} {short(server.peer)}".strip() + (f" ({info.family})" if info.family else ""),
            server.address,
            f"{info.span} of {info.num_blocks}",
            info.model[:8],
            info.dtype if quantisation == "none" else f"{info.dtype}, {quantisation}",
            info.numeric_class[:8],
            info.version,
            f"{info.rate_tok_s:,}" if info.rate_tok_s else "-",
            "-" if server.latency_s is None else f"{server.latency_s * 1000:.1f} ms",
            _rate(server.up_bytes_s),
            _rate(server.down_bytes_s),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    table.caption = (
        "server: its name, peer and (family). "
        "says tok/s: tokens times blocks per second, the server's own word. up, down: at least this much; up includes the round trip, down also "
        "sending as much and computing one block (measured with --model only)"
    )
    return table


def _rate(bytes_s: float | None) -> str:
    return "-" if bytes_s is None else f"≥ {size(bytes_s)}/s"


def _coverages(servers: Sequence[Server]) -> list[tuple[str, int, list[tuple[Any, int]]]]:
    infos = {server.peer: server.info for server in servers}
    return [(model, num_blocks, coverage([infos[peer].span for peer in peers], num_blocks)) for (model, num_blocks), peers in by_model(infos).items()]


def _coverage_text(model: str, num_blocks: int, spans: Sequence[tuple[Any, int]]) -> Text:
    """Servers per block: a digit for each block where they fit, else a line per span."""
    text = Text.assemble((f"blocks of {printable(model)[:8]}  ", "bold"))
    if num_blocks <= MAX_BAR:
        for span, count in spans:
            digit = "·" if count == 0 else str(count) if count < 10 else "+"
            text.append(digit * len(span), style=STYLES[Status.FAILED if count == 0 else Status.WARNING if count == 1 else Status.OK])
        return text.append("  (servers per block; · is nobody)")
    shown = ", ".join(f"{span}: {count}" for span, count in spans[:MAX_ROWS])
    return text.append(f"{shown}{', ...' if len(spans) > MAX_ROWS else ''}  (servers per block)")


def _server_json(server: Server) -> dict[str, Any]:
    info = server.info.to_json()
    info.pop("block_digests")
    return {
        "peer": server.peer,
        "address": server.address,
        **info,
        "announced": server.announced,
        "clock_ahead_s": server.ahead_s,
        "clock_ahead_error_s": server.ahead_error_s,
        "latency_s": server.latency_s,
        "up_bytes_s_at_least": server.up_bytes_s,
        "down_bytes_s_at_least": server.down_bytes_s,
    }
