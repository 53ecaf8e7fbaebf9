"""Compiled programs: made in the background for calls that come again and again, and never in the path of a call.

``torch.compile`` compiles at the first call with new shapes. So the first calls of a *shape class* run eagerly; a thread of its own rehearses one of
them, forward and backward, on a copy of the program; from then on calls of that class run the copy. Whatever would need another compilation there is
refused before it begins, and runs eagerly.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from servers.executor import Busy
from servers.program import Program
from swarmtune.wire.messages import SpanCall

logger = logging.getLogger(__name__)
SEEN_BEFORE = 2
"""Calls of a class before it is compiled: odd shapes come once."""
MAX_CLASSES, IDLE_S = 16, 60.0
"""Classes that are compiled at a time; a further one takes the place of one that has not been used for so long, or runs eagerly."""
MAX_REMEMBERED = 256
MAX_REHEARSALS = 4
"""Of one class, where what the library computes depends on values, such as a mask without padding; then it runs eagerly for ever."""
BUSY_S = 0.5
"""When to ask again for what cannot be done beside a compilation."""
GIVE_WAY_S = 5.0
"""How long the next compilation waits at most for who was refused because of the one before, and will ask again."""
MAX_UNLOADABLE = 8
"""Libraries of one class that are made again because they could not be loaded."""
CLOSE_S = 60.0
NICE = 10
"""Of the compiling thread: calls go first."""
RECOMPILE_LIMIT = 4 * MAX_REHEARSALS * MAX_CLASSES
"""Compilations of one function: first and other blocks, with and without a gradient, of each rehearsal; beyond its limit torch would run eagerly."""


class NotCompiled(BaseException):
    """A call would need a compilation here and now; not for handlers of errors, of which torch has some on the way."""


@dataclass(slots=True)
class _Class:
    seen: int = 0
    used_at: float = 0.0
    rehearsals: int = 0
    program: Program | None = None
    ready: bool = False
    unloadable: int = 0

    @property
    def dead(self) -> bool:
        """Whether it has been given up: it runs eagerly for ever."""
        return self.rehearsals > 0 and self.program is None


class Compiler:
    """Which classes of calls have a compiled program. The device worker asks; a thread of its own compiles.

    Args:
        copy: makes a program that nobody else uses; called by the device worker.
        rehearse: runs a call forward and backward on a program.
    """

    def __init__(self, copy: Callable[[SpanCall], Program], rehearse: Callable[[Program, SpanCall], None]) -> None:
        self._copy, self._rehearse = copy, rehearse
        self._classes: OrderedDict[Hashable, _Class] = OrderedDict()
        self._wanted: SimpleQueue[tuple[_Class, SpanCall] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._prepared = False
        self._refused_at = -math.inf
        self._rehearsals = 0
        self._backend = self._make_backend()

    @contextmanager
    def not_now(self) -> Iterator[None]:
        """Inside, nothing is compiled: that saves and restores torch's global random state.

        Raises:
            Busy: something is being compiled.
        """
        if not self._lock.acquire(blocking=False):
            self._refused_at = time.monotonic()
            raise Busy("something is being compiled", BUSY_S)
        try:
            yield
        finally:
            self._refused_at = -math.inf
            self._lock.release()

    def program(self, call: SpanCall) -> Program | None:
        """The compiled program for a call; ``None`` where there is none, or not yet: then run it eagerly."""
        key = shape_class(call)
        if key is None:
            return None
        known = self._classes.get(key)
        if known is None:
            known = self._classes[key] = _Class()
            while len(self._classes) > MAX_REMEMBERED:
                self._classes.pop(next((name for name, each in self._classes.items() if each.program is None), key))
        self._classes.move_to_end(key)
        if not self._prepared:
            prepare_torch()
            self._prepared = True
        known.seen += 1
        known.used_at = time.monotonic()
        if known.seen >= SEEN_BEFORE and not known.rehearsals and self._has_room():
            self._want(known, call)
        # What is compiled holds dynamo's lock, on which a call that does not fit would wait before it is refused.
        return known.program if known.ready and not self._lock.locked() else None

    def _has_room(self) -> bool:
        """Whether one more class may be compiled, in the place of one that nobody has used for a while where there are many."""
        compiled = [each for each in self._classes.values() if each.program is not None]
        if len(compiled) >= MAX_CLASSES:
            oldest = min(compiled, key=lambda each: each.used_at)
            if not oldest.ready or time.monotonic() - oldest.used_at < IDLE_S:
                return False
            # Used again, it begins anew; what torch has compiled for it is still there.
            oldest.program, oldest.ready, oldest.seen, oldest.rehearsals = None, False, 0, 0
        return self._rehearsals < MAX_REHEARSALS * MAX_CLASSES

    def refused(self, call: SpanCall) -> None:
        """A call did not fit what has been compiled for its class, so it is rehearsed, too; until then the class runs eagerly."""
        known = self._classes[shape_class(call)]
        known.ready = False
        if known.rehearsals < MAX_REHEARSALS and self._rehearsals < MAX_REHEARSALS * MAX_CLASSES:
            self._want(known, call)
        else:
            known.program = None

    def close(self) -> None:
        """End the thread, as soon as what it compiles is done; it dies with the process in any case."""
        if self._thread is not None:
            self._wanted.put(None)
            self._thread.join(CLOSE_S)

    def _want(self, known: _Class, call: SpanCall) -> None:
        if known.program is None:
            known.program = self._copy(call)
            for layer in known.program.layers:
                layer.forward = torch.compile(layer.forward, backend=self._backend, dynamic=False)  # type: ignore[method-assign]
        known.rehearsals += 1
        self._rehearsals += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="swarmtune-compiler", daemon=True)
            self._thread.start()
        self._wanted.put((known, call))

    def _work(self) -> None:
        prepare_torch()
        prepare_compiler()
        with suppress(OSError):  # not every system knows threads by number
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (wanted := self._wanted.get()) is not None:
            known, call = wanted
            rows, sequence = call.hidden_BTH.shape[:2]
            what, began = f"blocks {call.span} for {rows} x {sequence} tokens", time.monotonic()
            try:
                assert known.program is not None, "whoever wants it has made it"
                self._give_way()
                with self._lock:
                    self._rehearse(known.program, call)
            except Exception as error:  # whatever it is, these calls run eagerly as before
                why = " ".join((str(error) or type(error).__name__).split("\n", 2)[:2])[:300]  # the first line may only say that there are more
                library = unloadable(error)
                if library is not None and known.unloadable < MAX_UNLOADABLE:
                    known.unloadable += 1
                    library.unlink(missing_ok=True)
                    logger.info("%s are compiled again: %s", what, why)
                    self._wanted.put((known, call))
                    continue
                known.program = None
                logger.warning("%s could not be compiled, so they go on eagerly: %s", what, why)
            else:
                known.ready = True
                logger.info("compiled %s in %.0f s", what, time.monotonic() - began)
            del wanted, call

    def _give_way(self) -> None:
        """Leave what compiling excludes its turn between two compilations: it only asks now and then, and would never meet the gap."""
        ends_at = time.monotonic() + GIVE_WAY_S
        while time.monotonic() < min(ends_at, self._refused_at + 4 * BUSY_S):
            time.sleep(0.05)

    def _make_backend(self) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            if threading.current_thread() is not self._thread:
                raise NotCompiled
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs, config_patches=_patches())

        return backend


def unloadable(error: BaseException | None) -> Path | None:
    """The library among what torch has compiled that could not be loaded, where that is what is behind an error: its linker was ended while it wrote.

    ``None`` for any other library: what is returned is removed.
    """
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found = re.match(r"(/\S+\.so): ", str(error)) if isinstance(error, (ImportError, OSError)) else None
        if found is not None:
            return Path(found[1]) if compiled and Path(os.path.realpath(found[1])).is_relative_to(os.path.realpath(compiled)) else None
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None


def _patches() -> dict[str, Any] | None:
    """Settings of the compiler for this machine; none where this torch keeps elsewhere what they need."""
    try:
        from servers.products import Products, faster
    except ImportError as error:
        logger.info("matrix products stay as torch compiles them: %s", error)
        return None
    return {"post_grad_custom_post_pass": Products()} if faster() else None


def shape_class(call: SpanCall) -> Hashable | None:
    """What a compilation depends on; ``None`` for calls that are not compiled: dropout changes with each step, a cache is built by the library."""
    if call.dropout is not None or any(kwarg.name.startswith("prefix.") for kwarg in call.kwargs):
        return None
    kwargs = tuple(
        (kwarg.name, kwarg.tensor.dtype, tuple(kwarg.tensor.shape), kwarg.requires_grad, tuple(sorted(kwarg.axes.items())), kwarg.blocks)
        for kwarg in call.kwargs
    )
    learns = call.keep or call.grad_BTH is not None
    adapter = call.adapter.digest if call.adapter is not None else ""
    return call.span, adapter, tuple(call.hidden_BTH.shape), call.hidden_BTH.dtype, call.input_grad, learns, kwargs


def cannot_compile(device: torch.device, dtype: torch.dtype, quantisation: str) -> str:
    """Why nothing can be compiled here; empty where it can."""
    if quantisation != "none":
        return f"blocks held in {quantisation} are not compiled"
    if dtype is torch.float16:
        return "a backward through float16 is tried at several scales, which compiled code does not allow"
    if device.type == "cpu" and cpp_compiler() is None:
        return "there is no C++ compiler (g++ or clang++)"
    return ""


def cpp_compiler() -> str | None:
    """The C++ compiler of this machine: ``CXX``, or what is usual where that is not there, or is one of C, whose libraries lack that of C++.

    PEFT sets it to ``gcc`` for as long as it compiles BOFT's extension, and leaves it so where that fails.
    """
    wanted = os.environ.get("CXX", "")
    named = [] if re.fullmatch(r"(.*-)?(gcc|cc|clang)(-[\d.]+)?", os.path.basename(wanted)) else [wanted]
    usual = ("clang++", "g++") if sys.platform == "darwin" else ("g++", "clang++")
    return next((name for name in (*named, *usual) if shutil.which(name)), None)


def prepare_torch() -> None:
    """Settings of torch's compiler for the thread that calls this."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 4 * RECOMPILE_LIMIT
    torch._inductor.config.compile_threads = 1  # more would be processes of their own, that outlive a kill


def prepare_compiler() -> None:
    """Which C++ compiler the calling thread takes, and where precompiled headers lie: beside what else is compiled.

    Torch keeps these for everybody, and takes a half written one for a whole one.
    """
    import torch._inductor.config
    from torch._inductor import codecache

    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        torch._inductor.config.cpp.cxx = (None, cpp_compiler() or "g++")
        _ = codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR
    except (AttributeError, ImportError) as error:
        logger.info("compiled code is made as this torch does by itself: %s", error)
        return
    headers = os.path.join(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir(), "precompiled_headers")
    codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = headers, os.path.join(headers, "locks")
