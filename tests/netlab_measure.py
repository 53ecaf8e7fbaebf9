"""What a lab really gives: round trips, throughput, which packets arrive."""

from __future__ import annotations

import secrets
import socket
import statistics
import threading
import time
from contextlib import ExitStack, suppress

from tests.netlab import NetLab

WAIT_S = 2.0


def udp_pair(lab: NetLab, sender: str, receiver: str, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """A socket on each of two hosts, connected to each other."""
    sockets = []
    for host in (sender, receiver):
        with lab.inside(host):
            sockets.append(stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
        sockets[-1].bind((lab.address(host), 0))
        sockets[-1].settimeout(WAIT_S)
    sockets[0].connect(sockets[1].getsockname())
    sockets[1].connect(sockets[0].getsockname())
    return sockets[0], sockets[1]


def tcp_pair(lab: NetLab, sender: str, receiver: str, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection between two hosts."""
    with lab.inside(receiver):
        listener = stack.enter_context(socket.create_server((lab.address(receiver), 0)))
    with lab.inside(sender):
        near = stack.enter_context(socket.create_connection(listener.getsockname(), 10))
    far = stack.enter_context(listener.accept()[0])
    far.settimeout(WAIT_S)
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def round_trips_ms(lab: NetLab, a: str, b: str, count: int = 20) -> list[float]:
    """Of single small datagrams, answered at once."""
    found = []
    with ExitStack() as stack:
        near, far = udp_pair(lab, a, b, stack)
        for _ in range(count):
            began = time.perf_counter()
            near.send(b"ping")
            far.send(far.recv(16))
            near.recv(16)
            found.append((time.perf_counter() - began) * 1000)
    return found


def tcp_mbit(lab: NetLab, sender: str, receiver: str, seconds: float) -> float:
    """What one connection carries once it has found its pace: the median over windows of 100 ms in the second half of ``seconds``."""
    windows: list[float] = []
    with ExitStack() as stack:
        near, far = tcp_pair(lab, sender, receiver, stack)

        def receive() -> None:
            began, size = time.perf_counter(), 0
            while data := far.recv(1 << 18):
                size += len(data)
                if (passed := time.perf_counter() - began) >= 0.1:
                    windows.append(size * 8 / passed / 1e6)
                    began, size = time.perf_counter(), 0

        reader = threading.Thread(target=receive)
        reader.start()
        ends_at, data = time.monotonic() + seconds, bytes(1 << 16)
        while time.monotonic() < ends_at:
            near.sendall(data)
        near.shutdown(socket.SHUT_WR)
        reader.join()
    return statistics.median(windows[len(windows) // 2 :])


def udp_arrivals(lab: NetLab, sender: str, receiver: str, count: int = 2000) -> list[int]:
    """The numbers of those that arrive of ``count`` small datagrams, in the order of arrival."""
    found = []
    with ExitStack() as stack:
        near, far = udp_pair(lab, sender, receiver, stack)
        for number in range(count):
            near.send(number.to_bytes(4, "big"))
            if number % 50 == 49:  # no more at once than the buffers of the sockets hold
                far.settimeout(0.005)
                found += _drain(far)
        far.settimeout(0.5)
        found += _drain(far)
    return found


def _drain(far: socket.socket) -> list[int]:
    """All that comes until nothing does."""
    found = []
    try:
        while True:
            found.append(int.from_bytes(far.recv(16), "big"))
    except TimeoutError:
        return found


def passes(pair: tuple[socket.socket, socket.socket], limit_s: float) -> bool:
    """Whether what is sent into a pair now comes out within ``limit_s``; what was sent before may come with it."""
    near, far = pair
    token, seen, ends_at = secrets.token_bytes(8), b"", time.monotonic() + limit_s
    near.send(token)
    while token not in seen and (left_s := ends_at - time.monotonic()) > 0:
        far.settimeout(left_s)
        with suppress(TimeoutError):
            seen += far.recv(1 << 16)
    return token in seen
