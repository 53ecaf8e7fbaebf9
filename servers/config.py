"""The schema of ``conf/server.yaml``."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from swarmtune.schema import Dtype, Quantize
from swarmtune.types import BlockSpan


@dataclass(frozen=True)
class ServeConfig:
    """One server."""

    model: str
    """A local directory in Hugging Face layout, or a hub id."""
    blocks: str
    """The blocks to hold, half-open and quoted: ``"0:4"`` is blocks 0, 1, 2, 3."""
    dtype: Dtype = Dtype.AUTO
    """Precision of the blocks; ``auto`` is the one that the model is stored in."""
    quantize: Quantize = Quantize.NONE
    """What the linear layers of the blocks hold their weights in: ``none`` (the dtype), ``int8`` or ``nf4``, by bitsandbytes."""
    memory_check: bool = True
    """Refuse to load blocks that cannot fit into the memory that is free; ``false`` loads them all the same."""
    device: str = "auto"
    """``auto`` takes a GPU where there is one; otherwise ``cpu``, ``cuda`` or ``cuda:N``."""
    initial_peers: tuple[str, ...] = ()
    """Addresses of servers of the swarm to join; none starts a new swarm."""
    listen: str = "127.0.0.1"
    """The IP address to listen on; loopback unless asked."""
    port: int = 0
    """The TCP port to listen on; 0 takes a free one."""
    name: str = ""
    """What people call this server."""
    threads: int | None = None
    """Threads of computation; all cores if not given."""
    max_tokens: int = 16384
    """Most tokens (rows times sequence length) of one call; the memory of activations grows with it."""
    max_sequence: int = 4096
    """Longest sequence of one call; the memory of attention can grow with its square."""
    parent_fd: int | None = None
    """Set by ``LocalSwarm``: a socket to the parent process, whose end ends this server."""

    def __post_init__(self) -> None:
        BlockSpan.parse(self.blocks)
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if min(self.max_tokens, self.max_sequence) < 1:
            raise ValueError(f"max_tokens and max_sequence must be at least 1, got {self.max_tokens} and {self.max_sequence}")
        if len(self.name) > 128 or not (self.name.isprintable() or not self.name):
            raise ValueError("name must be at most 128 printable characters")
        try:
            ipaddress.ip_address(self.listen)
        except ValueError as error:
            raise ValueError(f"listen must be an IP address, got {self.listen!r}") from error

    @property
    def listen_address(self) -> str:
        """As a multiaddress."""
        family = "ip6" if ":" in self.listen else "ip4"
        return f"/{family}/{self.listen}/tcp/{self.port}"
