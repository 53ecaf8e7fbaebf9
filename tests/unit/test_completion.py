"""Completion: what is offered, and the scripts in real shells."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import swarmtune
from swarmtune.cli import VERBS, main
from swarmtune.commands.complete import Line, candidates
from swarmtune.config import options
from swarmtune.train.library_keys import peft_fields, trainer_flags

ROOT = Path(swarmtune.__file__).parent.parent
BREAKS = " \t\n\"'@><=;|&(:"
"""What bash has in COMP_WORDBREAKS."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model, texts, a recipe and names that shells stumble over."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "my runs", ".hidden"):
        (tmp_path / name).mkdir()
    for name in ("notes.jsonl", "mine.yaml", "a:b=c.txt", "$odd `name`.csv"):
        (tmp_path / name).touch()
    return tmp_path


def after(text: str) -> list[str]:
    *before, current = text.split(" ")
    return candidates(before, current)


def test_verbs_and_keys_come_first(here: Path) -> None:
    assert after("") == sorted([*VERBS, "recipe=", "resume="])
    assert after("va") == ["validate"]
    assert after("optimizer.l") == ["optimizer.lr="]
    assert after("--v") == ["--version"]
    assert after("-m recipe=lora_b") == ["recipe=lora_bloom"]
    assert after("recipe=lora_bloom resume=") == ["resume=auto", "resume=model/", "resume=my runs/"]


def test_recipes_are_bundled_ones_and_yaml_files(here: Path) -> None:
    assert after("recipe=") == sorted(f"recipe={name}" for name in (*options("recipe"), "mine.yaml", "model/", "my runs/"))
    assert after("show ") == sorted([*options("recipe"), "mine.yaml", "model/", "my runs/"])
    assert after("cp lora_b") == ["lora_bloom"]


def test_keys_of_the_schema_and_of_other_libraries(here: Path) -> None:
    start = "recipe=lora_bloom "
    top = after(start)
    assert {"adapter=", "adapter.", "optimizer.", "swarm=", "swarm.", "trainer.", "seed=", "run_dir="} <= set(top)
    assert not {"recipe=", "optimizer=", "seed."} & set(top)
    assert after(start + "optimizer.sch") == ["optimizer.schedule="]
    assert after(start + "optimizer.lr=1 optimizer.l") == []
    assert {f"trainer.{name}=" for name in trainer_flags()} - set(after(start + "trainer.")) == {
        f"trainer.{name}=" for name in ("callbacks", "logger", "default_root_dir")
    }
    assert "adapter.use_rslora=" in after(start + "adapter.")
    assert "adapter.feedforward_modules=" in after(start + "adapter=ia3 adapter.")
    assert "adapter.feedforward_modules=" not in after(start + "adapter.")
    assert after(start + "+data.batch_s") == ["+data.batch_size="]
    assert after("validate lora_bloom adapter=ia3 adapter.feed") == ["adapter.feedforward_modules="]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.schedule=", ["constant", "cosine", "linear"]),
        ("swarm.dtype=b", ["bfloat16"]),
        ("swarm=", ["join", "local"]),
        ("logger.wandb=", ["false", "true"]),
        ("trainer.fast_dev_run=t", ["true"]),
        ("adapter.use_rslora=", ["false", "true"]),
        ("adapter=lo", ["loha", "lokr", "lora"]),
        ("adapter=m", ["miss", "model/", "my runs/"]),
        ("model=m", ["model/", "my runs/"]),
        ("data=n", ["notes.jsonl"]),
        ("data.path=a", ["a:b=c.txt"]),
        ("run_dir=.", [".hidden/"]),
        ("nonsense=", []),
        ("nonsense.x=", []),
        ("adapter=no adapter.r", []),
    ],
)
def test_values(text: str, expected: list[str], here: Path) -> None:
    key = text.split(" ")[-1].partition("=")[0]
    assert after(f"recipe=lora_bloom {text}") == [f"{key}={value}" for value in expected]


def test_words_of_the_other_verbs(here: Path) -> None:
    assert after("ls a") == ["adapter"]
    assert after("ls adapter a") == []
    assert after("completion ") == ["bash", "fish", "zsh"]
    assert after("export m") == ["mine.yaml", "model/", "my runs/"]
    assert after("export x y --") == ["--dtype", "--force", "--help", "--merge", "--model"]
    assert after("export x y --dtype b") == ["bfloat16"]
    assert {"blocks=", "listen=", "--help"} <= set(after("serve "))
    assert "parent_fd=" not in after("serve ")
    assert after("serve dtype=f") == ["dtype=float16", "dtype=float32"]
    assert after("serve quantize=") == ["quantize=int8", "quantize=nf4", "quantize=none"]
    assert after("serve transport=") == ["transport=both", "transport=quic", "transport=tcp"]
    assert after("serve device=") == ["device=auto", "device=cpu", "device=cuda"]
    assert after("serve relay=") == ["relay=false", "relay=true"]
    assert after("serve log_every_s=") == []
    assert after("plot --") == ["--help", "--out", "--x"]
    assert after("plot run --x ") == ["step", "time", "tokens"]
    assert after("plot --out m") == ["mine.yaml", "model/", "my runs/"]


@pytest.mark.parametrize(("kind", "config"), [("LORA", peft.LoraConfig), ("IA3", peft.IA3Config)])
def test_fields_of_peft_are_those_of_its_configs(kind: str, config: type[peft.PeftConfig]) -> None:
    assert peft_fields(kind).keys() == {field.name for field in dataclasses.fields(config) if field.init}
    assert peft_fields("nothing") == peft_fields("../x") == {}


@pytest.mark.parametrize(
    ("line", "words", "replies"),
    [
        ("swarmtune comp", ["swarmtune", "comp"], ["completion "]),
        ("swarmtune ", ["swarmtune", ""], [f"{word}{'' if word.endswith('=') else ' '}" for word in sorted([*VERBS, "recipe=", "resume="])]),
        ("X=1 swarmtune ls ad", ["swarmtune", "ls", "ad"], ["adapter "]),
        ("swarmtune recipe=lora_b", ["swarmtune", "recipe=lora_b"], ["lora_bloom "]),
        ("swarmtune x=1 model=m", ["swarmtune", "x=1", "model=m"], ["model/", "my\\ runs/"]),
        ("swarmtune x=1 data=a:", ["swarmtune", "x=1", "data=a:"], ["b=c.txt "]),
        ("swarmtune x=1 data=\\$", ["swarmtune", "x=1", "data=$"], ["\\$odd\\ \\`name\\`.csv "]),
        ("swarmtune x=1 'data=n", ["swarmtune", "x=1", "data=n"], ["data=notes.jsonl"]),
        ('swarmtune x=1 data="my r', ["swarmtune", "x=1", "data=my r"], ["my runs/"]),
        ("swarmtune x=1 data=my\\ r", ["swarmtune", "x=1", "data=my r"], ["my\\ runs/"]),
    ],
)
def test_a_line_of_bash_is_read_and_answered_as_bash_does(line: str, words: list[str], replies: list[str], here: Path) -> None:
    parsed = Line.parse(line, BREAKS)
    assert parsed.words == words
    assert [parsed.reply(word) for word in candidates(words[1:-1], words[-1])] == replies


def test_without_word_breaks_bash_gets_the_whole_word() -> None:
    assert Line.parse("swarmtune recipe=lo", " ").reply("recipe=lora_bloom") == "recipe=lora_bloom "


# --- the scripts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(here: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """An environment in which ``swarmtune`` is this tree, and the scripts lie in the directory ``.hidden``."""
    for name in ("bash", "zsh", "fish"):
        assert main(["completion", name]) == 0
        (here / ".hidden" / f"script.{name}").write_text(capsys.readouterr().out)
    program = here / ".hidden" / "swarmtune"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m swarmtune.cli "$@"\n')
    program.chmod(0o755)
    return os.environ | {"PATH": f"{here / '.hidden'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(here)}


def in_shell(words: list[str], environment: dict[str, str]) -> list[str]:
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("swarmtune comp", ["completion "]),
        ("swarmtune recipe=x adapter=ia", ["ia3 "]),
        ("swarmtune recipe=x optimizer.sch", ["optimizer.schedule="]),
        ("swarmtune recipe=x data=a:", ["b=c.txt "]),
        ("swarmtune recipe=x model=my", ["my\\ runs/"]),
        ("swarmtune recipe=x 'data=n", ["data=notes.jsonl"]),
        ("swarmtune recipe=x nonsense=", []),
    ],
)
def test_the_function_in_a_real_bash(line: str, replies: list[str], shell: dict[str, str]) -> None:
    code = 'set -u; source .hidden/script.bash; COMP_LINE=$1; COMP_POINT=${#1}; _swarmtune swarmtune; printf "%s\\n" "${COMPREPLY[@]-}";'
    code += " complete -p swarmtune"
    *found, registered = in_shell(["bash", "--norc", "-c", code, "bash", line], shell)
    assert found == (replies or [""])
    assert registered == "complete -o nospace -F _swarmtune swarmtune"


def test_the_cursor_may_stand_before_the_end_in_bash(shell: dict[str, str]) -> None:
    code = 'source .hidden/script.bash; COMP_LINE="swarmtune lsXXX"; COMP_POINT=11; _swarmtune swarmtune; printf "%s\\n" "${COMPREPLY[@]}"'
    assert in_shell(["bash", "--norc", "-c", code], shell) == ["ls "]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_the_function_in_a_real_zsh(shell: dict[str, str]) -> None:
    code = (
        'compdef() { :; }; compadd() { print -r -- "${(qq)@}"; }; source .hidden/script.zsh;'
        "words=(swarmtune recipe=x optimizer.s); CURRENT=3; PREFIX=optimizer.s; _swarmtune;"
        "words=(swarmtune recipe=x data=my\\\\\\ r); PREFIX=data=my\\\\\\ r; _swarmtune; words=(swarmtune ls ad); PREFIX=ad; _swarmtune"
    )
    assert in_shell(["zsh", "-f", "-c", code], shell) == ["'-S' '' '--' 'optimizer.schedule='", "'-S' '' '--' 'data=my runs/'", "'--' 'adapter'"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_the_completions_of_a_real_fish(shell: dict[str, str]) -> None:
    lines = ("swarmtune ls ad", "swarmtune recipe=x data=my\\\\ r", "swarmtune recipe=x swarm=")
    code = "source .hidden/script.fish; " + "; ".join(f"complete -C '{line}'" for line in lines)
    assert in_shell(["fish", "--no-config", "-c", code], shell) == ["adapter", "data=my runs/", "swarm=join", "swarm=local"]


@pytest.mark.parametrize("word", ["", "recipe=lora_bloom trainer.", "recipe=lora_bloom adapter.", "recipe=lora_bloom optimizer.schedule="])
def test_an_answer_takes_little_time_and_imports_nothing_heavy(word: str) -> None:
    probe = (
        f"import sys; from swarmtune.cli import main; main(['__complete', 'zsh', *{word.split(' ')!r}]);"
        "print([n for n in ('torch', 'hydra', 'omegaconf', 'yaml', 'lightning', 'peft', 'transformers', 'rich') if n in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.endswith("[]\n")
    assert len(done.stdout.splitlines()) > 3
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4


def test_every_group_can_be_completed() -> None:
    for group in ("adapter", "callbacks", "data", "debug", "logger", "model", "swarm", "trainer"):
        assert {f"{group}={name}" for name in options(group)} <= set(candidates(["recipe=lora_bloom"], f"{group}="))
