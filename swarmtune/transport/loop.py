"""The one asyncio thread of a process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, InvalidStateError, wait
from typing import Any, TypeVar

from swarmtune.errors import SwarmError

T = TypeVar("T")
CLOSE_TIMEOUT_S = 10.0


class LoopThread:
    """An event loop on its own thread: ``start``, ``run`` coroutines from other threads, ``close``."""

    def __init__(self, name: str = "swarmtune-loop") -> None:
        self._loop = asyncio.new_event_loop()
        self._lock, self._closing = threading.Lock(), False
        self._begun: set[Future[Any]] = set()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> LoopThread:
        """Start the thread."""
        self._thread.start()
        return self

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` on the loop and wait for it. An interrupt of the waiting thread cancels it.

        The coroutine brings its own deadline.

        Raises:
            SwarmError: the loop has been closed.
        """
        future = self.begin(coroutine)
        try:
            return future.result()
        except CancelledError as error:
            raise SwarmError("this swarm connection was closed during a call") from error
        except BaseException:
            future.cancel()
            raise

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine`` on the loop.

        Raises:
            SwarmError: the loop has been closed.
        """
        with self._lock:
            if self._closing or not self._thread.is_alive():
                coroutine.close()
                raise SwarmError("this swarm connection is closed: connect again")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._begun.add(future)
        future.add_done_callback(self._begun.discard)
        return future

    def wait(self, *futures: Future[Any]) -> None:
        """Wait until one of these, of coroutines that were begun or fed by them, is done."""
        wait(futures, return_when=FIRST_COMPLETED)

    def post(self, callback: Callable[[], object]) -> None:
        """Have the loop call ``callback`` some time, from any thread; a loop that has been closed does not."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """Cancel what still runs, stop the loop, join the thread. Safe to repeat."""
        with self._lock:
            if self._closing or not self._thread.is_alive():
                return
            self._closing = True
            asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop)
        self._thread.join(CLOSE_TIMEOUT_S)

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S / 2)
        await asyncio.sleep(0.01)  # sockets that have just been closed leave the loop
        self._loop.stop()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            for future in list(self._begun):  # nobody else would ever end these
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(SwarmError("this swarm connection was closed during a call"))
