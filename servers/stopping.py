"""What Ctrl-C and SIGTERM do to a server."""

from __future__ import annotations

import asyncio
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """While the server loads, a signal ends the process at once; later the first one asks it to drain, and a second one ends it at once.

    Attributes:
        told: set once a signal has asked to drain.
    """

    def __init__(self) -> None:
        self.told = asyncio.Event()

    def arm(self) -> Stop:
        """From now on a signal ends the process. Nothing has been started yet that would have to be stopped."""
        for number in SIGNALS:
            signal.signal(number, lambda *_: _end("stopped while loading"))
        return self

    def drain_first(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on the first signal sets ``told``."""
        for number in SIGNALS:
            loop.add_signal_handler(number, self._hear)

    def _hear(self) -> None:
        if self.told.is_set():
            _end("stopped at once, without finishing the calls in flight")
        self.told.set()


def _end(why: str) -> None:
    """End the process with code 0; the keeper sees that, ends the daemon and removes its directory."""
    terminal = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # a progress bar has hidden the cursor, and has its own idea of standard error
    os.write(2, f"{terminal}swarmtune serve: {why}\n".encode())
    os._exit(0)
