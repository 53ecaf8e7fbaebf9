"""The command line of ``scripts/bench``: options, signals, and what is printed and kept of each measurement."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from swarmtune.errors import SwarmtuneError, UsageError
from tests.netlab import NetLabError

if TYPE_CHECKING:
    from bench_report import Report

BENCHES = {
    "train": "training tokens per second, and what a step costs in block forwards, bytes, hand-offs and server time; local PEFT and swarm take turns",
    "call": "the overhead of one call with tiny tensors",
    "wire": "messages without a model: encoding, frames in this process, one call of a big tensor through the p2p daemons",
    "memory": "peak memory of server and client beyond the weights, while loading and while training",
    "profile": "what a server's device does in a training step, by torch operation, eager and compiled",
    "adapters": "what a new adapter configuration costs a server, and switching between known ones, for every group of conf/adapter",
    "quantize": "memory, time and accuracy of each way of holding the blocks (with --keep in docs/quantization.md)",
    "against": "this code and that of another commit (--commit), taking turns",
    "overload": "1 to 16 clients at once over two servers",
}
NETWORKS = """of train and call: loopback: 2 servers on this host; wan: 2 servers and the client on hosts of their own, 50 ms round trip, 100 Mbit/s
per host; wan4: 4 servers, 100 ms, 100 Mbit/s (wan and wan4 need root)"""
BUSY = 0.5
"""A load above this is said: local PEFT and servers do not lose the same to other programs."""
DIRECTORY = "swarmtune-bench-"
"""The beginning of a measurement's own directory; its process id follows."""
ENDED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep; 2 with one sentence where that cannot be done here."""
    options = parser().parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for GPU kernels that this machine need not have
    try:
        with signals_unwind():
            return bench(options)
    except (UsageError, NetLabError) as error:
        sys.stderr.write(f"scripts/bench: {error}\n")
        return 2
    except SwarmtuneError as error:
        sys.stderr.write(f"scripts/bench: {error}\n")
        return 1
    except Ended as ended:
        return ENDED_BY[ended.number]


def parser() -> argparse.ArgumentParser:
    """All options; each measurement reads those that mean something to it."""
    made = argparse.ArgumentParser(prog="scripts/bench", description="The reference model is a BLOOM of random weights, the batch 8 x 128 tokens.")
    made.add_argument("what", choices=BENCHES, help="; ".join(": ".join(each) for each in BENCHES.items()))
    made.add_argument("--preset", choices=("loopback", "wan", "wan4"), default="loopback", help=NETWORKS)
    made.add_argument("--curves", action="store_true", help="of train: seconds per step over tokens per step, with 1, 2, 4 and 8 servers")
    made.add_argument("--budget-s", type=_positive, default=600, help="of --curves: points that would take longer together are left out")
    made.add_argument("--rounds", type=_positive, default=5, help="how often all sides take turns")
    made.add_argument("--steps", type=_positive, default=2, help="training steps per turn")
    made.add_argument("--rows", type=_positive, default=8, help="rows of the batch")
    made.add_argument("--sequence", type=_positive, default=128, help="tokens of a row")
    made.add_argument("--codec", default="none", choices=("none", "bf16", "fp16", "int8"), help="how hidden states and gradients travel")
    made.add_argument("--pipeline", default="1f1b", choices=("1f1b", "gpipe"), help="how the micro-batches of a step overlap")
    made.add_argument("--compile", default="none", choices=("none", "auto"), help="let the servers run compiled blocks, and wait until they do")
    made.add_argument("--in-flight", type=_positive, default=None, help="micro-batches under way at once (default: servers + 2, at least 4)")
    made.add_argument("--micro-batch-tokens", type=_positive, default=None, help="most tokens of a micro-batch (default: of the preset)")
    made.add_argument("--hidden", type=_positive, default=1024, help="hidden size of the model, a multiple of 16")
    made.add_argument("--layers", type=_positive, default=8, help="blocks of the model")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"), help="of train: where local PEFT, client and servers compute")
    made.add_argument("--servers", type=_positive, default=None, help="servers, each with an equal share of the blocks (default: of the preset)")
    made.add_argument("--threads", type=_positive, default=os.cpu_count() or 1, help="of this process and of each server (default: all cores)")
    made.add_argument("--commit", default="HEAD~1", help="what against compares this code with")
    made.add_argument("--keep", action="store_true", help="append table and picture to docs/benchmarks.md")
    return made


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def bench(options: argparse.Namespace) -> int:
    """One measurement."""
    if options.hidden % 16:
        raise UsageError(f"--hidden must be a multiple of 16, the heads of the model, got {options.hidden}")
    if options.device != "cpu":
        if options.what != "train" or options.curves or options.preset != "loopback":
            raise UsageError(f"--device {options.device} is for train on loopback, everything else is measured on the CPU")
        from servers.__main__ import pick_device

        options.device = pick_device(options.device).type
    if options.preset != "loopback" and options.what not in ("train", "call"):
        raise UsageError(f"--preset {options.preset} is for train and call, {options.what} runs on loopback")
    if options.preset != "loopback":
        from tests.netlab import mechanism

        mechanism()
    remove_left_over()
    if (load := os.getloadavg()[0]) > BUSY:
        warning = f"other programs use this machine (load {load:.1f}): counts hold, speeds and ratios may not"
        sys.stderr.write(f"scripts/bench: {warning} (docs/benchmarks.md, busy machines)\n")
    with tempfile.TemporaryDirectory(prefix=f"{DIRECTORY}{os.getpid()}-", ignore_cleanup_errors=True) as directory:
        if options.what == "quantize":
            return _quantize(options, Path(directory))
        report: Report = importlib.import_module(f"bench_{options.what}").measure(options, Path(directory))
    report.print()
    if options.keep:
        report.keep()
    return 0


def remove_left_over() -> None:
    """Directories of measurements that were ended by SIGKILL; their servers and networks have ended by themselves."""
    for left in Path(tempfile.gettempdir()).glob(f"{DIRECTORY}*-*"):
        pid = left.name.removeprefix(DIRECTORY).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _quantize(options: argparse.Namespace, directory: Path) -> int:
    """It has a page of its own."""
    import bench_quantize

    tables = bench_quantize.measure(directory, options.rounds)
    print(tables)
    if options.keep:
        bench_quantize.keep(tables)
    return 0


class Ended(BaseException):
    """A signal: everything that is open is closed on the way up."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)


@contextlib.contextmanager
def signals_unwind() -> Iterator[None]:
    """The first signal ends the measurement; those that follow do not break off the cleaning up."""
    ended = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:
            ended = True
            sys.stderr.write("scripts/bench: ending servers and networks\n")
            raise Ended(number)

    before = {number: signal.signal(number, end) for number in ENDED_BY}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
