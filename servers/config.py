"""The schema of ``conf/server.yaml``, and how a person types its values."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from swarmtune.config import compose
from swarmtune.schema import Compile, Dtype, Quantize
from swarmtune.types import BlockSpan

TEXT_KEYS = frozenset(("model", "blocks", "identity", "name", "family"))
"""Keys whose value is text, taken as typed: spaces, brackets, colons and digits mean nothing to Hydra there."""
LIST_KEYS = frozenset(("initial_peers", "announce"))
"""Keys that take a list, or one item without brackets."""
MAX_LABEL = 128


class Transport(enum.Enum):
    """How peers reach a server."""

    TCP = "tcp"
    QUIC = "quic"
    BOTH = "both"


@dataclass(frozen=True)
class ServeConfig:
    """One server."""

    model: str
    """A local directory in Hugging Face layout, a hub id, or ``pkg://package/folder``."""
    blocks: str
    """The blocks to hold, half-open: ``0:4`` is blocks 0, 1, 2, 3 (in a YAML file quoted, ``"0:4"``)."""
    dtype: Dtype = Dtype.AUTO
    """Precision of the blocks: ``auto`` (as stored, where this hardware computes in it), ``float32``, ``bfloat16`` or ``float16``."""
    quantize: Quantize = Quantize.NONE
    """What the linear layers of the blocks hold their weights in: ``none`` (the dtype), ``int8`` or ``nf4``, by bitsandbytes."""
    memory_check: bool = True
    """Refuse to load blocks that cannot fit into the memory that is free; ``false`` loads them all the same."""
    device: str = "auto"
    """``auto`` takes a GPU where there is one; otherwise ``cpu``, ``cuda`` or ``cuda:N``."""
    initial_peers: tuple[str, ...] = ()
    """Addresses of servers of the swarm to join; none starts a new swarm."""
    listen: str = "127.0.0.1"
    """The IP address to listen on; ``0.0.0.0`` or ``::`` is all addresses of this machine."""
    port: int = 0
    """The port to listen on, for TCP and UDP alike; 0 takes a free one."""
    transport: Transport = Transport.TCP
    """``tcp``, ``quic`` (over UDP) or ``both``; TCP is faster wherever a network loses packets."""
    announce: tuple[str, ...] = ()
    """What others dial instead of the address that is listened on: IP addresses or multiaddresses, such as those of a router that forwards."""
    identity: str | None = None
    """A file that holds the key of this server, made if absent: with it and a fixed port the address stays the same after a restart."""
    name: str = ""
    """What people call this server."""
    family: str = ""
    """Whose server this is: the same text on all servers of one owner."""
    relay: bool = False
    """Carry traffic between peers that cannot reach each other."""
    nat_mapping: bool = False
    """Ask the router (UPnP, NAT-PMP) to forward the port."""
    auto_relay: bool = False
    """Ask the initial peers to relay for this server."""
    log_every_s: float = 60.0
    """Seconds between lines about requests, speed, memory and peers."""
    threads: int | None = None
    """Threads of computation; all cores if not given."""
    max_tokens: int = 16384
    """Most tokens (rows times sequence length) of one call; the memory of activations grows with it."""
    max_sequence: int = 4096
    """Longest sequence of one call; the memory of attention can grow with its square."""
    activation_gib: float | None = None
    """GiB of activations kept from forwards for their backwards; a quarter of what is free after loading if not given; 0 keeps nothing."""
    sharing: int = 1
    """Servers on this machine that share what is free: each takes its part of that quarter. ``LocalSwarm`` and ``scripts/swarm`` set it."""
    activation_ttl_s: float = 600.0
    """Seconds after which activations that nobody came back for are freed."""
    compile: Compile = Compile.AUTO
    """``auto`` compiles, in the background, the blocks for clients that ask for it (``swarm.compile=auto``); ``none`` does not."""
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
        for key, label in (("name", self.name), ("family", self.family)):
            if len(label) > MAX_LABEL or not label.isprintable():
                raise ValueError(f"{key} must be at most {MAX_LABEL} printable characters")
        if self.sharing < 1:
            raise ValueError(f"sharing must be at least 1, got {self.sharing}")
        if self.activation_gib is not None and not 0 <= self.activation_gib < 1e6:
            raise ValueError(f"activation_gib must be at least 0 and below a million, got {self.activation_gib}")
        if not 0 < self.activation_ttl_s < 1e6:
            raise ValueError(f"activation_ttl_s must be above 0 and below a million, got {self.activation_ttl_s}")
        if not 0 < self.log_every_s < 1e6:
            raise ValueError(f"log_every_s must be above 0 and below a million, got {self.log_every_s}")
        if self.identity is not None and not self.identity.strip():
            raise ValueError("identity must name a file")
        if self.auto_relay and not self.initial_peers:
            raise ValueError("auto_relay needs initial_peers: these are the servers that relay")
        try:
            ip = ipaddress.ip_address(self.listen)
        except ValueError as error:
            raise ValueError(f"listen must be an IP address, got {self.listen!r}") from error
        if "%" in self.listen or ip.is_multicast:
            raise ValueError(f"listen must be an IP address without a zone, and not a multicast one, got {self.listen!r}")


def read_words(words: Sequence[str]) -> ServeConfig:
    """The checked configuration that ``key=value`` words mean: text needs no quotes, a list of one no brackets.

    Raises:
        UsageError: anything wrong with a word or a value, in one sentence.
    """
    verbatim: dict[str, str] = {}
    others: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        plain = bool(equals) and text.strip() not in ("", "null") and text.lstrip()[:1] not in ("'", '"', "[")
        if plain and key in TEXT_KEYS:
            verbatim[key] = text
        else:
            verbatim.pop(key, None)  # of a key that is given twice, the last value counts
            others.append(f"{key}=[{text}]" if plain and key in LIST_KEYS else word)
    return compose("server", others, ServeConfig, verbatim=verbatim)
