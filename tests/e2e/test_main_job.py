"""Whole commands as a user types them: real servers, real hivemind, the embedded model and data."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BloomForCausalLM

from swarmtune.remote.verdict import judge

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "swarmtune" / "assets" / "pocket_bloom"
ABSENT = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWMEUhm3PfKTu7SMn27jjfqRMZDvWXWLvtJoGAokbb25mF"
COMMAND = [str(Path(sys.executable).with_name("swarmtune"))]
SUMMARY_KEYS = {
    "val_loss_before", "val_loss_after", "steps", "trainable_params", "total_params",
    "tokens_per_s", "bytes_up", "bytes_down", "adapter_dir", "run_dir",
}  # fmt: skip


def run(words: list[str], cwd: Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "COLUMNS": "160"}


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Thirty steps, started in a directory that has a ``conf`` and a ``servers`` of its own."""
    cwd = tmp_path_factory.mktemp("somewhere")
    for name in ("conf", "servers", "recipes"):
        (cwd / name).mkdir()
        (cwd / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    done = run(["recipe=lora_bloom", "trainer.max_steps=30", "run_dir=out"], cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "out", done.stdout


def test_main_job_ends_with_a_summary_and_a_lower_perplexity(short_run: tuple[Path, str]) -> None:
    run_dir, output = short_run
    summary = summary_of(run_dir)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 30
    assert math.exp(summary["val_loss_after"]) < 0.93 * math.exp(summary["val_loss_before"])
    assert summary["total_params"] > summary["trainable_params"] > 0
    assert min(summary["bytes_up"], summary["bytes_down"], summary["tokens_per_s"]) > 0
    assert summary["seconds_to_first_step"] < 60
    assert Path(summary["loss_curve"]).read_bytes().startswith(b"\x89PNG")
    for fact in ("tok/s", "perplexity", str(run_dir.name), "from_pretrained"):
        assert fact in output
    assert "Traceback" not in output


def test_adapter_of_the_main_job_loads_with_the_three_lines_shown(short_run: tuple[Path, str]) -> None:
    run_dir, _ = short_run
    model = AutoPeftModelForCausalLM.from_pretrained(run_dir / "adapter").eval()
    base = AutoModelForCausalLM.from_pretrained(POCKET).eval()
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    inputs = tokenizer(topics["with"], return_tensors="pt", truncation=True, max_length=512)
    with torch.no_grad():
        tuned, plain = model(**inputs, labels=inputs["input_ids"]).loss, base(**inputs, labels=inputs["input_ids"]).loss
    assert tuned < plain


def test_checkpoints_hold_only_what_learns_with_an_adapter_beside_each(short_run: tuple[Path, str]) -> None:
    run_dir, _ = short_run
    checkpoints = sorted(run_dir.glob("checkpoints/**/*.ckpt"))
    assert checkpoints
    for path in checkpoints:
        names = torch.load(path, weights_only=True)["state_dict"]
        assert names
        assert all("lora_" in name for name in names)
        assert (path.parent / "adapter" / "adapter_config.json").is_file()
    columns = (run_dir / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "lr", "time/train_s", "time/swarm_s"} <= set(columns)
    totals = summary_of(run_dir)["servers"]
    assert len(totals) == 2
    for label, server in totals.items():
        assert min(server[name] for name in ("calls", "compute_s", "network_s", "bytes_up", "bytes_down")) > 0
        assert f"server/{label}/compute_s" in columns


def test_training_over_killed_servers_gives_the_bits_of_the_quiet_run(tmp_path: Path) -> None:
    words = ["recipe=lora_bloom", "trainer.max_steps=12", "trainer.limit_val_batches=2", "trainer.accumulate_grad_batches=2", "data.batch_size=4"]
    words += ['swarm.spans=["0:2","2:4","0:2","2:4"]', "swarm.threads=1"]
    assert run([*words, "run_dir=quiet"], tmp_path).returncode == 0
    words += ["callbacks.progress=lines", "callbacks.line_every_s=0.1"]
    loud_run(tmp_path, [*words, "swarm.history=true", "run_dir=loud"])
    assert_same_adapter(tmp_path / "quiet", tmp_path / "loud")
    summary = summary_of(tmp_path / "loud")
    assert summary["retries"] >= 1
    events = [json.loads(line) for line in (tmp_path / "loud" / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] in ("failed", "slow") for event in events) >= summary["events"]["failed"] >= 1
    assert {server["lost_s"] > 0 for server in summary["servers"].values() if server["failures"]} == {True}
    assert "events/failed" in (tmp_path / "loud" / "metrics.csv").read_text().splitlines()[0].split(",")
    verdict = judge(tmp_path / "loud" / "history.jsonl")
    assert verdict.clean, verdict
    assert verdict.passes > 2 * 12 * 2

    said = gone_run(tmp_path, [*words, "swarm.patience_s=3", "run_dir=gone"])
    assert re.search(r"nobody serves blocks 0:\d.* of 0:4; .*; looking for one, [0-3] s left", said), said
    assert re.search(r"waited 3 s; last failure: peer .*; step \d+ is saved: go on with swarmtune resume=\S*gone", said), said
    assert run(["resume=gone"], tmp_path).returncode == 0
    assert_same_adapter(tmp_path / "quiet", tmp_path / "gone")


def assert_same_adapter(quiet: Path, loud: Path) -> None:
    a, b = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (quiet, loud))
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def gone_run(tmp_path: Path, words: list[str]) -> str:
    """A run all of whose servers are killed at once; what it says."""
    process = subprocess.Popen([*COMMAND, *words], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 5/"):
            for server in servers_of(process.pid):
                os.kill(server.pid, signal.SIGKILL)
    assert process.wait(60) == 1, "".join(lines)
    process.stdout.close()
    return "".join(lines)


def loud_run(tmp_path: Path, words: list[str]) -> None:
    """A run two of whose servers are killed, those at work."""
    process = subprocess.Popen([*COMMAND, *words], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    steps = 0
    servers: list[psutil.Process] = []
    began: list[float] = []
    for line in process.stdout:
        lines.append(line)
        if not re.match(r"step \d+/", line):
            continue
        steps += 1
        if steps == 1:
            servers = servers_of(process.pid)
            began = [busy_s(server) for server in servers]
        elif steps in (4, 5):  # of the two replicas of a half, the one that has worked since
            replicas = (0, 2) if steps == 4 else (1, 3)
            os.kill(servers[max(replicas, key=lambda number: busy_s(servers[number]) - began[number])].pid, signal.SIGKILL)
    assert process.wait(60) == 0, "".join(lines)
    process.stdout.close()
    assert steps >= 5


def busy_s(process: psutil.Process) -> float:
    """Processor time that it has used."""
    times = process.cpu_times()
    return times.user + times.system


def servers_of(pid: int) -> list[psutil.Process]:
    """The bundled servers of a run, in the order of their spans."""
    return sorted((child for child in psutil.Process(pid).children() if "servers" in child.cmdline()), key=lambda child: child.pid)


def test_sharded_local_model_and_local_text_take_the_same_path(tmp_path: Path) -> None:
    model = BloomForCausalLM.from_pretrained(POCKET)
    model.save_pretrained(tmp_path / "my model (1)", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(POCKET).save_pretrained(tmp_path / "my model (1)")
    assert len(list((tmp_path / "my model (1)").glob("*.safetensors"))) > 2
    text = [json.dumps({"text": f"def function_{number}(): return the {number}th value of the sequence, or None. " * 20}) for number in range(40)]
    (tmp_path / "notes.jsonl").write_text("\n".join(text))
    done = run(["recipe=lora_bloom", "model=my model (1)", "data=notes.jsonl", "trainer.max_steps=4", "trainer.accumulate_grad_batches=2",
                "trainer.gradient_clip_val=0.5", "trainer.precision=bf16-mixed", "data.batch_size=2", "run_dir=out"], tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary_of(tmp_path / "out")["steps"] == 4
    PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path: Path) -> None:
    words = ["recipe=lora_bloom", "trainer.max_steps=3", "trainer.limit_val_batches=1", "swarm.servers=1", "swarm.threads=1"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run([*words, f"seed={seed}", f"run_dir={name}"], tmp_path).returncode == 0
    a, b, c = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["adapter.target_modules=[nope]"], 2, "match nothing"),
        (["adapter.peft_type=OSF"], 2, "OSF"),
        (["adapter=loha", "adapter.rank_dropout=0.1"], 2, "rank_dropout"),
        (["swarm.spans=['0:2']", "swarm.patience_s=2"], 2, "nobody serves blocks 2:4 of 0:4"),
        (["swarm.spans=['0:9']"], 2, "0:9"),
        (["model=bert"], 2, "a span of zero layers is not the identity"),
        (["optimizer.lr=1e30", "optimizer.warmup_steps=0", "trainer.gradient_clip_val=null"], 2, "block"),
        (["swarm=join", f"swarm.initial_peers=[{ABSENT}]", "swarm.patience_s=1"], 2,
         "none of the initial peers answered"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_without_a_traceback(tmp_path: Path, words: list[str], code: int, sentence: str) -> None:
    if "model=bert" in words:
        config = BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=4096,
            is_decoder=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
        AutoTokenizer.from_pretrained(POCKET).save_pretrained(tmp_path / "bert")
    done = run(["recipe=lora_bloom", "trainer.max_steps=4", "run_dir=out", *words], tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("swarmtune:")]) == 1


def begin(words: list[str], cwd: Path, until: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a run and wait until it prints a line that matches ``until``; the process, and all that it has started."""
    words = [*words, "callbacks.progress=lines", "callbacks.line_every_s=0.01"]
    process = subprocess.Popen([*COMMAND, *words], cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(until, line):
            return process, psutil.Process(process.pid).children(recursive=True)
    raise AssertionError("".join(lines))


def wait_gone(family: list[psutil.Process]) -> None:
    """Every process has ended within ten seconds."""
    ends_at = time.monotonic() + 10
    while alive := [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < ends_at, alive
        time.sleep(0.1)


LONG = ["recipe=lora_bloom", "trainer.max_steps=14", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=10",
        "trainer.limit_val_batches=1", "callbacks.checkpoint_every_steps=4", "data.batch_size=4", "swarm.threads=1"]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run([*LONG, "run_dir=out"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process_and_goes_on_to_the_same_adapter(tmp_path: Path, unbroken: bytes, number: int) -> None:
    process, family = begin([*LONG, "run_dir=out"], tmp_path, r"step [67]/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=90)
    if number != signal.SIGKILL:
        assert process.returncode == 130, output
        assert "stopping after this step" in output
        assert re.search(r"interrupted; step \d+ is saved: go on with swarmtune resume=", output), output
    wait_gone(family)
    assert not (tmp_path / "out" / "summary.json").exists()
    done = run(["resume=out"] if number == signal.SIGINT else [*LONG, "run_dir=out", "resume=auto"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"going on with .*out after step \d", done.stdout), done.stdout
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == unbroken
    steps = [int(line.split(",")[0]) for line in (tmp_path / "out" / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == sorted(steps)
    assert set(steps) >= set(range(14)) - {int(line) for line in re.findall(r"after step (\d+)", done.stdout) for line in [int(line) - 1]}


def test_a_sweep_runs_over_one_swarm_and_ends_in_a_table(tmp_path: Path) -> None:
    done = run(["-m", "recipe=lora_bloom", "debug=short", "optimizer.lr=1e-3,5e-3", "trainer.max_steps=6", "run_dir=sweep"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("starting 2 servers") == 1
    assert re.search(r"1\s*.\s*0\.005.*best", done.stdout), done.stdout
    assert [summary_of(tmp_path / "sweep" / name)["steps"] for name in "01"] == [6, 6]
