"""A server's key on disk: made once, readable by its owner only, and held by one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swarmtune.discovery.identity import Identity
from swarmtune.errors import UsageError

logger = logging.getLogger(__name__)

KEY_BYTES = 68


def ensure_identity(path: str | os.PathLike[str]) -> Identity:
    """The identity in a file; a new one where there is no file yet. Whoever makes it first wins, and a half-written file is never seen.

    Raises:
        UsageError: the file cannot be read or made, or holds something else.
    """
    file = Path(path).expanduser()
    try:
        if not file.exists():
            _make(file)
        elif not file.is_file():  # reading a pipe would wait for its writer
            raise UsageError(f"the identity file {file} is no regular file: name another one, or one that does not exist yet")
        with file.open("rb") as source:
            data = source.read(KEY_BYTES + 1)
        if file.stat().st_mode & 0o077:
            logger.warning("others can read the identity file %s, and so can pose as this server: chmod 600 it", file)
    except OSError as error:
        raise UsageError(f"the identity file {file} cannot be read or made: {error.strerror}") from error
    try:
        identity = Identity.from_bytes(data)
    except ValueError:
        identity = None
    if identity is None or identity.to_bytes() != data:
        raise UsageError(f"{file} is no identity file (an Ed25519 key of {KEY_BYTES} bytes): name another file, or one that does not exist yet")
    return identity


def _make(file: Path) -> None:
    """Write a new key beside ``file``, then link it there unless somebody else has been faster."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as target:
            target.write(Identity.generate().to_bytes())
            target.flush()
            os.fsync(target.fileno())
        try:
            os.link(partial, file)
        except FileExistsError:
            pass
    finally:
        partial.unlink()


@contextmanager
def hold_identity(path: str | os.PathLike[str]) -> Iterator[Identity]:
    """``ensure_identity``, while no other process can hold the same file. The lock ends with this process, however it ends.

    Raises:
        UsageError: another process holds it.
    """
    file = Path(path).expanduser()
    identity = ensure_identity(file)
    with file.open("rb") as locked:
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(os.fstat(locked.fileno()))
            raise UsageError(f"the identity file {file} is in use by {holder}: stop that server, or give this one another file") from error
        yield identity


def _holder(status: os.stat_result) -> str:
    """Who has locked a file, where the system tells."""
    try:
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        rows = []
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    pids = [row[4] for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == inode and int(row[4]) > 0]
    return f"process {pids[0]}" if pids else "another process"
