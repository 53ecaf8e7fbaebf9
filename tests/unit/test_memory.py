"""What is free, and what is refused before it is loaded."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from servers import memory
from servers.memory import MemoryNeed, _available, _free_in_group, check_fits, free_bytes, trim_when_idle, trimming
from swarmtune.errors import UsageError
from swarmtune.types import BlockSpan

CPU, SPAN, GIB = torch.device("cpu"), BlockSpan(0, 4), 1 << 30


def test_blocks_that_cannot_fit_are_refused_with_what_to_do_unless_one_insists(caplog: pytest.LogCaptureFixture) -> None:
    need = MemoryNeed(weights=1 << 55, loading=GIB, work=3 * GIB)
    with pytest.raises(
        UsageError, match=r"loading blocks 0:4 takes about 33554433.00 GiB and \d+\.\d\d GiB are free on cpu: serve fewer blocks="
    ) as caught:
        check_fits(need, SPAN, CPU)
    assert "memory_check=false" in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.INFO):
        check_fits(need, SPAN, CPU, refuse=False)
    assert "blocks 0:4 need about 33554435.00 GiB (weights 33554432.00, work 3.00 at most); " in caplog.text


def test_work_that_may_not_fit_is_a_warning_and_what_fits_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    check_fits(MemoryNeed(1, 1, 1 << 55), SPAN, CPU)
    assert "the largest call allowed may not fit into memory: lower max_tokens or max_sequence" in caplog.text
    caplog.clear()
    check_fits(MemoryNeed(1, 1, 1), SPAN, CPU)
    assert not caplog.records


def test_what_is_free_here_is_known_and_plausible() -> None:
    found = free_bytes(CPU)
    assert found is not None
    assert 1 << 20 < found < 1 << 50


def test_available_memory_is_read_from_the_kernel_and_is_unknown_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:   40 kB\n")
    assert _available(tmp_path / "meminfo") == 40 * 1024
    assert _available(tmp_path / "absent") is None


def group(path: Path, version: int, limit: str, usage: int, cache: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (path / names[0]).write_text(f"{limit}\n")
    (path / names[1]).write_text(f"{usage}\n")
    (path / "memory.stat").write_text(f"anon 1\n{'inactive_file' if version == 2 else 'total_inactive_file'} {cache}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts_and_its_file_cache_does_not(tmp_path: Path, version: int) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("4:cpu:/\n0::/a/b\n" if version == 2 else "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n")
    top = root if version == 2 else root / "memory"
    assert _free_in_group(membership, root) is None
    group(top / "a" / "b", version, "max" if version == 2 else str(1 << 62), 5, 0)
    assert _free_in_group(membership, root) is None
    group(top / "a", version, "1000", 700, 200)
    assert _free_in_group(membership, root) == 500
    group(top, version, "400", 300, 0)
    assert _free_in_group(membership, root) == 100
    assert _free_in_group(tmp_path / "absent", root) is None


KEEPS = """
import threading
from pathlib import Path
import torch
from servers.memory import keep_what_is_freed, trimming

def heap():
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]")]
    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
    return range(begin, end)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def work():
    tensor = torch.ones(10 << 20)
    print(tensor.data_ptr() in heap())

keep_what_is_freed()
before = resident()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resident() - before > 30e6)
trimming()()
print(resident() - before < 10e6)
"""


@dataclass
class Work:
    """As much of a server as is looked at."""

    calls: int = 0
    in_flight: int = 0
    held_bytes: int = 0


def resident() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


async def some_time(work: Work) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(trim_when_idle(work, 0.05), 0.6)


@pytest.mark.skipif(trimming() is None, reason="neither glibc nor tcmalloc")
def test_an_idle_server_gives_back_what_malloc_keeps() -> None:
    """Tensors small enough for the heap, of which the last one, at its top, stays."""
    tensors = [torch.ones(25_000) for _ in range(2000)]
    full = resident()
    del tensors[:-1]
    asyncio.run(some_time(Work()))
    assert full - resident() > 100e6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator than glibc's")
def test_large_tensors_lie_in_the_heap_and_stay_there_when_freed() -> None:
    """In a process of its own: it is for ever."""
    done = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True", "True", "True"], done.stderr


def test_it_is_done_once_after_the_last_call_and_never_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(memory, "trimming", lambda: lambda: trims.append(1))

    async def calls_come(work: Work) -> None:
        for _ in range(30):
            work.calls += 1
            await asyncio.sleep(0.02)

    async def both(work: Work) -> None:
        await asyncio.gather(some_time(work), calls_come(work))

    asyncio.run(some_time(Work()))
    assert len(trims) == 1
    asyncio.run(some_time(Work(in_flight=1)))
    assert len(trims) == 1
    asyncio.run(both(Work()))
    assert len(trims) == 1

    async def a_client_goes(work: Work) -> None:
        await asyncio.sleep(0.3)
        work.held_bytes = 0

    async def with_graphs(work: Work) -> None:
        await asyncio.gather(some_time(work), a_client_goes(work))

    asyncio.run(with_graphs(Work(held_bytes=100)))
    assert len(trims) == 3
