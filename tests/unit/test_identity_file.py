"""Identity files: made once, owner-only, never half-written, held by one process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swarmtune.discovery.identity import Identity
from swarmtune.discovery.identity_file import ensure_identity, hold_identity
from swarmtune.errors import UsageError

HOLDER = """
import sys, time
from swarmtune.discovery.identity_file import hold_identity
with hold_identity(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_made_for_its_owner_only_and_keeps_the_peer_id(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        first = ensure_identity(tmp_path / "key")
    finally:
        os.umask(previous)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert ensure_identity(tmp_path / "key").peer_id == first.peer_id
    assert (tmp_path / "key").read_bytes() == first.to_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_many_that_make_one_file_at_once_get_one_identity(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_identity(tmp_path / "key").peer_id)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


GOOD = Identity.generate().to_bytes()


@pytest.mark.parametrize("data", [b"", b"x", GOOD[:-1], GOOD + b"\n", b"-----BEGIN PRIVATE KEY-----\n", GOOD[:40] + bytes(28), b"\0" * (1 << 20)])
def test_a_file_with_something_else_is_one_sentence_and_stays_as_it_is(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(data)
    with pytest.raises(UsageError, match="is no identity file"):
        ensure_identity(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == data


@pytest.mark.parametrize("name", ["missing/key", "."])
def test_a_file_that_cannot_be_made_or_read_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read or made|is no regular file"), hold_identity(tmp_path / name):
        pass


def test_a_file_that_others_can_read_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ensure_identity(tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        ensure_identity(tmp_path / "key")
    assert "chmod 600" in caplog.text


def test_a_held_file_names_its_holder_and_is_free_again_after_sigkill(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("key")
    ensure_identity(tmp_path / "key")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "key")], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            for name in ("key", "link"):
                with pytest.raises(UsageError, match=rf"is in use by process {process.pid}: stop that server"), hold_identity(tmp_path / name):
                    pass
        finally:
            process.kill()
    with hold_identity(tmp_path / "key") as identity:
        assert identity.peer_id == ensure_identity(tmp_path / "key").peer_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "link"]


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is no regular file"):
        ensure_identity(tmp_path / "pipe")
