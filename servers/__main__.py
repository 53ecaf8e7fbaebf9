"""``python -m servers model=... blocks="0:4"``: one server in the foreground, the same as ``swarmtune serve``."""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servers.config import ServeConfig
from swarmtune.config import compose
from swarmtune.errors import ServerStartFailed, SwarmError, SwarmtuneError, UsageError, WireError
from swarmtune.schema import Dtype

if TYPE_CHECKING:
    import torch

    from servers.handler import CallHandler
    from servers.span import Span
    from swarmtune.transport.hivemind import HivemindNode
    from swarmtune.wire.messages import ServerInfo

logger = logging.getLogger("servers")

DRAIN_S = 30.0
PORT_WAIT_S = 10.0
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


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for GPU kernels that this machine need not have
    parent: Parent | None = None
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        keys = importlib.resources.files("conf").joinpath("server.yaml").read_text(encoding="utf-8")
        sys.stdout.write(f"swarmtune serve key=value ...: hold some blocks of a model and serve them, until Ctrl-C\n\n{keys}")
        return 0
    try:
        config = compose("server", words, ServeConfig)
        parent = Parent.greet(config.parent_fd) if config.parent_fd is not None else None
        asyncio.run(_serve(config, parent))
    except UsageError as error:
        return _fail(parent, str(error), 2)
    except SwarmtuneError as error:
        return _fail(parent, str(error), 1)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the top of the process: say it to the parent too, then show the traceback
        logger.exception("the server ended")
        return _fail(parent, f"{type(error).__name__}: {error}", 1)
    return 0


def _fail(parent: Parent | None, sentence: str, code: int) -> int:
    sys.stderr.write(f"swarmtune serve: {sentence}\n")
    if parent is not None:
        parent.tell(error=sentence, code=code)
    return code


async def _serve(config: ServeConfig, parent: Parent | None) -> None:
    from servers.executor import Executor
    from servers.handler import CallHandler
    from swarmtune.discovery.dht import DirectoryNode
    from swarmtune.discovery.records import check_address

    try:
        for address in config.initial_peers:
            check_address(address)
    except WireError as error:
        raise UsageError(f"initial_peers: {error}") from error
    if parent is None:
        check_port(config)
    span, info = _load(config)
    executor = Executor().start()
    handler = CallHandler(info, span, executor, max_tokens=config.max_tokens, max_sequence=config.max_sequence)
    directory = DirectoryNode()
    node = await _start_node(config, parent)
    try:
        reachable = await _reach(node, config.initial_peers)
        await directory.start(node.p2p, reachable, client=False)
        await node.serve(handler)
        from servers.announce import announce_forever

        announcing = asyncio.create_task(announce_forever(node, directory, config.initial_peers, lambda: handler.info))
        logger.info("serving blocks %s of %s in %s at %s", span.span, config.model, info.mode, " ".join(node.addresses))
        if parent is not None:
            parent.tell(peer=node.peer_id, addresses=list(node.addresses))
        await _until_told(handler, announcing, node.daemon_ended)
    finally:
        await directory.close()
        await node.close()
        executor.close(1.0)


def _load(config: ServeConfig) -> tuple[Span, ServerInfo]:
    """Everything heavy: the libraries, then the weights."""
    import torch

    import swarmtune
    from servers.memory import check_fits, estimate
    from servers.numeric import numeric_class, numeric_facts
    from servers.span import Span
    from servers.weights import load_blocks
    from swarmtune.skeleton import check_identity, check_span, config_digest, load_config, stored_dtype
    from swarmtune.types import BlockSpan
    from swarmtune.wire.messages import ServerInfo

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    model_config = load_config(config.model)
    site = check_identity(model_config)
    blocks = check_span(BlockSpan.parse(config.blocks), site.num_blocks)
    dtype = stored_dtype(model_config) if config.dtype is Dtype.AUTO else getattr(torch, config.dtype.value)
    quantise = config.quantize.value
    if dtype is torch.float16 and device.type == "cpu":
        logger.warning("float16 is many times slower than float32 on a CPU (docs/quantization.md): use dtype=bfloat16")
    need = estimate(model_config, site, blocks, dtype, quantise, device, max_tokens=config.max_tokens, max_sequence=config.max_sequence)
    check_fits(need, blocks, device, refuse=config.memory_check)
    began = time.monotonic()
    weights = load_blocks(
        config.model, model_config, site, blocks, dtype, device, lambda done, total: logger.info("loaded block %d of %d", done, total), quantise
    )
    logger.info("blocks %s loaded in %.1f s", blocks, time.monotonic() - began)
    if quantise != "none":
        logger.info("weights are held in %s: the largest error of a matrix is %.2g of its norm", quantise, weights.error)
    digest = config_digest(model_config)
    facts = numeric_facts(model_config, digest, dtype, device, quantise)
    info = ServerInfo(
        model=digest,
        num_blocks=site.num_blocks,
        span=blocks,
        block_digests=weights.digests,
        dtype=facts["dtype"],
        numeric_class=numeric_class(facts),
        numeric=facts,
        version=swarmtune.__version__,
        name=config.name,
    )
    return Span(model_config, site, blocks, weights, dtype, device), info


def check_port(config: ServeConfig) -> None:
    """Refuse an address that another program uses: libp2p would share its port, and callers would reach either.

    Raises:
        UsageError: the port is in use, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in config.listen else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server that has just ended is free
        try:
            probe.bind((config.listen, config.port))
        except OSError as error:
            raise UsageError(
                f"{config.listen} port {config.port} cannot be listened on ({error.strerror}): choose another listen= or port="
            ) from error


def pick_device(name: str) -> torch.device:
    """The device that ``device=`` means.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if (device.type == "cuda" and not torch.cuda.is_available()) or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name} is not available here: use device=auto or device=cpu")
    return device


async def _start_node(config: ServeConfig, parent: Parent | None) -> HivemindNode:
    """Start the daemon; a fixed port may be held for a moment by the daemon of a server that has just died."""
    from swarmtune.discovery.identity import Identity
    from swarmtune.transport.hivemind import HivemindNode

    identity = Identity.from_bytes(parent.identity) if parent else None
    ends_at = time.monotonic() + PORT_WAIT_S
    while True:
        try:
            return await HivemindNode(identity).start([config.listen_address])
        except ServerStartFailed:
            if not config.port or parent is None or time.monotonic() > ends_at:
                raise
        await asyncio.sleep(0.2)


async def _reach(node: HivemindNode, addresses: tuple[str, ...]) -> list[str]:
    """The initial peers that answer now; the announcer meets the others later."""
    from swarmtune.discovery.records import peer_of
    from swarmtune.transport.base import TransportError

    others = [address for address in addresses if peer_of(address) != node.peer_id]
    answers = await asyncio.gather(*(node.connect(address) for address in others), return_exceptions=True)
    for address, answer in zip(others, answers, strict=True):
        if isinstance(answer, TransportError):
            logger.info("the initial peer %s does not answer yet", address)
        elif isinstance(answer, BaseException):
            raise answer
    return [address for address, answer in zip(others, answers, strict=True) if isinstance(answer, str)]


async def _until_told(handler: CallHandler, announcing: asyncio.Task[None], daemon_ended: asyncio.Event) -> None:
    """Wait for SIGTERM or Ctrl-C, then refuse new work and finish what is in flight; a second signal ends at once.

    Raises:
        SwarmError: the daemon ended, so nobody can reach this server any more.
    """
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    waits = [asyncio.create_task(told.wait()), asyncio.create_task(daemon_ended.wait())]
    await asyncio.wait([*waits, announcing], return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if announcing.done():
        announcing.result()
    announcing.cancel()
    if daemon_ended.is_set():
        raise SwarmError("the p2p daemon of this server ended, so nobody can reach it: start the server again")
    handler.draining = True
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, os._exit, 0)
    ends_at = time.monotonic() + DRAIN_S
    while handler.in_flight and time.monotonic() < ends_at:
        await asyncio.sleep(0.05)
    logger.info("stopped after %d calls", handler.calls)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of libraries may linger; everything of ours has been closed
