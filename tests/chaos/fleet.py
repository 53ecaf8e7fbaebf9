"""Servers that are killed, frozen, continued and restarted, never the last one of a span."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from swarmtune import LocalSwarm
from swarmtune.errors import SwarmtuneError
from swarmtune.local_swarm import ManagedServer
from tests.chaos.campaign import Campaign

RESTARTS_AT_ONCE = 2
UP, DOWN, FROZEN = "up", "down", "frozen"


class Fleet:
    """The servers of one swarm. Methods are safe from any thread.

    Attributes:
        patient: a server can be spared only when the client is connected to it and to another one of its blocks, not as soon as there is one.
        reachable: peers that the client is connected to.
    """

    def __init__(self, campaign: Campaign, swarm: LocalSwarm, *, patient: bool = True) -> None:
        self.patient, self.reachable = patient, {server.peer_id for server in swarm.servers}
        self._campaign, self._swarm = campaign, swarm
        self._lock = threading.RLock()
        self._states = dict.fromkeys(swarm.servers, UP)
        self._by_peer = {server.peer_id: server for server in swarm.servers}
        self._restarts = ThreadPoolExecutor(RESTARTS_AT_ONCE, "restart")
        self._pending: set[threading.Timer] = set()
        self.closed = False

    def of(self, peer: str) -> ManagedServer:
        """The server of a peer id."""
        return self._by_peer[peer]

    def number(self, server: ManagedServer) -> int:
        """Its place in the swarm."""
        return self._swarm.servers.index(server)

    def spare(self, *, whoever: bool = False) -> list[ManagedServer]:
        """Servers that run and whose span another one that runs holds too; ``whoever``: whether the client knows that one or not."""
        with self._lock:
            return [server for server in self._swarm.servers if self._is_spare(server, whoever)]

    def all_up(self) -> bool:
        """Whether every server runs."""
        with self._lock:
            return all(state == UP for state in self._states.values())

    def ended(self) -> list[ManagedServer]:
        """Servers that nobody killed here and that do not run any more."""
        with self._lock:
            return [server for server, state in self._states.items() if state == UP and not server.alive and not self.closed]

    def _is_spare(self, server: ManagedServer, whoever: bool = False) -> bool:
        others = [each for each, state in self._states.items() if each is not server and each.span == server.span and state == UP]
        if self.patient and not whoever:
            others = [each for each in others if {each.peer_id, server.peer_id} <= self.reachable]
        return self._states[server] == UP and bool(others) and not self.closed

    def kill(self, server: ManagedServer) -> bool:
        """SIGKILL, and a restart in the background; whether it has been done."""
        with self._lock:
            if not self._is_spare(server):
                return False
            os.kill(server.pid, signal.SIGKILL)
            self._gone(server)
        self._restarts.submit(self._restart, server)
        return True

    def restart_ended(self, server: ManagedServer) -> None:
        """A server has ended by itself, or is ending: start it again."""
        with self._lock:
            if self._states[server] == DOWN or self.closed:
                return
            self._gone(server)
        self._restarts.submit(self._restart, server)

    def freeze(self, server: ManagedServer, seconds: float, then_kill: bool, killed: Callable[[], None] = lambda: None) -> bool:
        """SIGSTOP; after ``seconds`` it goes on or is killed and restarted. Whether it has been done."""
        with self._lock:
            if not self._is_spare(server):
                return False
            os.kill(server.pid, signal.SIGSTOP)
            self._states[server] = FROZEN
            timer = threading.Timer(seconds, self._thaw, (server, then_kill, killed))
            self._pending.add(timer)
            timer.daemon = True
            timer.start()
        return True

    def _thaw(self, server: ManagedServer, then_kill: bool, killed: Callable[[], None]) -> None:
        with self._lock:
            if self._states[server] != FROZEN or self.closed:
                return
            if then_kill:
                os.kill(server.pid, signal.SIGKILL)
                self._gone(server)
                self._restarts.submit(self._restart, server)
                killed()
            else:
                os.kill(server.pid, signal.SIGCONT)
                self._states[server] = UP

    def _gone(self, server: ManagedServer) -> None:
        self._states[server] = DOWN
        self.reachable.discard(server.peer_id)

    def _restart(self, server: ManagedServer) -> None:
        for _ in range(3):
            if self.closed:
                return
            try:
                server.kill()  # reaps it
                server.restart()
            except SwarmtuneError as error:
                self._campaign.note("restart failed", server=self.number(server), detail=str(error))
                self._campaign.counts["restarts failed"] += 1
                continue
            except RuntimeError:
                return  # this process is ending
            with self._lock:
                self._states[server] = UP
            self._campaign.note("restarted", server=self.number(server))
            return
        self._campaign.error(f"server {self.number(server)} could not be restarted")

    def close(self) -> None:
        """No more faults: what is frozen goes on, restarts under way are waited for."""
        with self._lock:
            self.closed = True
            for timer in self._pending:
                timer.cancel()
            for server, state in self._states.items():
                if state == FROZEN and server.alive:
                    os.kill(server.pid, signal.SIGCONT)
        self._restarts.shutdown(wait=True, cancel_futures=True)
