"""``swarmtune -m``: every combination once, over as few swarms as possible, and a table."""

import csv
import json
from pathlib import Path

import pytest

from swarmtune.config import expand_sweep
from swarmtune.errors import SwarmError, UsageError
from swarmtune.sweep import plan_sweep, run_sweep
from swarmtune.train.module import CausalLMModule
from tests.unit.stand_in import SHORT, StandInSwarm

pytestmark = pytest.mark.usefixtures("one_thread")


def words(tiny_model: Path, folder: Path, *more: str) -> list[str]:
    return ["recipe=lora_bloom", f"model={tiny_model}", f"run_dir={folder}", "data.sequence_length=16", *SHORT, *more]


def test_values_are_combined_in_order() -> None:
    found = expand_sweep(["a=1,2", "b=[1,2]", "c=x,y", "run_dir=p,q"])
    assert found == [[f"a={a}", "b=[1,2]", f"c={c}", "run_dir=p,q"] for a in (1, 2) for c in "xy"]
    assert expand_sweep(["lr=range(1,4)"]) == [["lr=1"], ["lr=2"], ["lr=3"]]
    with pytest.raises(UsageError, match="name the values"):
        expand_sweep(["adapter=glob(*)"])


def test_every_combination_is_run_over_one_swarm_and_the_table_names_the_best(
    tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep(words(tiny_model, tmp_path / "s", "optimizer.lr=1e-5,1e-2", "adapter.r=2,4", "optimizer.warmup_steps=0"), 0.0) == 0
    with open(tmp_path / "s" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optimizer.lr"], row["adapter.r"]) for row in rows] == [("1e-05", "2"), ("1e-05", "4"), ("0.01", "2"), ("0.01", "4")]
    losses = [json.loads((tmp_path / "s" / row["run"] / "summary.json").read_text())["val_loss_after"] for row in rows]
    assert [row["state"] for row in rows].index("best") == losses.index(min(losses)) >= 2
    assert len(swarm) == 1 + 4  # the servers once, a connection for each run
    assert all(item.closed for item in swarm)
    assert "best" in capsys.readouterr().out


def test_nothing_starts_where_one_combination_is_wrong(tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm]) -> None:
    for wrong in ("optimizer.lr=1e-3,-1", "trainer.precision=32-true,banana", "adapter=lora,lorra"):
        with pytest.raises(UsageError):
            run_sweep(words(tiny_model, tmp_path / "s", wrong), 0.0)
    assert not swarm
    assert not (tmp_path / "s").exists()


def test_a_failed_run_is_noted_and_a_sweep_that_was_broken_off_goes_on(
    tiny_model: Path, tmp_path: Path, swarm: list[StandInSwarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CausalLMModule.training_step

    def broken(self: CausalLMModule, batch: dict, batch_idx: int) -> object:
        if self.lr == 1e-3 and self.global_step == 3:
            raise RuntimeError("out of memory")
        if self.lr == 2e-3:
            raise SwarmError("nobody answers")
        if self.lr == 3e-3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    given = words(tiny_model, tmp_path / "s", "optimizer.lr=1e-3,2e-3,3e-3")
    with monkeypatch.context() as patch:
        patch.setattr(CausalLMModule, "training_step", broken)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(given, 0.0)
    table = (tmp_path / "s" / "sweep.csv").read_text()
    assert "failed: nobody answers" in table
    assert "failed: RuntimeError: out of memory" in table
    assert "not done" in table
    with pytest.raises(UsageError, match="already holds runs"):
        plan_sweep(given)
    (tmp_path / "s" / "sweep.json").unlink()
    with pytest.raises(UsageError, match="already holds runs"):
        plan_sweep(given)
    with pytest.raises(UsageError, match=r"began with another optimizer\.lr"):
        run_sweep([*words(tiny_model, tmp_path / "s", "optimizer.lr=4e-3,2e-3,3e-3"), "resume=auto"], 0.0)
    with pytest.raises(UsageError, match="takes resume=auto"):
        run_sweep([*given, f"resume={tmp_path / 's' / '0'}"], 0.0)
    assert run_sweep([*given, "resume=auto"], 0.0) == 0
    first = (tmp_path / "s" / "0" / "summary.json").stat().st_mtime_ns
    assert run_sweep([*given, "resume=auto"], 0.0) == 0
    assert (tmp_path / "s" / "0" / "summary.json").stat().st_mtime_ns == first
    assert "failed" not in (tmp_path / "s" / "sweep.csv").read_text()
