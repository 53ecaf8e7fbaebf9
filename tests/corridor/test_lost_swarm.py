"""A run whose servers are gone says who is missing, ends with code 1, and goes on later to the bits of the unbroken run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import swarmtune
from swarmtune import cli
from swarmtune.transport.base import TransportError
from tests.harness import Faults, FaultyTransport, loopback
from tests.unit.conftest import one_thread, tiny_model  # noqa: F401  # fixtures
from tests.unit.stand_in import StandInSwarm

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["recipe=lora_bloom", "trainer.max_steps=5", "trainer.limit_val_batches=1", "trainer.val_check_interval=100", "data.sequence_length=16"]
WORDS += ["data.batch_size=4", "adapter.lora_dropout=0.1", "callbacks.progress=lines", "callbacks.line_every_s=0.001"]
STEP = 3
"""The step that is broken off, counted from 1."""


@contextmanager
def swarm_of(path: Path, patch: pytest.MonkeyPatch, faults: Faults, patience_s: float = 1.5) -> Iterator[None]:
    with loopback(path, ("0:1", "1:2"), faults=faults, patience_s=patience_s) as swarm, patch.context() as inner:
        inner.setattr(swarm, "close", lambda: None)  # the harness closes it
        inner.setitem(vars(swarmtune), "LocalSwarm", StandInSwarm)
        inner.setitem(vars(swarmtune), "connect", lambda *args, **options: swarm)
        yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_run_that_lost_its_servers_goes_on_to_the_same_bits(
    way: str,
    accumulate: int,
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*WORDS, f"model={tiny_model}", f"trainer.accumulate_grad_batches={accumulate}"]
    quiet = Faults()
    with swarm_of(tiny_model, monkeypatch, quiet):
        assert cli.main([*words, f"run_dir={tmp_path / 'quiet'}"]) == 0
    assert "faults" not in capsys.readouterr().out
    backwards = [number for number, (kind, _) in enumerate(quiet.log) if kind == "kept_backward"]
    assert len(backwards) == 5 * accumulate * 2
    # the last batch of the step, so that one of two that are accumulated has been done: its first backward, or the first forward before
    number = backwards[(STEP * accumulate - 1) * 2] - (2 if way == "forward" else 0)
    assert quiet.log[number][0].removeprefix("kept_") == way
    with swarm_of(tiny_model, monkeypatch, Faults(before={number})):
        assert cli.main([*words, f"run_dir={tmp_path / 'broken'}"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    missing = "0:1" if way == "forward" else "1:2"
    assert error.startswith(f"swarmtune: nobody serves blocks {missing} of 0:2; served:")
    assert "; waited 2 s; last failure: peer peer" in error
    assert error.endswith(f"; step {STEP - 1} is saved: go on with swarmtune resume={tmp_path / 'broken'}")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "broken" / "events.jsonl").read_text().splitlines()]
    assert kinds == ["failed", "waited"]
    with swarm_of(tiny_model, monkeypatch, Faults()):
        assert cli.main([f"resume={tmp_path / 'broken'}"]) == 0
    whole, resumed = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("quiet", "broken"))
    assert list(whole) == list(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["steps"] == 5


@pytest.mark.usefixtures("command")
def test_a_failure_that_is_waited_out_is_told_while_it_lasts_and_at_the_end(
    tiny_model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call, seen = FaultyTransport.call, iter(range(1000))

    async def fails_once(self: FaultyTransport, peer: str, request: object, timeout_s: float) -> object:
        if next(seen) == 12:
            raise TransportError("its stream ended")
        return await call(self, peer, request, timeout_s)  # type: ignore[arg-type]

    monkeypatch.setattr(FaultyTransport, "call", fails_once)
    with swarm_of(tiny_model, monkeypatch, Faults(), patience_s=20):
        assert cli.main([*WORDS, f"model={tiny_model}", f"run_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("step ") and "  (1 retry" in line]
    (faults,) = [line for line in said if line.startswith("faults ")]
    assert "1 call failed and was done elsewhere, 1 wait for a server (server_of_" in faults
    assert faults.endswith(" s lost")
