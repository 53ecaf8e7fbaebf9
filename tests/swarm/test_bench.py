"""Every new measurement of ``scripts/bench`` in its smallest form: what it prints must be what happened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.netlab import NetLabError, mechanism

pytestmark = pytest.mark.swarm

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--hidden", "64", "--layers", "2", "--rounds", "1", "--steps", "1", "--threads", "1", "--rows", "2", "--sequence", "8")

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs one and gives its figures by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import bench_command

    def run(*words: str) -> dict[str, Any]:
        assert bench_command.main([*words, *SMALL]) == 0
        printed = capsys.readouterr().out
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        assert all(line["bench"] == words[0] for line in lines)
        found = {line["figure"]: line["value"] for line in lines if "figure" in line}
        for figure, value in found.items():
            assert f"| {figure} | {value} |" in printed  # the table says the same
        return found

    return run


def test_train_counts_what_a_step_is_made_of(bench: Bench) -> None:
    try:
        mechanism()
        preset = "wan"
    except NetLabError:
        preset = "loopback"
    found = bench("train", "--micro-batch-tokens", "8", "--preset", preset, *(["--device", "auto"] if preset == "loopback" else []))
    assert ("the emulated network's own share of the cores" in found) == (preset == "wan")
    assert found["loss of the last step, relative difference"] == "0"
    assert found["micro-batches per step"] == 2
    assert 1 <= found["block forwards per micro-batch and block"] <= 2
    assert found["calls asked again"] == 0
    assert found["up hidden per micro-batch, in X"] >= 1
    assert found["up gradient per micro-batch, in X"] >= 1
    assert found["hand-offs (calls) per micro-batch"] >= 2
    assert found["adapter bytes down per optimizer step, in adapters"] >= 1
    assert found["servers' compute / blocks here"] > 0
    ratio = found["swarm, training tok/s"] / found["local PEFT, training tok/s"]
    assert found["swarm / local PEFT (median of 1 turns)"] == pytest.approx(ratio, rel=0.01, abs=0.001)


def test_wire_moves_every_size_in_every_way(bench: Bench) -> None:
    found = bench("wire")
    for way in ("frames in this process", "p2p daemons"):
        for direction in ("up", "down"):
            calls = [value for figure, value in found.items() if figure.startswith(f"{way}, {direction}") and "plain copy" in figure]
            assert len(calls) == 4
            assert all(0 < int(value.rpartition(", ")[2]) < 4096 for value in calls)  # a header and some prefixes
    assert found["copies by encode"] == found["copies by decode"] == 0
    assert found["copies from frames to a message's body"] == 1


def test_memory_tells_weights_from_what_is_beyond_them(bench: Bench) -> None:
    import bench_memory

    block, everything = bench_memory.weights(64, 2, "float32")
    assert block == 4 * (12 * 64 * 64 + 13 * 64)
    assert everything == 2 * block + 4 * (4096 * 64 + 4 * 64)
    found = bench("memory", "--servers", "1")
    assert found["weights of a server, of the whole model, MB"] == f"{2 * block / 1e6:.1f}, {everything / 1e6:.1f}"
    for who in ("server", "client"):
        peak, libraries = map(float, found[f"{who}, training: peak in all, of which libraries, MB"].split(", "))
        assert peak > 100
        assert libraries > 100


def test_peak_of_memory_is_that_since_it_was_set_back(bench: Bench) -> None:
    import bench_memory

    block = bytearray(os.urandom(1) * (64 << 20))
    high = bench_memory.status()["VmHWM"]
    del block
    if not bench_memory.set_back():
        pytest.skip("this kernel does not set peaks back")
    assert bench_memory.status()["VmHWM"] < high - (32 << 20)


def test_picture_and_table_are_kept_and_the_former_picture_leaves(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_report

    (tmp_path / "benchmarks.md").write_text("# Benchmarks\n", encoding="utf-8")
    monkeypatch.setattr(bench_report, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(bench_report, "IMAGES", tmp_path)
    panels = [bench_report.Panel("lines", series={"a": ([1, 2], [3, 4])}, log=True, rule=1.0), bench_report.Panel("bars", bars={"b": 2.0})]
    for value in ("1", "2"):
        bench_report.Report("train", "bench_x", f"train number {value}", [{"figure": "f", "value": value}], panels).keep()
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "| f | 1 |" in text
    assert "| f | 2 |" in text
    assert text.count("(images/bench_x.png)") == 1
    assert text.index("(images/bench_x.png)") > text.index("train number 2")
    assert (tmp_path / "bench_x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("train", "--hidden", "70"), "--hidden must be a multiple of 16, the heads of the model, got 70"),
        (("memory", "--preset", "wan"), "--preset wan is for train and call, memory runs on loopback"),
        (("train", "--preset", "wan4", "--device", "auto"), "--device auto is for train on loopback, everything else is measured on the CPU"),
        (("memory", "--device", "cuda"), "--device cuda is for train on loopback, everything else is measured on the CPU"),
        (("train", "--layers", "2", "--servers", "3", "--hidden", "16"), "3 servers cannot share 2 blocks: ask for at most 2 servers"),
        (("train", "--preset", "wan"), "a lab needs root, to make network namespaces: run this as root"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    words: tuple[str, ...], sentence: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_command

    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    mechanism.cache_clear()
    try:
        assert bench_command.main(words) == 2
    finally:
        mechanism.cache_clear()
    assert capsys.readouterr().err == f"scripts/bench: {sentence}\n"
