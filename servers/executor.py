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
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="swarmtune-device", daemon=True)

    def start(self) -> Executor:
        """Start the worker."""
        self._thread.start()
        return self

    @property
    def queued(self) -> int:
        """Jobs that wait for the worker."""
        return self._queue.qsize()

    async def submit(self, run: Callable[[], T], *, priority: int, timeout_s: float) -> T:
        """Run ``run`` on the device worker and await its result. A cancelled caller's job is dropped unless it has begun.

        Raises:
            Busy: too many jobs wait, or the worker has been closed.
            Expired: ``timeout_s`` passed before the job began.
        """
        if self._closed:
            raise Busy("this worker takes no more jobs")
        future: Future[T] = Future()
        job = _Job(priority, next(self._numbers), run, future, time.monotonic() + timeout_s)
        try:
            self._queue.put_nowait(job)
        except queue.Full as error:
            raise Busy(f"{MAX_QUEUED} jobs are waiting already") from error
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            job.run = _nothing  # the tensors of a dropped job must not stay until the worker comes to it
            raise

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish the job that runs, drop the others, end the worker."""
        self._closed = True
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
            self._do(job, job.run)
            del job  # an idle worker must not hold the last job's tensors

    def _do(self, job: _Job, run: Callable[[], Any]) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        if time.monotonic() > job.deadline:
            job.future.set_exception(Expired("the caller's deadline passed before the work began"))
            return
        try:
            job.future.set_result(run())
        except Exception as error:  # whatever it is, it fails this job only
            job.future.set_exception(error)


def _nothing() -> None:
    """What a dropped job does."""
