"""The process that started this server, where ``LocalSwarm`` did."""

from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import dataclass

MAX_GREETING = 4096


@dataclass(slots=True)
class Parent:
    """The process that started this server, where ``LocalSwarm`` did; its end ends this process at once.

    Attributes:
        identity: the key file to use, as bytes.
    """

    channel: socket.socket
    identity: bytes

    @classmethod
    def greet(cls, fd: int) -> Parent:
        """Read the identity, then watch for the parent's end from a thread of its own."""
        channel = socket.socket(fileno=fd)
        channel.set_inheritable(False)
        line = b""
        while not line.endswith(b"\n") and len(line) < MAX_GREETING:
            received = channel.recv(MAX_GREETING)
            if not received:
                os._exit(0)
            line += received
        parent = cls(channel, bytes.fromhex(json.loads(line)["identity"]))
        threading.Thread(target=parent._watch, name="swarmtune-parent", daemon=True).start()
        return parent

    def tell(self, **facts: object) -> None:
        """Send one line of JSON."""
        self.channel.sendall(json.dumps(facts).encode() + b"\n")

    def _watch(self) -> None:
        try:
            while self.channel.recv(1):
                pass
        except OSError:
            pass
        os._exit(0)  # nobody is left to serve; the daemon's keeper sees our end and cleans up
