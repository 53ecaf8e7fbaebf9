import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import swarmtune
from swarmtune import cli
from swarmtune.errors import NonFinite, PeersUnreachable, UsageError

ROOT = Path(swarmtune.__file__).parent.parent


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "swarmtune.cli", *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


def test_help_is_light_and_names_the_recipes(tmp_path: Path) -> None:
    probe = "import sys; from swarmtune.cli import main; main(['--help']); print([n for n in ('torch', 'hydra', 'lightning') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert "Recipes: bitfit" in done.stdout
    assert "lora_bloom" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_help_takes_little_time_of_a_core(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.4


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--version"], 0, f"swarmtune {swarmtune.__version__}"),
        ([], 2, "swarmtune recipe=NAME"),
        (["srve"], 2, "swarmtune: there is no command 'srve'; did you mean serve?"),
        ([""], 2, "swarmtune: there is no command ''; swarmtune --help lists what there is"),
        (["--hlp"], 2, "swarmtune: there is no option --hlp"),
        (["recipe=lora_blom"], 2, "swarmtune: there is no recipe 'lora_blom'"),
        (["recipe=lora_bloom", "data.batch_sise=3"], 2, "did you mean data.batch_size?"),
        (["recipe=lora_bloom", "model=./nothing here"], 2, "swarmtune: model: no such directory: ./nothing here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_exit_codes_and_sentences(words: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    if code == 2 and words:
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("bad key"), 2, "swarmtune: bad key\n"),
        (NonFinite("loss is nan"), 2, "swarmtune: loss is nan\n"),
        (PeersUnreachable("nobody answered"), 2, "swarmtune: nobody answered\n"),
        (KeyboardInterrupt(), 130, "swarmtune: interrupted\n"),
        (KeyboardInterrupt("saved in x"), 130, "swarmtune: saved in x\n"),
    ],
    ids=repr,
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str], started: float) -> int:
        raise error

    monkeypatch.setattr(cli, "_train", fail)
    assert cli.main(["recipe=x"]) == code
    assert capsys.readouterr().err == said


def test_python_m_does_not_take_packages_of_the_current_directory(tmp_path: Path) -> None:
    for name in ("conf", "recipes", "servers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    for words in (["ls"], ["show", "lora_bloom"], ["serve", "--help"], ["__complete", "zsh", "recipe="]):
        done = subprocess.run(
            [sys.executable, "-m", "swarmtune.cli", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_control_characters_of_an_error_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(words: list[str], started: float) -> int:
        error = UsageError("the file says \x1b]0;owned\x07 here\nand there")
        error.add_note("a note \x1b[31m")
        raise error

    monkeypatch.setattr(cli, "_train", fail)
    assert cli.main(["recipe=x"]) == 2
    assert capsys.readouterr().err == "swarmtune: the file says  ]0;owned  here and there; a note  [31m\n"


def test_the_unexpected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str], started: float) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_train", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["recipe=x"])


def test_the_summary_shows_every_fact_and_three_lines_of_peft(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {
        "recipe": "lora_bloom",
        "model": "/a/model [x]",
        "steps": 200,
        "trainable_params": 36_864,
        "total_params": 3_500_000,
        "val_ppl_before": 61.234,
        "val_ppl_after": 30.51,
        "tokens_per_s": 5123.4,
        "seconds": 61.0,
        "bytes_up": 1_000_000,
        "bytes_up_per_step": 120_000,
        "bytes_down_per_step": 250_000,
        "bytes_down": 2_500_000,
        "retries": 3,
        "events": {"failed": 2, "waited": 1, "lost_s": 4.25},
        "servers": {"alpha": {"failures": 2.0}, "beta": {"failures": 0.0}},
        "run_dir": "/runs/" + "long" * 60,
        "loss_curve": "/runs/loss.png",
        "adapter_dir": "/runs/adapter",
    }
    cli._print_summary(summary)
    out = capsys.readouterr().out
    for fact in (
        "/a/model [x]",
        "200 steps",
        "36,864 of 3,500,000 (1.05%)",
        "61.2 -> 30.5",
        "5,123",
        "1.0 MB up, 2.5 MB down, 3 retries",
        "0.12 MB up, 0.25 MB down",
        "2 calls failed and were done elsewhere, 1 wait for a server (alpha 2); 4.2 s lost",
        "/runs/loss.png",
    ):
        assert fact in out
    assert "long" * 60 in out
    code = out[out.index("from peft") :]
    assert len(code.strip().splitlines()) == 3
    compile(code, "shown", "exec")
