import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swarmtune.train.metrics_file import MetricsFile, read_curve


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_values_of_one_step_share_a_row_and_new_columns_keep_the_old_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"train_loss": torch.tensor(2.0)}, 0)
    file.log_metrics({"bytes": 3e12}, 0)
    file.save()
    file.log_metrics({"train_loss": 1.0, "val_loss": 4.0}, 1)
    file.finalize("success")
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "0", "bytes": "3000000000000.0", "train_loss": "2.0", "val_loss": ""},
        {"step": "1", "bytes": "", "train_loss": "1.0", "val_loss": "4.0"},
    ]
    assert read_curve(tmp_path / "metrics.csv", "val_loss") == [(1, 4.0)]


def test_a_resumed_run_keeps_the_rows_before_its_step_and_a_cut_last_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train_loss\n0,3.0\n1,2.0\n2,1.0\n3,0.")
    again = MetricsFile(path, keep_below=2)
    assert rows(path) == [{"step": "0", "train_loss": "3.0"}, {"step": "1", "train_loss": "2.0"}]
    again.log_metrics({"train_loss": 9.0}, 2)
    again.save()
    assert read_curve(path, "train_loss") == [(0, 3.0), (1, 2.0), (2, 9.0)]


def test_rows_wait_in_memory_while_the_disk_is_full_and_are_written_whole_later(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, filler = small_disk / "metrics.csv", small_disk / "filler"
    file = MetricsFile(path)
    file.log_metrics({"loss": 1.0, "text": "x" * 4050}, 0)  # the next row needs another page
    file.save()
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
    for step in (1, 2):
        file.log_metrics({"loss": 1.0 + step, "text": "y" * 4050}, step)
        file.save()
    assert read_curve(path, "loss") == [(0, 1.0)]
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 1
    filler.unlink()
    file.save()
    assert read_curve(path, "loss") == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_a_killed_process_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    code = "import os,sys;from swarmtune.train.metrics_file import MetricsFile;f=MetricsFile(__import__('pathlib').Path(sys.argv[1]))\n"
    code += "for s in range(50): f.log_metrics({'loss': 1.0}, s)\nos.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "metrics.csv")], check=False, env=os.environ, timeout=120)
    assert [step for step, _ in read_curve(tmp_path / "metrics.csv", "loss")] == list(range(40))
