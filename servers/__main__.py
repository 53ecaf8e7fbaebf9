"""``python -m servers model=... blocks="0:4"``: one server in the foreground, the same as ``swarmtune serve``."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import importlib.resources
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from servers.addresses import announced_addresses, check_port, listen_addresses
from servers.config import ServeConfig, read_words
from servers.parent import Parent
from servers.progress import loading
from servers.report import Report
from servers.stopping import Stop
from swarmtune.config import resolve_path
from swarmtune.errors import ServerStartFailed, SwarmError, SwarmtuneError, UsageError, WireError
from swarmtune.notices import printable
from swarmtune.schema import Compile, Dtype, Quantize
from swarmtune.startup import without_collecting

if TYPE_CHECKING:
    import torch

    from servers.handler import CallHandler
    from servers.span import Span
    from swarmtune.discovery.dht import DirectoryNode
    from swarmtune.discovery.identity import Identity
    from swarmtune.transport.hivemind import HivemindNode
    from swarmtune.wire.messages import ServerInfo

logger = logging.getLogger("servers")

DRAIN_S = 30.0
ANNOUNCE_S = 1.0
"""How long a server that has nothing left to do stays until its last announcement is stored."""
PORT_WAIT_S = 10.0


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # open as long as this process
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for GPU kernels that this machine need not have
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    # Threads that wait for each other spin for milliseconds on cores that another server or the client needs: two servers took five times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Compilers that torch starts as processes outlive a kill; in whichever thread it compiles, so no setting of one thread.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    parent: Parent | None = None
    stop = Stop().arm()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        keys = importlib.resources.files("conf").joinpath("server.yaml").read_text(encoding="utf-8")
        sys.stdout.write(f"swarmtune serve key=value ...: hold some blocks of a model and serve them, until Ctrl-C\n\n{keys}")
        return 0
    try:
        config = read_words(words)
        if config.quantize is Quantize.NONE:
            # PEFT imports it where it is installed, and torch's compiler with it: a second of each start. It has to do with quantised blocks alone.
            sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
        parent = Parent.greet(config.parent_fd) if config.parent_fd is not None else None
        config = dataclasses.replace(config, model=resolve_path(config.model))
        asyncio.run(_serve(config, parent, stop))
    except UsageError as error:
        return _fail(parent, str(error), 2)
    except SwarmtuneError as error:
        return _fail(parent, str(error), 1)
    except Exception as error:  # the top of the process: say it to the parent too, then show the traceback
        logger.exception("the server ended")
        return _fail(parent, f"{type(error).__name__}: {error}", 1)
    return 0


def _fail(parent: Parent | None, sentence: str, code: int) -> int:
    sentence = printable(sentence, 4000)
    sys.stderr.write(f"swarmtune serve: {sentence}\n")
    if parent is not None:
        parent.tell(error=sentence, code=code)
    return code


async def _serve(config: ServeConfig, parent: Parent | None, stop: Stop) -> None:
    """Check what can be checked at once, load, then go on the network until a signal, or until something that a server needs has ended."""
    from swarmtune.discovery.records import check_address

    try:
        for address in config.initial_peers:
            check_address(address)
    except WireError as error:
        raise UsageError(f"initial_peers: {error}") from error
    with _identity(config, parent) as identity:
        announced_addresses(config.announce, config.port or 1, config.transport, identity.peer_id)
        if parent is None:
            check_port(config.listen, config.port, config.transport)
        logger.info("loading blocks %s of %s", config.blocks, config.model)
        with without_collecting():
            for name in ("peft", "servers.handler", "servers.weights", "swarmtune.discovery.dht", "swarmtune.transport.hivemind"):
                importlib.import_module(name)
        span, info = _load(config)
        stop.drain_first(asyncio.get_running_loop())
        await _serve_span(config, parent, stop, identity, span, info)


@contextlib.contextmanager
def _identity(config: ServeConfig, parent: Parent | None) -> Iterator[Identity]:
    """The parent's, the one in the file, which is held as long, or a new one."""
    from swarmtune.discovery.identity import Identity
    from swarmtune.discovery.identity_file import hold_identity

    if parent is None and config.identity is not None:
        with hold_identity(config.identity) as identity:
            yield identity
    else:
        yield Identity.from_bytes(parent.identity) if parent else Identity.generate()


async def _serve_span(config: ServeConfig, parent: Parent | None, stop: Stop, identity: Identity, span: Span, info: ServerInfo) -> None:
    from servers.executor import Executor
    from servers.handler import CallHandler
    from swarmtune.discovery.dht import DirectoryNode
    from swarmtune.transport.hivemind import HivemindNode

    executor = Executor().start()
    handler = CallHandler(info, span, executor, max_tokens=config.max_tokens, max_sequence=config.max_sequence)
    node, directory = HivemindNode(identity), DirectoryNode()
    report = Report(handler, executor, span.device, node.count_peers)
    working = asyncio.create_task(_work(config, parent, node, directory, handler, report))
    try:
        await _until_told(stop, working, handler, node, directory)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await directory.close()
        await node.close()
        executor.close(1.0)
        logger.info("%s", report.total())


async def _work(
    config: ServeConfig, parent: Parent | None, node: HivemindNode, directory: DirectoryNode, handler: CallHandler, report: Report
) -> NoReturn:
    """Go on the network, say so, answer calls, announce and report, until cancelled.

    Raises:
        SwarmError: the daemon ended, so nobody can reach this server any more.
    """
    from servers.announce import announce_forever
    from servers.graphs import expire_forever
    from servers.memory import trim_when_idle

    await _start_node(config, parent, node)
    # torch sets the variable itself, to a name with its user, where it compiles: any other was set by whoever started this, and stays.
    if os.path.basename(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_")).startswith("torchinductor_"):
        # What a compiler that is ended with this server leaves half written would fail every later one that finds it; and /tmp is everybody's.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(node.directory / "compiled")
    reachable = await _reach(node, config.initial_peers)
    await directory.start(node.p2p, reachable, client=False)
    node.rebuilt.append(lambda: directory.rebind(node.p2p))
    handler.deliver = node.call
    await node.serve(handler, handler.gone)
    _say_ready(config, handler.info, node.addresses)
    if parent is not None:
        parent.tell(peer=node.peer_id, addresses=list(node.addresses))
    changing = config.nat_mapping or config.auto_relay
    tasks = [
        asyncio.create_task(
            announce_forever(node, directory, config.initial_peers, lambda: handler.info, addresses_change=changing, round_trips=handler.round_trips)
        ),
        asyncio.create_task(report.forever(config.log_every_s)),
        asyncio.create_task(expire_forever(handler.graphs, handler.sums)),
        asyncio.create_task(trim_when_idle(handler)),
        asyncio.create_task(node.daemon_ended.wait()),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for task in done:
        task.result()
    raise SwarmError("the p2p daemon of this server ended and could not be started again, so nobody can reach it: start the server again")


def _say_ready(config: ServeConfig, info: ServerInfo, addresses: Sequence[str]) -> None:
    """The one line on standard output: what is served, and the addresses to join with."""
    labels = "".join(f", {key} {label}" for key, label in (("name", info.name), ("family", info.family)) if label)
    sys.stdout.write(f"serving blocks {info.span} of 0:{info.num_blocks} of {config.model} in {info.mode}{labels} at {' '.join(addresses)}\n")
    sys.stdout.flush()


async def _until_told(stop: Stop, working: asyncio.Task[NoReturn], handler: CallHandler, node: HivemindNode, directory: DirectoryNode) -> None:
    """Wait for a signal, then say so, refuse new work and finish what is in flight; raises what ended the work before that."""
    from servers.announce import publish

    told = asyncio.create_task(stop.told.wait())
    await asyncio.wait([told, working], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not stop.told.is_set():
        working.result()
    handler.draining = True
    logger.info("stopping: finishing %d calls in flight, for at most %.0f s; a second signal ends at once", handler.in_flight, DRAIN_S)
    began = time.monotonic()
    announcing = asyncio.create_task(publish(node, directory, handler.info)) if directory.started and node.addresses else None
    while (handler.in_flight or node.answering) and not working.done() and time.monotonic() < began + DRAIN_S:
        await asyncio.sleep(0.05)
    if announcing is not None:
        await asyncio.wait([announcing], timeout=max(0.0, began + ANNOUNCE_S - time.monotonic()))
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)


def _load(config: ServeConfig) -> tuple[Span, ServerInfo]:
    """Everything heavy: the libraries, then the weights."""
    import torch

    import swarmtune
    from servers.compiled import cannot_compile
    from servers.graphs import Graphs
    from servers.memory import GIB, activation_budget, check_fits, estimate, keep_what_is_freed
    from servers.numeric import numeric_class, numeric_facts, pick_dtype, shortened_products
    from servers.span import Span
    from servers.weights import load_blocks
    from swarmtune.skeleton import check_identity, check_span, config_digest, load_config, stored_dtype
    from swarmtune.types import BlockSpan
    from swarmtune.wire.messages import ServerInfo

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    keep_what_is_freed()
    model_config = load_config(config.model)
    site = check_identity(model_config)
    blocks = check_span(BlockSpan.parse(config.blocks), site.num_blocks)
    stored = stored_dtype(model_config)
    dtype = pick_dtype(stored, device) if config.dtype is Dtype.AUTO else getattr(torch, config.dtype.value)
    if config.dtype is Dtype.AUTO and dtype is not stored:
        logger.info("the model is stored in %s, which this %s is slow in: computing in %s", stored, device.type, dtype)
    if said := shortened_products(dtype, device):
        raise UsageError(f"{said} has float32 multiplied in a shorter type, of which clients would not know: unset it, or serve dtype=bfloat16")
    quantise = config.quantize.value
    if dtype is torch.float16 and device.type == "cpu":
        logger.warning("float16 is many times slower than float32 on a CPU (docs/quantization.md): use dtype=bfloat16")
    need = estimate(model_config, site, blocks, dtype, quantise, device, max_tokens=config.max_tokens, max_sequence=config.max_sequence)
    check_fits(need, blocks, device, refuse=config.memory_check)
    with loading(f"blocks {blocks}") as progress:
        weights = load_blocks(config.model, model_config, site, blocks, dtype, device, progress, quantise)
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
        family=config.family,
    )
    room = activation_budget(device) // config.sharing if config.activation_gib is None else int(config.activation_gib * GIB)
    logger.info("at most %.2f GiB of activations are kept for backwards", room / GIB)
    span = Span(model_config, site, blocks, weights, dtype, device, Graphs(room, config.activation_ttl_s))
    if config.compile is Compile.AUTO:
        if why := cannot_compile(device, dtype, quantise):
            logger.info("nothing is compiled for clients that ask for it: %s", why)
        else:
            span.compile_in_background()
    return span, info


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


async def _start_node(config: ServeConfig, parent: Parent | None, node: HivemindNode) -> None:
    """Start the daemon; a fixed port may be held for a moment by the daemon of a server that has just died."""
    from swarmtune.transport.hivemind import Reach

    port = config.port if parent else check_port(config.listen, config.port, config.transport)  # again: loading may have taken long
    announce = announced_addresses(config.announce, port, config.transport, node.peer_id)
    reach = Reach(announce, config.relay, config.initial_peers if config.auto_relay else (), config.nat_mapping)
    ends_at = time.monotonic() + PORT_WAIT_S
    while True:
        try:
            await node.start(listen_addresses(config.listen, port, config.transport), reach)
            return
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


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of libraries may linger; everything of ours has been closed
