"""Door 8: one worker thread that owns the device, behind a bounded priority queue. The only place that runs torch on a server."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from swarmtune.errors import SwarmError

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_QUEUED = 64


class Busy(SwarmError):
    """The queue is full."""


class Expired(SwarmError):
    """The caller stopped waiting before the job began."""


@dataclass(order=True, slots=True)
class _Job:
    priority: int
    number: int
    run: Callable[[], Any] | None = field(compare=False)
    future: Future[Any] = field(compare=False)
    deadline: float = field(compare=False)


class Executor:
    """Runs jobs one at a time, lowest priority number first, in order of arrival within one priority."""

    def __init__(self) -> None:
        self._queue: queue.PriorityQueue[_Job] = queue.PriorityQueue(MAX_QUEUED)
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._work, name="swarmtune-device", daemon=True)

    def start(self) -> Executor:
        """Start the worker."""
        self._thread.start()
        return self

    async def submit(self, run: Callable[[], T], *, priority: int, timeout_s: float) -> T:
        """Run ``run`` on the device worker and await its result. A cancelled caller's job is dropped unless it has begun.

        Raises:
            Busy: too many jobs wait.
            Expired: ``timeout_s`` passed before the job began.
        """
        future: Future[T] = Future()
        job = _Job(priority, next(self._numbers), run, future, time.monotonic() + timeout_s)
        try:
            self._queue.put_nowait(job)
        except queue.Full as error:
            raise Busy(f"{MAX_QUEUED} jobs are waiting already") from error
        return await asyncio.wrap_future(future)

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish the job that runs, drop the others, end the worker."""
        while True:
            try:
                self._queue.get_nowait().future.cancel()
            except queue.Empty:
                break
        self._queue.put(_Job(-(1 << 30), next(self._numbers), None, Future(), 0.0))
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if job.run is None:
                return
            if not job.future.set_running_or_notify_cancel():
                continue
            if time.monotonic() > job.deadline:
                job.future.set_exception(Expired("the caller's deadline passed before the work began"))
                continue
            try:
                job.future.set_result(job.run())
            except Exception as error:  # whatever it is, it fails this job only
                job.future.set_exception(error)
