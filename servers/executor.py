"""Door 8: one worker thread that owns the device, behind bounded queues that take turns. The only place that runs torch on a server."""

from __future__ import annotations

import asyncio
import itertools
import logging
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
MAX_QUEUED_PER_CLIENT = 32
MIN_RETRY_S, MAX_RETRY_S = 0.05, 10.0
HALF_LIFE_S = 5.0
"""After so long, half of what a client was served is forgotten."""
CREDIT_S = 1.0
"""Who comes back after a pause is so far ahead of the others at most: else a newcomer would have the device for itself for seconds."""
NEWEST_WEIGHT = 0.5
"""Of the latest job in the running mean of the time per job."""
MAX_REMEMBERED = 1024


class Busy(SwarmError):
    """There is no room for this job now, or it would begin too late.

    Attributes:
        retry_s: when to ask again, as far as one can tell.
    """

    def __init__(self, detail: str, retry_s: float = 1.0) -> None:
        super().__init__(detail)
        self.detail, self.retry_s = detail, min(MAX_RETRY_S, max(MIN_RETRY_S, retry_s))

    def __reduce__(self) -> tuple[type[Busy], tuple[str, float]]:
        return type(self), (self.detail, self.retry_s)


class Expired(SwarmError):
    """The caller stopped waiting before the job began."""


@dataclass(order=True, slots=True)
class _Job:
    priority: int
    number: int
    run: Callable[[], Any] | None = field(compare=False)
    future: Future[Any] = field(compare=False)
    deadline: float = field(compare=False)


@dataclass(slots=True)
class _Client:
    """Whose turn it is follows from this: the jobs that wait, and the seconds of the device that were had lately."""

    at: float
    jobs: list[_Job] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    served_s: float = 0.0

    def served(self, now: float) -> float:
        """Seconds served lately, of which half is forgotten every ``HALF_LIFE_S``."""
        self.served_s *= 0.5 ** ((now - self.at) / HALF_LIFE_S)
        self.at = now
        return self.served_s


class Executor:
    """Runs jobs one at a time. The client that was served least lately goes first; within a client, the lowest priority number, then who came first.

    What waits is bounded, in all and for each client. Where all is full, the client with the most jobs loses its last one to one that has fewer.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._clients: dict[str, _Client] = {}
        self._seconds: dict[int, float] = {}
        self._numbers = itertools.count()
        self._running: tuple[float, float] | None = None  # when it began, and how long it should take
        self._afterwards: list[Callable[[], None]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="swarmtune-device", daemon=True)

    def start(self) -> Executor:
        """Start the worker."""
        self._thread.start()
        return self

    @property
    def queued(self) -> int:
        """Jobs that wait for the worker."""
        with self._changed:
            return self._count()

    async def submit(self, run: Callable[[], T], *, priority: int, timeout_s: float, client: str = "") -> T:
        """Run ``run`` on the device worker and await its result. A cancelled caller's job is dropped unless it has begun.

        Raises:
            Busy: too many jobs wait, it would not begin within ``timeout_s``, or the worker has been closed.
            Expired: ``timeout_s`` passed before the job began.
        """
        future: Future[T] = Future()
        now = time.monotonic()
        job = _Job(priority, next(self._numbers), run, future, now + timeout_s)
        with self._changed:
            if self._closed:
                raise Busy("this worker takes no more jobs")
            self._expire(now)
            known = self._clients.get(client) or _Client(now)
            self._admit(known, job, client, timeout_s, now)
            if not known.jobs:
                waiting = [each.served(now) for each in self._clients.values() if each.jobs]
                known.served_s = max(known.served(now), min(waiting, default=0.0) - CREDIT_S)
            self._clients[client] = known
            known.jobs.append(job)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with self._changed:
                if job in known.jobs:
                    known.jobs.remove(job)
            job.run = None  # the tensors of a dropped job must not stay as long as whoever still holds it
            raise

    def after_this(self, run: Callable[[], None]) -> None:
        """Have the worker call ``run`` after the job that runs now; nothing where none does."""
        with self._changed:
            if self._running is not None:
                self._afterwards.append(run)

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish the job that runs, drop the others, end the worker."""
        with self._changed:
            self._closed = True
            dropped = [job for client in self._clients.values() for job in client.jobs]
            self._clients.clear()
            self._changed.notify()
        for job in dropped:
            job.future.cancel()
        self._thread.join(timeout_s)

    def _count(self) -> int:
        return sum(len(client.jobs) for client in self._clients.values())

    def _expire(self, now: float) -> None:
        """Take out what nobody waits for any more, so that it fills no queue."""
        for client in self._clients.values():
            for job in [job for job in client.jobs if now > job.deadline]:
                client.jobs.remove(job)
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(Expired("the caller's deadline passed before the work began"))

    def _admit(self, known: _Client, job: _Job, name: str, timeout_s: float, now: float) -> None:
        """Make room for ``job``, or raise ``Busy``."""
        if len(known.jobs) >= MAX_QUEUED_PER_CLIENT:
            raise Busy(f"{len(known.jobs)} jobs of this client are waiting already", self._wait_s(known, job.priority, now) / 2)
        wait_s = self._wait_s(known, job.priority, now)
        if wait_s > timeout_s:
            raise Busy(f"the work ahead takes about {wait_s:.1f} s, and the caller waits {timeout_s:.1f} s", wait_s - timeout_s)
        if self._count() < MAX_QUEUED:
            return
        most = max(self._clients.values(), key=lambda client: len(client.jobs))
        full = f"{self._count()} jobs are waiting already"
        retry_s = sum(self._work_s(client) for client in self._clients.values()) / 2
        if len(most.jobs) <= len(known.jobs) + 1:
            raise Busy(full, retry_s)
        last = max(most.jobs)
        most.jobs.remove(last)
        if last.future.set_running_or_notify_cancel():
            last.future.set_exception(Busy(f"{full}, and most of them are of this client", retry_s))

    def _job_s(self, client: _Client, priority: int) -> float:
        """How long a job should take: as this client's last ones of its kind, or as anyone's; 0 where nothing has been measured."""
        return client.seconds.get(priority, self._seconds.get(priority, 0.0))

    def _work_s(self, client: _Client) -> float:
        return sum(self._job_s(client, job.priority) for job in client.jobs)

    def _wait_s(self, client: _Client, priority: int, now: float) -> float:
        """About how long a new job of ``client`` would wait: for what runs, for its own jobs ahead, and for the others' turns meanwhile."""
        own = sum(self._job_s(client, job.priority) for job in client.jobs if job.priority <= priority)
        wait_s = own
        if self._running is not None:
            began, takes = self._running
            wait_s += max(0.0, began + takes - now)
        reached = client.served(now) + own
        for other in self._clients.values():
            if other is not client and other.jobs and (behind := reached - other.served(now)) >= 0:
                work = self._work_s(other)
                wait_s += min(work, behind + work / len(other.jobs))
        return wait_s

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            self._do(*taken)
            with self._changed:
                afterwards, self._afterwards = self._afterwards, []
            for run in afterwards:
                run()
            del taken  # an idle worker must not hold the last job's tensors

    def _take(self) -> tuple[_Client, _Job, Callable[[], Any]] | None:
        """Wait for the next job; ``None`` once the worker has been closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                self._expire(now)
                waiting = [client for client in self._clients.values() if client.jobs]
                if waiting:
                    client = min(waiting, key=lambda each: (each.served(now), min(job.number for job in each.jobs)))
                    job = min(client.jobs)
                    client.jobs.remove(job)
                    if job.run is not None and job.future.set_running_or_notify_cancel():
                        self._running = (now, self._job_s(client, job.priority))
                        return client, job, job.run
                    continue
                self._changed.wait()
        return None

    def _do(self, client: _Client, job: _Job, run: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            result = run()
        except BaseException as error:  # whatever it is, it fails this job only: nobody else is on this thread
            self._account(client, job.priority, began)
            job.future.set_exception(error)
        else:
            self._account(client, job.priority, began)
            job.future.set_result(result)

    def _account(self, client: _Client, priority: int, began: float) -> None:
        """Charge the client, and learn how long such a job takes; before the answer, so that its next job finds the books in order."""
        with self._changed:
            now = time.monotonic()
            seconds = now - began
            client.served_s = client.served(now) + seconds
            for means in (client.seconds, self._seconds):
                means[priority] = (1 - NEWEST_WEIGHT) * means[priority] + NEWEST_WEIGHT * seconds if priority in means else seconds
            self._running = None
            if len(self._clients) > MAX_REMEMBERED:
                idle = sorted((each.served(now), name) for name, each in self._clients.items() if not each.jobs)
                for _, name in idle[: len(self._clients) - MAX_REMEMBERED]:
                    del self._clients[name]
