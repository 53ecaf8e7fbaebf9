"""Every command that README, docs/training.md and docs/operations.md show, run as it stands there.

Only addresses, block numbers and the length of the runs are made to fit this machine. The other documents have tests of their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.test_main_job import COMMAND, POCKET, ROOT, begin, environment, run, summary_of

pytestmark = pytest.mark.e2e

SHORT = ["debug=short", "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "callbacks.checkpoint_every_steps=1"]
ALONE = [*SHORT, "swarm.servers=1"]
"""The same with one server, whose start is most of what a short run costs."""
BY_CI = {
    "scripts/quickstart": (".ci/run", "scripts/quickstart"),
    "scripts/test": (".ci/run", "scripts/test"),
    "python3 -m venv .venv && . .venv/bin/activate": ("scripts/_venv", '-m venv --clear "$VENV"'),
    "pip install -c constraints.txt torch==2.13.0": ("scripts/_venv", '-c "$ROOT/constraints.txt" torch==2.13.0'),
    "pip install -c constraints.txt -e .": ("scripts/_venv", '-c "$ROOT/constraints.txt" -e "$ROOT$extras"'),
    "swarmtune recipe=lora_bloom": ("scripts/quickstart", 'swarmtune" recipe=lora_bloom'),
}
"""Commands that CI itself runs, the script that does, and how it says it."""


ELSEWHERE = ("systemctl", "journalctl", "docker")
"""What operations.md shows for machines that have these; it says that they were not run."""


def lines(document: str = "README.md") -> list[str]:
    """The shell commands of a document, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return [stripped for block in blocks for line in block.splitlines() if (stripped := re.sub(r"(^|\s+)# .*$", "", line).strip())]


def words(start: str, document: str = "README.md") -> list[str]:
    """The words after ``swarmtune`` of the one command of a document that begins so."""
    found = [line for line in lines(document) if line.startswith(start) and line not in BY_CI]
    (chosen,) = [line for line in found if line == start] or found
    return shlex.split(chosen)[1:]


def succeed(command: list[str], cwd: Path) -> str:
    done = run(command, cwd)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


TRAINING, OPERATIONS = "docs/training.md", "docs/operations.md"


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the commands name."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(POCKET, folder / "my-model")
    texts = [json.dumps({"text": f"def function_{number}(): return the {number}th value of the sequence, or None. " * 20}) for number in range(40)]
    (folder / "notes.jsonl").write_text("\n".join(texts))
    chats = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} is a number. " * 4}]} for n in range(40)
    ]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats))
    (folder / "reviews.csv").write_text("text,stars\n" + "\n".join(f"this is review {n} of {n % 3} stars,{n % 3}" for n in range(60)))
    return folder


@pytest.mark.parametrize("document", ["README.md", "docs/training.md", "docs/operations.md"])
def test_every_command_is_run_by_a_test_below_or_by_ci(document: str) -> None:
    source = Path(__file__).read_text()
    where = "" if document == "README.md" else {"docs/training.md": ", TRAINING", "docs/operations.md": ", OPERATIONS"}[document]
    named = re.findall(rf'words\("([^"]+)"{where}\)', source)
    for line in lines(document):
        if line in BY_CI:
            script, how = BY_CI[line]
            assert how in (ROOT / script).read_text()
        elif document != "README.md" and line in lines():
            continue
        elif line.startswith("scripts/swarm"):
            assert '"scripts" / "swarm"' in (ROOT / "tests" / "swarm" / "test_serving.py").read_text()
        elif not line.startswith(ELSEWHERE):
            assert [text for text in named if line.startswith(text) or text.startswith(line)], f"no test runs: {line}"


def test_a_run_is_begun_stopped_resumed_plotted_exported_and_continued(cwd: Path) -> None:
    process, _ = begin([*words("swarmtune recipe=lora_bloom run_dir=my-run"), *ALONE, "trainer.max_steps=6"], cwd, r"step [2-4]/")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    succeed(words("swarmtune resume=my-run"), cwd)
    assert summary_of(cwd / "my-run")["steps"] == 6
    assert len(list((cwd / "my-run" / "wandb").glob("offline-run-*"))) == 2
    succeed([*words("swarmtune -m recipe=lora_bloom"), *ALONE], cwd)
    sweep = words("swarmtune -m recipe=lora_bloom optimizer.lr=1e-3,5e-3 adapter.r=4,8 run_dir=my-sweep resume=auto", TRAINING)
    assert "starting" not in succeed([*sweep, *ALONE], cwd)  # all of it is done
    succeed(words("swarmtune plot my-run"), cwd)
    assert (cwd / "plot.html").stat().st_size > 10_000
    succeed(words("swarmtune export my-run"), cwd)
    assert (cwd / "my-adapter" / "adapter_config.json").is_file()
    succeed([*words("swarmtune recipe=lora_bloom adapter=my-run/adapter"), *ALONE], cwd)


def test_what_can_be_changed(cwd: Path) -> None:
    for command in (
        words("swarmtune recipe=lora_bloom trainer.max_steps=500"),
        words("swarmtune recipe=lora_bloom model=./my-model data=notes.jsonl"),
        words("swarmtune recipe=lora_bloom swarm.spans=[0:2,2:4,0:2,2:4]"),
        words("swarmtune recipe=lora_bloom swarm.quantize=int8"),
        words("swarmtune recipe=lora_bloom swarm.codec=bf16"),
        words("swarmtune recipe=lora_bloom debug=short"),
    ):
        assert "held-out perplexity" in succeed([*command, *(SHORT if any("swarm.spans" in word for word in command) else ALONE)], cwd)


def test_other_methods_and_recipes(cwd: Path) -> None:
    assert "PeftModel" in succeed([*words("swarmtune recipe=lora_bloom adapter=dora"), *ALONE], cwd)
    ia3 = words("swarmtune recipe=ia3_bloom")
    for recipe in ("ia3_bloom", "deep_prompts_bloom", "prefix_llama", "bitfit"):
        output = succeed([*ia3[:-1], f"recipe={recipe}", *ALONE], cwd)
        assert "held-out perplexity" in output
        assert ("PeftModel" in output) == (recipe in ("ia3_bloom", "prefix_llama"))
    assert "held-out perplexity" in succeed([*words("swarmtune recipe=lora_chat data=chats.jsonl"), *ALONE], cwd)
    assert "held-out accuracy" in succeed([*words("swarmtune recipe=lora_classify data=reviews.csv data.label_column=stars"), *ALONE], cwd)


def test_a_recipe_of_ones_own(cwd: Path) -> None:
    assert "lora_bloom" in succeed(words("swarmtune ls"), cwd)
    succeed(words("swarmtune cp lora_bloom mine"), cwd)
    assert "trained              mine" in succeed([*words("swarmtune recipe=./mine.yaml"), *ALONE], cwd)


def test_servers_are_started_looked_at_and_trained_over(cwd: Path) -> None:
    done = run(words("swarmtune doctor"), cwd)
    assert done.returncode in (0, 1), done.stderr  # this machine may lack something, such as disk
    started: list[subprocess.Popen[str]] = []
    address = ""
    try:
        first, second = words("swarmtune serve model=./my-model blocks=0:12"), words("swarmtune serve model=./my-model blocks=12:24")
        for command, blocks in ((first, "0:2"), (second, "2:4")):
            fitted = [fit(word, blocks, address) for word in command]
            started.append(serve(fitted, cwd))
            server = started[-1]
            assert server.stdout is not None
            ready = server.stdout.readline()
            assert ready.startswith(f"serving blocks {blocks}"), ready
            address = address or ready.rpartition(" at ")[2].split()[0]
        looked = run([fit(word, "", address) for word in words("swarmtune doctor --peer")], cwd)
        assert address.rpartition("/")[2][-8:] in looked.stdout, looked.stdout + looked.stderr
        joined = [fit(word, "", address) for word in words("swarmtune recipe=lora_bloom model=./my-model swarm=join")]
        assert "held-out perplexity" in succeed([*joined, *SHORT, "run_dir=joined"], cwd)
    finally:
        stop(started)
    assert (cwd / "server.key").stat().st_mode & 0o777 == 0o600


def serve(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    """Start a server."""
    return subprocess.Popen([*COMMAND, *words], cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def stop(started: list[subprocess.Popen[str]]) -> None:
    """SIGTERM; every server ends with exit code 0."""
    for server in started:
        server.send_signal(signal.SIGTERM)
    codes = [server.wait(60) for server in started]
    for server in started:
        assert server.stdout is not None
        server.stdout.close()
    assert codes == [0] * len(started)


def free_port(word: str) -> str:
    """``port=`` with a port that is free now; any other word as it is."""
    if not word.startswith("port="):
        return word
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"port={probe.getsockname()[1]}"


def fit(word: str, blocks: str, address: str) -> str:
    """A word of a README command, for this machine: its blocks, its loopback address, a free port."""
    if word.startswith("blocks="):
        return f"blocks={blocks}"
    word = re.sub(r"/ip4/192\.168\.1\.10/tcp/31337/p2p/12D3Koo\.\.\.", address, word)
    return re.sub(r"192\.168\.1\.1[01]", "127.0.0.1", free_port(word))


def test_the_python_of_the_readme_runs_as_it_stands(cwd: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    given = ["import torch", "ids = labels = torch.randint(0, 100, (2, 20))", "mask = torch.ones_like(ids)", "hidden_BTH = torch.randn(2, 20, 224)"]
    code = (
        "\n".join([*given, "hidden_size = 224", ""])
        + block.replace("path/to/model", "my-model").replace('"0:4", "4:8"', '"0:2", "2:4"')
        + "\n        print(hidden.shape)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert str(torch.Size([2, 20, 224])) in done.stdout
    assert os.listdir(cwd / "out" / "adapter")


def test_loggers_and_resuming_of_the_document_of_a_run(tmp_path: Path) -> None:
    succeed([*words("swarmtune recipe=lora_bloom logger=wandb", TRAINING), *ALONE, "run_dir=wandb-run"], tmp_path)
    assert list((tmp_path / "wandb-run" / "wandb").glob("offline-run-*"))
    succeed([*words("swarmtune recipe=lora_bloom logger=tensorboard", TRAINING), *ALONE, "run_dir=board-run"], tmp_path)
    assert list((tmp_path / "board-run" / "tensorboard").glob("events*"))
    again = [*words("swarmtune recipe=lora_bloom run_dir=my-run", TRAINING), *ALONE, "trainer.max_steps=6"]
    process, _ = begin(again, tmp_path, r"step [2-4]/")
    process.kill()
    process.communicate(timeout=60)
    assert "going on with" in succeed(again, tmp_path)
    (named,) = words("swarmtune resume=runs", TRAINING)
    assert "is finished" in run([f"resume={tmp_path / 'my-run'}" if named.startswith("resume=") else named], tmp_path).stderr


def test_servers_of_the_document_of_operations(tmp_path: Path) -> None:
    started: list[subprocess.Popen[str]] = []
    address = ""
    try:
        for command in (words("swarmtune serve model=pkg://swarmtune/assets/pocket_bloom blocks=0:2", OPERATIONS),
                        words("swarmtune serve model=pkg://swarmtune/assets/pocket_bloom blocks=2:4", OPERATIONS)):  # fmt: skip
            fitted = [free_port(word).replace("ADDRESS", address) for word in command]
            server = subprocess.Popen(
                [*COMMAND, *fitted], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            started.append(server)
            assert server.stdout is not None
            address = address or server.stdout.readline().rpartition(" at ")[2].split()[0]
        joined = [word.replace("ADDRESS", address) for word in words("swarmtune recipe=lora_bloom swarm=join", OPERATIONS)]
        assert "held-out perplexity" in succeed([*joined, *SHORT, "run_dir=joined"], tmp_path)
    finally:
        stop(started)
