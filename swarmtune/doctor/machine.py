"""Checks of this machine that need no network: versions, locale, clock, memory, device, disk, addresses, IPv6, ports."""

from __future__ import annotations

import ipaddress
import locale
import os
import platform
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path

import swarmtune
from swarmtune.doctor.check import Check, Status

PROBE_TIMEOUT_S = 2.0
SIZE_BUDGET_S = 2.0
LITTLE_DISK_BYTES, TOO_LITTLE_DISK_BYTES = 5 << 30, 200 << 20
LITTLE_MEMORY_BYTES = 2 << 30
WILDCARDS = ("0.0.0.0", "::")
DOCUMENTATION_V4, DOCUMENTATION_V6 = "192.0.2.1", "2001:db8::1"
"""Never dialled: connecting a UDP socket sends nothing, it only asks the kernel which of our addresses it would use."""


def check_machine(listen: str, port: int, runs: Path, caches: dict[str, Path]) -> list[Check]:
    """All checks of this file, in the order of the report."""
    return [
        check_python(),
        *check_libraries(),
        check_locale(),
        check_clock(),
        check_compute(),
        check_device(),
        check_disk(runs),
        *(check_cache(name, path) for name, path in caches.items()),
        check_addresses(),
        check_ipv6(),
        check_port(listen, port),
    ]


def check_python() -> Check:
    """Whether this Python is one that the installed swarmtune supports."""
    from packaging.specifiers import SpecifierSet

    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    try:
        wanted = metadata.metadata("swarmtune")["Requires-Python"]
    except (metadata.PackageNotFoundError, KeyError):
        wanted = ""
    if wanted and not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Check("Python", Status.FAILED, f"{found}; swarmtune supports {wanted}", "install a supported Python and swarmtune in it")
    return Check("Python", Status.OK, found)


def check_libraries() -> list[Check]:
    """The installed libraries against the ranges that swarmtune declares: one line, or one per library that does not fit."""
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires("swarmtune") or []
    except metadata.PackageNotFoundError:
        return [
            Check("libraries", Status.WARNING, "swarmtune runs from a directory and is not installed, so its ranges are not known", "pip install it")
        ]
    requirements = [item for item in map(Requirement, declared) if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong = [check for item in requirements if (check := _library(item.name, str(item.specifier))) is not None]
    if wrong:
        return wrong
    versions = ", ".join(f"{item.name} {metadata.version(item.name)}" for item in requirements)
    return [Check("libraries", Status.OK, f"swarmtune {swarmtune.__version__} with {versions}")]


def _library(name: str, wanted: str) -> Check | None:
    from packaging.specifiers import SpecifierSet

    advice = f"pip install '{name}{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check("libraries", Status.FAILED, f"{name} is not installed", advice)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("libraries", Status.FAILED, f"{name} {version} is installed, swarmtune needs {wanted}", advice)
    return None


def check_locale() -> Check:
    """Whether text files and the terminal are UTF-8."""
    files, terminal = locale.getpreferredencoding(False), sys.stdout.encoding or "unknown"
    found = f"text files {files}, output {terminal}"
    if not all(name.lower().replace("-", "") == "utf8" for name in (files, terminal)):
        return Check("locale", Status.WARNING, found, "set LANG=C.UTF-8, or PYTHONUTF8=1: names and texts outside ASCII can fail otherwise")
    return Check("locale", Status.OK, found)


def check_clock() -> Check:
    """Whether the clock can be right at all; ``--peer`` compares it with others."""
    now, installed = time.time(), Path(swarmtune.__file__).stat().st_mtime
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < installed - 1:
        return Check("clock", Status.FAILED, f"{found} is before swarmtune was installed here", "set the clock, for instance with NTP")
    return Check("clock", Status.OK, found)


def check_compute() -> Check:
    """Cores that this process may use, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, free = memory_bytes()
    found = f"{cores} cores" if total is None else f"{cores} cores, {size(total)} of memory"
    if free is None:
        return Check("cores and memory", Status.OK, found)
    found += f", {size(free)} available"
    if free < LITTLE_MEMORY_BYTES:
        return Check("cores and memory", Status.WARNING, found, "end other programs, or serve fewer blocks here")
    return Check("cores and memory", Status.OK, found)


def memory_bytes() -> tuple[int | None, int | None]:
    """Memory in all and available now, as far as the system says."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024  # what caches hold is available too
    except (OSError, ValueError, KeyError):
        pass
    return total, free


def check_device() -> Check:
    """What torch would compute on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("device", Status.FAILED, f"torch cannot be imported: {error}", "install torch again")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = f"cpu with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        if built and os.path.exists("/dev/nvidiactl"):
            return Check("device", Status.WARNING, f"{found}; there is an NVIDIA device that torch cannot use", "check the driver with nvidia-smi")
        return Check("device", Status.OK, found)
    parts = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
        parts.append(f"cuda:{number} {facts.name}, capability {facts.major}.{facts.minor}, {size(facts.total_memory)}{bf16}")
    return Check("device", Status.OK, "; ".join(parts))


def check_disk(runs: Path) -> Check:
    """Room for runs, where they would be written."""
    place = existing_parent(runs)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("disk for runs", Status.FAILED, f"{place}: {error.strerror}", "give a directory that can be read")
    found = f"{size(free)} free at {place}"
    if not os.access(place, os.W_OK):
        return Check("disk for runs", Status.FAILED, f"{place} cannot be written", "run elsewhere, or give another run_dir")
    if free < LITTLE_DISK_BYTES:
        status = Status.FAILED if free < TOO_LITTLE_DISK_BYTES else Status.WARNING
        return Check("disk for runs", status, found, "make room, or give a run_dir on another disk")
    return Check("disk for runs", Status.OK, found)


def check_cache(name: str, path: Path) -> Check:
    """How large a cache is, and how much room there is for it."""
    place = existing_parent(path)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check(name, Status.WARNING, f"{path}: {error.strerror}", "give a directory that can be read")
    if not path.is_dir():
        held = "not there yet"
    else:
        held_bytes, whole = directory_size(path)
        held = f"{'' if whole else 'more than '}{size(held_bytes)}"
    found = f"{held} at {path}, {size(free)} free"
    if not os.access(place, os.W_OK):
        return Check(name, Status.WARNING, f"{found}; {place} cannot be written", "give a directory that can be written")
    if free < LITTLE_DISK_BYTES:
        return Check(name, Status.WARNING, found, "make room before you load a model from the hub")
    return Check(name, Status.OK, found)


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest directory above it that exists."""
    path = path.absolute()
    return next((each for each in (path, *path.parents) if each.is_dir()), Path("/"))


def directory_size(path: Path) -> tuple[int, bool]:
    """Bytes of the files below ``path``, links not followed, and whether all could be counted in time."""
    total, ends_at = 0, time.monotonic() + SIZE_BUDGET_S
    for folder, _, names in os.walk(path):
        for name in names:
            if time.monotonic() > ends_at:
                return total, False
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue  # it has gone in the meantime
    return total, True


def check_addresses() -> Check:
    """The addresses by which this machine reaches others, and who can reach it there."""
    found = [
        address for family, target in ((socket.AF_INET, DOCUMENTATION_V4), (socket.AF_INET6, DOCUMENTATION_V6)) if (address := _own(family, target))
    ]
    if not found:
        return Check(
            "addresses", Status.WARNING, "no route to other machines; only loopback works", "connect to a network to join or serve a swarm elsewhere"
        )
    return Check("addresses", Status.OK, "; ".join(f"{address} ({reach(address)})" for address in found))


def _own(family: socket.AddressFamily, target: str) -> str | None:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def reach(address: str) -> str:
    """Who can dial an IP address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "a name"
    if parsed.is_loopback:
        return "loopback: this machine only"
    if parsed.is_global:
        return "public: anybody, unless a firewall stands before it"
    return "private: its own network only"


def check_ipv6() -> Check:
    """Whether IPv6 works on loopback, and whether there is a global address."""
    try:
        with socket.socket(socket.AF_INET6) as server, socket.socket(socket.AF_INET6) as client:
            server.bind(("::1", 0))
            server.listen(1)
            server.settimeout(PROBE_TIMEOUT_S)
            client.settimeout(PROBE_TIMEOUT_S)
            client.connect(server.getsockname()[:2])
            server.accept()[0].close()
    except OSError as error:
        return Check("IPv6", Status.WARNING, f"not available: {error.strerror or error}", "use IPv4 addresses (/ip4/...) here")
    address = _own(socket.AF_INET6, DOCUMENTATION_V6)
    if address is None or not ipaddress.ip_address(address.partition("%")[0]).is_global:
        return Check("IPv6", Status.OK, "works on loopback; no global address, so peers with only /ip6/ addresses cannot be reached")
    return Check("IPv6", Status.OK, f"works; global address {address}")


def check_port(listen: str, port: int) -> Check:
    """Whether a server could listen here, with TCP and with UDP."""
    name, family = "port", socket.AF_INET6 if ":" in listen else socket.AF_INET
    for kind, protocol in ((socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")):
        try:
            with socket.socket(family, kind) as probe:
                if kind is socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server that has just ended is free
                probe.bind((listen, port))
        except OSError as error:
            found = f"{listen} {protocol} port {port or 'any'} cannot be listened on: {error.strerror or error}"
            needed = "servers need TCP: " if protocol == "TCP" else "only QUIC needs UDP: "
            status = Status.FAILED if protocol == "TCP" else Status.WARNING
            return Check(name, status, found, f"{needed}stop what uses it (ss -ltnup shows it), or choose another --port or --listen")
    return Check(name, Status.OK, f"{listen} port {port} is free, TCP and UDP" if port else f"{listen} has free ports, TCP and UDP")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
