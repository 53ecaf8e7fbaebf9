"""What a server says of its own work: one line per minute, and one at the end."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from servers.executor import Executor
    from servers.handler import CallHandler

logger = logging.getLogger(__name__)


class Report:
    """Counts since the last line, beside counts since the start."""

    def __init__(self, handler: CallHandler, executor: Executor, device: torch.device, peers: Callable[[], Awaitable[int | None]]) -> None:
        self._handler, self._executor, self._device, self._peers = handler, executor, device, peers
        self._began = self._last = time.monotonic()
        self._calls = self._tokens = 0

    async def forever(self, every_s: float) -> None:
        """One line per ``every_s`` seconds."""
        while True:
            await asyncio.sleep(every_s)
            peers = await self._peers()
            logger.info("%s", self.line(peers))

    def line(self, peers: int | None) -> str:
        """Requests, speed, memory, peers and queue since the last line; the next one begins here."""
        handler, now = self._handler, time.monotonic()
        calls, tokens, seconds = handler.calls - self._calls, handler.tokens - self._tokens, max(now - self._last, 1e-6)
        self._calls, self._tokens, self._last = handler.calls, handler.tokens, now
        known = "?" if peers is None else f"{peers:,}"
        return (
            f"last {seconds:,.0f} s: {calls:,} requests ({handler.calls:,} in all, {handler.refused:,} refused), {tokens / seconds:,.0f} tokens/s, "
            f"{self._memory()}, {known} peers, {self._executor.queued} in the queue"
        )

    def total(self) -> str:
        """The whole life in one line."""
        handler, seconds = self._handler, max(time.monotonic() - self._began, 1e-6)
        work = f"{handler.calls:,} requests ({handler.refused:,} refused) and {handler.tokens:,} tokens"
        return f"stopped after {work} in {seconds:,.0f} s, {self._memory()}"

    def _memory(self) -> str:
        line = f"memory {resident_bytes() / 1e9:.2f} GB"
        if self._device.type == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info(self._device)
            line += f", {(total - free) / 1e9:.2f} of {total / 1e9:.2f} GB on {self._device}"
        return line


def resident_bytes() -> int:
    """Memory of this process now; where the system does not say, the most that it ever had."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(fields["VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
